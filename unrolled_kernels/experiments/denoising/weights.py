"""What a model and its optimizer are in a checkpoint: tensors by name."""


def to_tensors(model, optimizer=None):
    """Copies of the weights of a model, and of the state of its optimizer if it is in training, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
