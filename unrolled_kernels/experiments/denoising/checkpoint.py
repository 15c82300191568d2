"""Weights and optimizer state in safetensors files, which hold numbers and cannot run code when they are loaded."""

import json

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unrolled_kernels.experiments.run_directory import atomic_path


def save(file, trial, model, optimizer=None, **progress):
    """Write a model, with the optimizer's state if it is in training, and what JSON can hold of its progress."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, {"trial": trial.name, "progress": json.dumps(progress)})


def read(file, trial):
    """Read what ``save`` wrote.

    Returns:
        Its tensors by name, and the dict of its progress.
    Raises:
        ValueError: the file is damaged, or holds another model than that of ``trial``; the message names both.
    """
    try:
        with safe_open(file, "pt") as saved:
            metadata = saved.metadata() or {}
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        progress = json.loads(metadata.get("progress", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a readable checkpoint (truncated, or of another kind): {error}; "
            "delete it to train its model from the start"
        ) from None
    if metadata.get("trial") != trial.name:
        raise ValueError(
            f"{file}: a checkpoint of model {metadata.get('trial')}, expected {trial.name}; "
            "delete it to train this one from the start"
        )
    return tensors, progress


def load_model(file, trial, model, tensors):
    """Give ``model`` the weights among ``tensors``; raises ValueError, which names the file, if they do not fit."""
    try:
        model.load_state_dict(_under("model.", tensors))
    except RuntimeError as error:
        raise ValueError(f"{file}: a checkpoint of another model than {trial.name}: {error}") from None


def load_optimizer(optimizer, tensors):
    """Give ``optimizer`` the state among ``tensors``."""
    (group,) = optimizer.param_groups
    state = {}
    for name, tensor in _under("optimizer.", tensors).items():
        index, key = name.split(".")
        parameter = group["params"][int(index)]
        # fused Adam walks a parameter and its moments side by side in memory: same strides, or they are mismatched
        if tensor.shape == parameter.shape and key != "step":
            tensor = parameter.detach().clone().copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
