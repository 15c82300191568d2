"""The state of training in safetensors files, which hold numbers and cannot run code when they are loaded."""

import contextlib
import json
import time

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unrolled_kernels.experiments.run_directory import atomic_path


def write(file, model, tensors, progress):
    """Write a state.

    Args:
        file: the file; whole at every moment.
        model: the name of what is in training.
        tensors: a dict of tensors.
        progress: a dict that JSON can hold.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, {"model": model, "progress": json.dumps(progress)})


def model_name(file):
    """The name of the model that ``write`` wrote to ``file``.

    Raises:
        ValueError: the file is not there, damaged, or of another kind; the message names it.
    """
    try:
        with safe_open(file, "pt") as saved:
            name = (saved.metadata() or {}).get("model")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable model (missing, truncated, or of another kind): {error}") from None
    if name is None:
        raise ValueError(f"{file}: holds tensors, but not of a model that a study here has trained")
    return name


def read(file, model, expected=()):
    """Read what ``write`` wrote.

    Args:
        file, model: as there.
        expected: names of what must be among its tensors or its progress.
    Returns:
        Its tensors by name, and the dict of its progress.
    Raises:
        ValueError: the file is damaged, lacks something, or is of another model; the message names it.
    """
    try:
        with safe_open(file, "pt") as saved:
            metadata = saved.metadata() or {}
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        progress = json.loads(metadata.get("progress", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a readable checkpoint (truncated, or of another kind): {error}; "
            "delete it to train what it holds from the start"
        ) from None
    if metadata.get("model") != model:
        raise ValueError(
            f"{file}: a checkpoint of model {metadata.get('model')}, expected {model}; "
            "delete it to train this one from the start"
        )
    missing = set(expected) - tensors.keys() - progress.keys()
    if missing:
        raise ValueError(
            f"{file}: not the state of a training: {', '.join(sorted(missing))} missing; delete it to train its "
            "model from the start"
        )
    return tensors, progress


@contextlib.contextmanager
def kept(file, model, seconds):
    """Keep the state of a long training in ``file``: now and then, and when it is interrupted.

    Args:
        file: the file; None keeps nothing.
        model: as in ``write``.
        seconds: between two writes.
    Yields:
        ``keep(state)``, to be called whenever the training has come to a state from which it can go on;
        ``state()`` gives copies of its tensors, and its progress. An interrupt comes anywhere, in the middle of an
        optimizer step for instance, so what it writes is the last of these states and not what it finds.
    """
    last, written = None, time.monotonic()

    def keep(state):
        nonlocal last, written
        if file is None:
            return
        last = state()
        if time.monotonic() - written > seconds:
            write(file, model, *last)
            written = time.monotonic()

    try:
        yield keep
    except KeyboardInterrupt:
        if last is not None:
            write(file, model, *last)
        raise
