"""A small DnCNN on the CPU as one op each way: few channels leave torch's convolutions mostly idle."""

import torch

from unrolled_kernels._torch_private import transforms_are_active
from unrolled_kernels.experiments import native
from unrolled_kernels.experiments.denoising import distributed

# as far as the op was measured to be ahead of torch
_MOST_CHANNELS = 32


def can_run(network, x, backend="auto"):
    """Whether the op serves a call of ``network`` (a ``model.DnCNN``) on x ``[B, 1, H, W]``.

    It does for float32 and float64 on a CPU whose backend is "cpu", up to 32 channels; torch's modules do the rest:
    autocast, statistics over several ranks, graphs of ``torch.compile``, ``torch.func``.
    """
    first = network[0]
    return (
        first.out_channels <= _MOST_CHANNELS
        and x.dtype in (torch.float32, torch.float64)
        and first.weight.dtype == x.dtype
        and x.numel() > 0
        and not torch.is_autocast_enabled(x.device.type)
        and not (network.training and distributed.ranks() > 1)
        and not torch.compiler.is_compiling()
        and not transforms_are_active()
        and native.runs_on(x.device, backend)
    )


def run(network, x):
    """What ``network``'s modules give on x ``[B, 1, H, W]``, their running statistics included."""
    # network.parameters() would search the tree of modules
    layers = [layer for layer in network if not isinstance(layer, torch.nn.ReLU)]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    norms = layers[2:-1:2]
    channels, eps = network[0].out_channels, norms[0].eps if norms else 0.0
    given = None
    if not network.training:
        given = x.new_empty(len(norms), 2, channels, dtype=torch.float64)
        for row, norm in zip(given, norms, strict=True):
            row[0], row[1] = norm.running_mean, norm.running_var
    y, statistics = DnCNNFunction.apply(x, given, channels, len(norms), eps, *parameters)
    if network.training:
        _update_running_statistics(norms, statistics, x.numel())
    return y


@torch.no_grad()
def _update_running_statistics(norms, statistics, count):
    if not norms:
        return
    means, variances = statistics.to(norms[0].running_mean.dtype).unbind(1)
    for norm, mean, variance in zip(norms, means, variances * (count / (count - 1)), strict=True):
        # += would go through the module's __setattr__
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)


class DnCNNFunction(torch.autograd.Function):
    """y and the statistics ``[n, 2, C]`` (mean, variance; not differentiable) of ``csrc/experiments/dncnn.h``.

    ``apply(x, statistics, channels, hidden_layers, eps, *parameters)``: statistics None is training, parameters are in
    the order of the header.
    """

    @staticmethod
    def forward(ctx, x, given, channels, hidden_layers, eps, *parameters):
        x = x.contiguous()
        flat = torch.cat([p.flatten() for p in parameters])
        keep = any(ctx.needs_input_grad)
        op = torch.ops.unrolled_kernels.dncnn.default
        y, c, statistics = op(x, flat, given, channels, hidden_layers, eps, keep)
        ctx.mark_non_differentiable(statistics)
        if keep:
            ctx.save_for_backward(x, flat, c, statistics)
        # parameters for their shapes alone
        ctx.eps, ctx.training, ctx.parameters = eps, given is None, parameters
        return y, statistics

    @staticmethod
    def backward(ctx, grad_y, _):
        x, flat, c, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "DnCNN: the C++ op has no second derivative (create_graph=True); run the model with backend='eager'"
            )
        op = torch.ops.unrolled_kernels.dncnn_backward.default
        needs_x = ctx.needs_input_grad[0]
        d_flat, dx = op(grad_y.contiguous(), x, flat, c, statistics, ctx.eps, ctx.training, needs_x)
        parts = d_flat.split([p.numel() for p in ctx.parameters])
        grads = (part.view_as(p) for part, p in zip(parts, ctx.parameters, strict=True))
        return dx if needs_x else None, None, None, None, None, *grads
