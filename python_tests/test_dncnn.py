"""The C++ op of small DnCNNs against torch's modules."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from unrolled_kernels import available_backends
from unrolled_kernels.experiments import native
from unrolled_kernels.experiments.denoising import dncnn
from unrolled_kernels.experiments.denoising.model import DnCNN
from unrolled_kernels.testing import assert_as_close_as_eager, poisoned_memory

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="the extension is not built")
# channels, hidden layers, images, height, width: every block of channels, several bands of rows, widths of a few lanes
SIZES = [(3, 2, 2, 101, 50), (1, 1, 1, 1, 1), (2, 3, 3, 7, 2), (5, 0, 1, 4, 17), (7, 2, 2, 9, 33), (20, 1, 1, 6, 70)]
IDS = "C{0[0]}-n{0[1]}-B{0[2]}-{0[3]}x{0[4]}".format


def network(channels, hidden_layers, dtype=torch.float32, seed=0):
    """A network whose biases, scales and running statistics are no defaults."""
    torch.manual_seed(seed)
    net = DnCNN(channels, hidden_layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in net:
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return net.to(dtype)


def passes(net, x, grad_y, *, fused, needs_x=True):
    """By name: y, the gradients, and the running statistics after them."""
    net = copy.deepcopy(net)
    net.backend = "cpu" if fused else "eager"
    x = x.clone().requires_grad_(needs_x)
    assert dncnn.can_run(net, x, net.backend) == fused
    y = net(x)
    y.backward(grad_y)
    grads = {name: parameter.grad for name, parameter in net.named_parameters()} | ({"x": x.grad} if needs_x else {})
    return {"y": y.detach()} | grads | {name: b for name, b in net.named_buffers() if b.is_floating_point()}


def problem(size, dtype, training=True):
    channels, hidden_layers, *shape = size
    torch.manual_seed(1)
    x, grad_y = torch.rand(2, shape[0], 1, *shape[1:]).sub(torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1, 1)).to(dtype)
    return network(channels, hidden_layers, dtype).train(training), x, grad_y


# torch refuses to normalise a single value in training
MODES = [(size, training) for size in SIZES for training in (True, False) if not (training and size[2:] == (1, 1, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    ("size", "training"), MODES, ids=[f"{IDS(size)}-{'training' if mode else 'evaluation'}" for size, mode in MODES]
)
def test_forward_and_gradients(size, training, dtype):
    with poisoned_memory():
        actual = passes(*problem(size, dtype, training), fused=True)
    exact, eager = (passes(*problem(size, t, training), fused=False) for t in (torch.float64, torch.float32))
    assert actual.keys() == exact.keys()
    # what cancels, the gradient of what a normalisation takes out again, is exact to its terms
    scale = max(value.abs().max().item() for name, value in exact.items() if name not in ("y", "x"))
    for name, value in actual.items():
        assert_as_close_as_eager(value, exact[name], eager[name], what=name, scale=scale)


def test_gradcheck():
    net, x, _ = problem((2, 1, 2, 5, 6), torch.float64)
    arguments = (None, 2, 1, 1e-5, *(p.detach().clone().requires_grad_() for p in net.parameters()))
    call = lambda x, *rest: dncnn.DnCNNFunction.apply(x, *rest)[0]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *arguments))
    given = torch.stack([torch.zeros(2), torch.ones(2)]).double().unsqueeze(0)
    assert torch.autograd.gradcheck(call, (x, given, *arguments[1:]))


@pytest.mark.parametrize("size", [(3, 2, 3, 100, 40), (20, 1, 2, 30, 20)], ids=IDS)
def test_threads_change_nothing(size):
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results[count] = passes(*problem(size, torch.float32), fused=True)
    finally:
        torch.set_num_threads(threads)
    one, three = results.values()
    for name, value in one.items():
        assert torch.equal(value, three[name]), name


def test_layouts_and_parameters_that_are_not_trained():
    net, x, grad_y = problem((3, 1, 2, 12, 14), torch.float32)
    expected = passes(net, x, grad_y, fused=True)
    strided = x.mT.contiguous().mT
    last = net.to(memory_format=torch.channels_last)
    for name, value in passes(last, strided, grad_y.mT.contiguous().mT, fused=True).items():
        assert torch.equal(value, expected[name]), name
    net[0].weight.requires_grad_(False)
    frozen = passes(net, x, grad_y, fused=True, needs_x=False)
    assert frozen.pop("0.weight") is None
    assert all(torch.equal(value, expected[name]) for name, value in frozen.items())


def test_a_large_mean_does_not_cancel():
    # variance 1e-4 of the squared mean: E[c²] - E[c]² would keep half the digits of float32
    exact, eager, actual = (
        passes(*(lambda net, x, g: (net, 100 + x, g))(*problem((3, 1, 2, 40, 40), dtype)), fused=fused)
        for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True))
    )
    for name in ("y", "3.running_var"):
        assert_as_close_as_eager(actual[name], exact[name], eager[name], what=name)


def test_nothing_is_kept_without_gradients():
    net, x, _ = problem((3, 3, 2, 20, 20), torch.float32, training=False)
    with torch.no_grad():
        alone = net(x)
    assert torch.equal(alone, net(x).detach())
    assert not alone.requires_grad


def test_infinite_and_nan_pixels_pass():
    net, x, _ = problem((3, 2, 1, 9, 9), torch.float32, training=False)
    x[..., 4, 4] = torch.nan
    y = net(x)
    # the receptive field of four layers is 9 pixels wide
    assert y.isnan().any()
    assert not net(x.nan_to_num(0)).isnan().any()


def test_what_the_op_does_not_serve_is_left_to_torch():
    net, x, _ = problem((3, 1, 1, 8, 8), torch.float32)
    assert dncnn.can_run(net, x)
    assert not dncnn.can_run(net, x.half())
    assert not dncnn.can_run(net, x[:0])
    assert not dncnn.can_run(network(33, 0), x)
    assert not dncnn.can_run(net, x, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert not dncnn.can_run(net, x)
    # torch's own batch norm has no vmap in this memory format
    plain = network(3, 0)
    assert torch.func.vmap(plain)(x.unsqueeze(0)).shape == (1, 1, 1, 8, 8)


def test_second_derivatives_are_refused():
    net, x, _ = problem((3, 1, 1, 8, 8), torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative .* backend='eager'"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_op_refuses_what_it_would_misread():
    assert native.runs_on(torch.device("cpu"))
    op, x = torch.ops.unrolled_kernels.dncnn.default, torch.rand(1, 1, 4, 4)
    for arguments, message in (
        ((x, torch.rand(5), None, 3, 2, 1e-5, True), "parameters: expected"),
        ((x[0], torch.rand(5), None, 3, 2, 1e-5, True), "x: expected"),
        ((x.half(), torch.rand(5), None, 3, 2, 1e-5, True), "x: expected float32"),
        ((x, torch.rand(5), None, 0, 2, 1e-5, True), "channels"),
        ((x, torch.rand(5), torch.rand(2), 3, 2, 1e-5, True), "statistics: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow)])
def test_every_instruction_set(level):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "gradients and C"]
    environment = os.environ | {"UNROLLED_KERNELS_CPU_ISA": level}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
