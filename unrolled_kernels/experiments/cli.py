"""The command line ``unrolled-kernels``: one subcommand for each experiment."""

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import threading

import unrolled_kernels

# NAME: its line of help, and the module with add_arguments(parser), which is imported when it is called
_SUBCOMMANDS = {
    "synthetic": (
        "train GD and NAG layers on the paper's synthetic task; Figures 3 to 5",
        "unrolled_kernels.experiments.synthetic.command",
    ),
    "learn-to-optimize": (
        "train GD, NAG and RNN layers where Q and b are given; Figure 6",
        "unrolled_kernels.experiments.learn_to_optimize.command",
    ),
    "denoising": (
        "train GD and NAG layers to denoise images; Figure 7",
        "unrolled_kernels.experiments.denoising.command",
    ),
    "theory": (
        "properties of GD and NAG layers in theory and measured; Figure 2, Theorem 5.1",
        "unrolled_kernels.experiments.theory.command",
    ),
    "info": ("versions, and each backend: available, or why not", "unrolled_kernels.info"),
}
# what the extra `experiments` brings, by the name of its import
_EXTRA = ("matplotlib", "pandas", "PIL", "pyarrow", "safetensors", "skimage", "scipy", "torchmetrics", "tqdm")


def main(argv=None):
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default ``sys.argv[1:]``.
    Returns:
        The exit code: 0, 1 for an error that the message explains, 130 for an interrupt; 2 for wrong arguments.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="unrolled-kernels", description="Optimisation algorithms as layers: the paper's experiments."
    )
    parser.add_argument("--version", action="version", version=f"unrolled-kernels {unrolled_kernels.__version__}")
    parser.add_argument("--quiet", action="store_true", help="print errors alone; before the subcommand")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    parsers = {name: subparsers.add_parser(name, help=text) for name, (text, _) in _SUBCOMMANDS.items()}
    called = next((word for word in argv if not word.startswith("-")), None)
    # before the experiments are imported: progress bars read it then
    if "--quiet" in argv[: argv.index(called) if called else None]:
        os.environ["TQDM_DISABLE"] = "1"
    if called in parsers:
        if called != "info":
            _require_extra()
        importlib.import_module(_SUBCOMMANDS[called][1]).add_arguments(parsers[called])
    arguments = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_interrupts_that_come_again())
        if arguments.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            return arguments.run(arguments) or 0
        except (OSError, ValueError) as error:
            print(f"unrolled-kernels {arguments.subcommand}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; the same command continues from here", file=sys.stderr)
            return 130


@contextlib.contextmanager
def _interrupts_that_come_again():
    """Where one falls into a callback, of a weak reference for instance, the interpreter only prints it."""

    def hook(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            previous(unraisable)
        else:
            # when the callback is over
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()

    previous, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _require_extra():
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"unrolled-kernels needs {', '.join(missing)}; get what is missing with "
            "`pip install 'unrolled-kernels[experiments]'`",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
