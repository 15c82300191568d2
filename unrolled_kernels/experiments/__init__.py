"""The paper's experiments, each a subcommand of ``unrolled-kernels``."""

import importlib


def lazily(package, public):
    """The ``__getattr__`` of a package whose ``{module: names}`` are imported when they are asked for.

    The modules need what the extra ``experiments`` brings; the package is imported without it, too.
    """

    def get(name):
        for module, names in public.items():
            if name in names:
                return getattr(importlib.import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
