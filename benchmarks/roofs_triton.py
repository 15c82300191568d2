"""The arithmetic roof of a GPU: float32 multiply-adds in registers, in Triton. Not measured on hardware yet."""

import time

import torch
import triton
import triton.language as tl

_BLOCK, _CHAINS, _STEPS, _UNROLLED = 256, 8, 4096, 16


@triton.jit
def fma_loop(out, factor, steps, block: tl.constexpr, unrolled: tl.constexpr):
    """Eight chains of multiply-adds a lane, each step x ← factor x + x_0; their sum is stored."""
    start = tl.arange(0, block).to(tl.float32)
    a, b, c, d = start, start + 1, start + 2, start + 3
    e, f, g, h = start + 4, start + 5, start + 6, start + 7
    for _ in range(steps // unrolled):
        # so that counting steps takes next to nothing
        for _ in tl.static_range(unrolled):
            a = a * factor + start
            b = b * factor + start
            c = c * factor + start
            d = d * factor + start
            e = e * factor + start
            f = f * factor + start
            g = g * factor + start
            h = h * factor + start
    tl.store(out + tl.program_id(0) * block + tl.arange(0, block), a + b + c + d + e + f + g + h)


def run(out, steps=_STEPS):
    """Fill ``out``, float32 of a multiple of 256 elements, by a multiple of 16 steps.

    Returns:
        The number of operations, two for a multiply-add.
    """
    # a number that the compiler does not know
    fma_loop[(out.numel() // _BLOCK,)](out, 0.5, steps, _BLOCK, _UNROLLED, num_warps=_BLOCK // 32)
    return 2 * _CHAINS * steps * out.numel()


def fma_rate(repeats=4):
    """Operations a second with every multiprocessor full."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(64 * processors * _BLOCK, device="cuda")
    run(out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    operations = sum(run(out) for _ in range(repeats))
    torch.cuda.synchronize()
    return operations / (time.perf_counter() - start)
