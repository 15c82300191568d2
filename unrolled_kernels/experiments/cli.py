"""The command line ``unrolled-kernels``: one subcommand for each experiment that is installed."""

import argparse
import importlib
import sys

from unrolled_kernels import info

# each of these offers add_parser(subparsers); one that is not there is not listed
_SUBCOMMANDS = (
    "unrolled_kernels.experiments.synthetic.command",
    "unrolled_kernels.experiments.learn_to_optimize.command",
    "unrolled_kernels.experiments.denoising.command",
    "unrolled_kernels.experiments.theory.command",
)


def main(argv=None):
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default ``sys.argv[1:]``.
    Returns:
        The exit code: 0, 1 for an error that the message explains, 130 for an interrupt.
    """
    parser = argparse.ArgumentParser(
        prog="unrolled-kernels", description="Optimisation algorithms as layers: the paper's experiments."
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in _SUBCOMMANDS:
        module = _import_if_there(name)
        if module is not None:
            module.add_parser(subparsers)
    parser_of_info = subparsers.add_parser("info", help="versions, and each backend: available, or why not")
    parser_of_info.set_defaults(run=lambda arguments: info.main())
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError) as error:
        print(f"unrolled-kernels {arguments.subcommand}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


def _import_if_there(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a dependency that is missing inside an experiment is another matter
        if error.name is not None and name.startswith(error.name):
            return None
        if error.name in ("matplotlib", "pandas", "pyarrow", "safetensors", "scipy", "skimage", "torchmetrics", "tqdm"):
            raise SystemExit(
                f"unrolled-kernels needs {error.name}; get it with `pip install 'unrolled-kernels[experiments]'`"
            ) from None
        raise


if __name__ == "__main__":
    sys.exit(main())
