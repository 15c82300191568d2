"""The op families: one folder each, holding its specification, hand-written backward, kernels' launchers and Function."""
