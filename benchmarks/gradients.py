"""Other gradients and those of second order: their time as a share of the exact forward + backward, in turns with it.

python -m benchmarks.gradients [--rounds N] [--record]
"""

import argparse
import dataclasses

import torch

import unrolled_kernels.functional as F
from benchmarks import harness
from benchmarks.momentum import MU, Momentum
from benchmarks.roofs import Roof
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import STRUCTURES, assert_as_close_as_eager

EXACT = "forward+backward"
GRADIENTS = {"implicit": {"backward": "implicit"}, "one step": {"backward_steps": 1}}
SECOND_ORDER = ("Hessian-vector product", "gradient penalty")
_MATRICES = [(1000, 5, 30), (1024, 32, 20), (64, 128, 20)]
SIZES = {
    "dense": _MATRICES,
    "spectral": _MATRICES,
    "diagonal": [(16, 32400, 12)],
    "tikhonov": [(16, 32400, 12)],
}


@dataclasses.dataclass(frozen=True)
class Gradients(Momentum):
    """A case of ``Momentum`` that is differentiated in one of the ways above."""

    def call(self, mode, backend, leaves, cotangent):
        """What is timed: gradients of <cotangent, y>, or products with second derivatives of |y|²/2."""
        *operands, b, step_size = leaves
        options = {"backend": backend, **GRADIENTS.get(mode, {})}

        def run():
            Q = STRUCTURES[self.structure](*operands)
            if self.method == "gd":
                return F.gradient_descent(Q, b, step_size, self.k, **options)
            return F.nesterov(Q, b, step_size, MU, self.k, **options)

        if mode not in SECOND_ORDER:
            return lambda: torch.autograd.grad(run(), leaves, cotangent, materialize_grads=True)
        first = leaves[:-1] if mode == "Hessian-vector product" else [b]
        direction = [torch.ones_like(x) for x in first]

        def differentiate_twice():
            gradients = torch.autograd.grad(run().square().sum() / 2, first, create_graph=True)
            return torch.autograd.grad(gradients, leaves, direction)

        return differentiate_twice

    def floor(self, mode):
        """Bytes and flops: of all steps forward and back, unless ``mode`` needs fewer or, of second order, more."""
        num_bytes, flops = super().floor(EXACT)
        if mode in SECOND_ORDER:  # the passes are run again with tangents
            return 3 * num_bytes, 3 * flops
        forward = super().floor("forward")[1]
        # b's gradient is made by a second forward; of one step back, next to nothing is left
        return num_bytes, {"implicit": 2 * forward, "one step": forward}.get(mode, flops)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the cases with this text in their ids")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    where, rows = harness.environment("cpu"), []
    cases = [Gradients(name, *size, method) for name in SIZES for size in SIZES[name] for method in ("gd", "nag")]
    for case in [case for case in cases if options.only in case.id]:
        leaves, cotangent = case.inputs("cpu")
        wide = [x.detach().double().requires_grad_() for x in leaves]
        modes = [(mode, "cpu") for mode in (EXACT, *GRADIENTS, *SECOND_ORDER)]
        for mode, _ in modes:
            exact = case.call(mode, "eager", wide, cotangent.double())()
            eager, actual = (case.call(mode, name, leaves, cotangent)() for name in ("eager", "cpu"))
            for a, x, e in zip(actual, exact, eager, strict=True):
                # a step size's gradient is a sum over all samples that may cancel
                scale = 0.0 if x.dim() else exact[0].norm().item() * leaves[0].detach().norm().item()
                assert_as_close_as_eager(a, x, e, what=f"{case.id} {mode}", scale=scale)
        modes += [(mode, "eager") for mode in (EXACT, *SECOND_ORDER)]
        calls = {key: case.call(*key, leaves, cotangent) for key in modes}
        roof = Roof("cpu", torch.get_num_threads(), sum(x.nbytes for x in leaves))
        timings = in_turns(calls, "cpu", rounds=options.rounds, max_seconds=3.0, between=roof.sample)
        rows += [harness.row(case, backend, mode, t, roof, where) for (mode, backend), t in timings.items()]
        exact = timings[EXACT, "cpu"].p50
        shown = (f"{mode} {name} {t.p50 * 1e6:.0f} µs {t.p50 / exact:.2f}" for (mode, name), t in timings.items())
        print(f"{case.id:36s} {'  '.join(shown)}", flush=True)
    if options.record:
        print(f"wrote {harness.write_csv(harness.results_directory('cpu') / 'gradients.csv', rows)}")


if __name__ == "__main__":
    main()
