"""The op families: a folder each, with its specification, hand-written backward, launchers and Function."""
