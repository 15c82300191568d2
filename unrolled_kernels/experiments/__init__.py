"""The paper's experiments, each a subcommand of ``unrolled-kernels``."""
