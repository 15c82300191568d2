"""``python -m unrolled_kernels.experiments.denoising``: the subcommand under a name that ``torchrun -m`` can start."""

import sys

from unrolled_kernels.experiments import cli

if __name__ == "__main__":
    sys.exit(cli.main(["denoising", *sys.argv[1:]]))
