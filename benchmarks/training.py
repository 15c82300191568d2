"""Training steps of the paper's two tasks, end to end: with the eager loop and with the fused layer, all else equal.

    python -m benchmarks.training [--device cpu|cuda] [--data DIR] [--record]

The experiments measure their steps themselves (their reports show the same numbers); this writes them down beside an
epoch of the ensemble, which on the CPU is a loop in C++.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import harness, roofs, suite
from unrolled_kernels import use_backend
from unrolled_kernels.experiments.denoising import images, measurements
from unrolled_kernels.experiments.denoising.data import DenoisingTask
from unrolled_kernels.experiments.synthetic import speed
from unrolled_kernels.experiments.synthetic.data import FIRST_SEED, generate
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.grid import PRESETS, Training, Trial
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import assert_as_close_as_eager

# fmt: off
COLUMNS = (
    "task", "what", "eager_us", "fused_us", "flops", "fma_gflop_s", "percent_of_roof", "threads", "device", "torch",
    "commit", "kernel_sources_sha256", "date",
)
# fmt: on
# of a call: the study's are of 256, which the C++ loop begins by loading each model
_EPOCHS = {"eager": 2, "auto": 64}


def flops_of_epoch(trial):
    """Of one model: two minibatch steps on 100 samples and one evaluation of the training loss."""
    h, steps, nag = trial.hidden, trial.num_steps - 1, trial.algorithm == "nag"
    # a sample forward and back through the network, and the parameters
    forward, backward, parameters = (27 * h + 87, 34 * h + 25, 14 * h + 3) if h else (147, 88, 33)
    # the recurrence with its derivative, and alone
    recurrence, evaluation = (33 * steps, 15 * steps) if nag else (15 * steps, 6 * steps)
    return 100 * (2 * forward + recurrence + backward + evaluation) + 28 * parameters


def model_epochs(task, device):
    """An epoch of one of 34 models, every depth of the paper under both algorithms, for each hidden size."""
    depths = PRESETS["medium"].depths
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for hidden in (0, 16, 32):
        trials = [Trial(hidden, "adam", name, k, FIRST_SEED, 1e-2) for k in depths for name in ("gd", "nag")]
        check_epoch(task, trials)
        calls, ensembles = {}, {}
        for backend in ("eager", "auto"):
            ensembles[backend] = ensemble = Ensemble(task, trials, Training(epochs=0))
            orders = ensemble.minibatch_orders(0)[: _EPOCHS[backend]]

            def call(ensemble=ensemble, orders=orders, backend=backend):
                with use_backend(backend):
                    ensemble.train(orders)

            calls[backend] = call
        peaks = []
        timings = in_turns(
            calls, device, rounds=5, min_seconds=0.1, between=lambda peaks=peaks: peaks.append(roofs.fma_rate(device))
        )
        eager, fused = (timings[name].p50 / (_EPOCHS[name] * len(trials)) for name in ("eager", "auto"))
        flops = sum(map(flops_of_epoch, trials)) / len(trials)
        yield {
            "task": "synthetic, ensemble of 34 models, Q spectral",
            "what": f"epoch of one model, hidden size {hidden}, mean over 17 depths of GD and NAG",
            "threads": 1,
            "eager_us": 1e6 * eager,
            "fused_us": 1e6 * fused,
            "flops": round(flops),
            "fma_gflop_s": f"{max(peaks) / 1e9:.1f}",
            "percent_of_roof": f"{100 * flops / max(peaks) / fused:.1f}",
        }
    torch.set_num_threads(threads)


def check_epoch(task, trials):
    """What is timed is right: the training losses after one epoch are as close to float64's as the eager loop's."""
    losses = {}
    for backend, dtype in (("auto", torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        with use_backend(backend):
            ensemble = Ensemble(task.to(dtype), trials, Training(epochs=0))
            ensemble.train(ensemble.minibatch_orders(0)[:1])
            losses[backend, dtype] = ensemble.training_loss()
    assert_as_close_as_eager(*losses.values(), what="training losses after one epoch")


def measure(device, directory=None):
    """``{"task", "what", "threads", "eager_us", "fused_us"}`` for the layer and the training step of each task."""
    task = generate().to(device)
    for row in speed.measure(task):
        yield {"task": f"synthetic, NAG, k = {speed.NUM_STEPS}, batch {speed.BATCH}", "threads": 1, **row}
    yield from model_epochs(task, device)
    clean = images.photographs() if directory is None else images.load_folder(directory)[0]
    for row in measurements.speed(DenoisingTask(clean), device):
        times = {f"{name}_us": 1e3 * row[f"{name}_ms"] for name in ("eager", "fused")}
        task = "denoising, about right, k = 12, 10 images of 180 x 180"
        yield {"task": task, "what": row["what"], "threads": torch.get_num_threads(), **times}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=suite.DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, help="folder of images (default: those of scikit-image)")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    where = {name: value for name, value in harness.environment(options.device).items() if name in COLUMNS}
    rows = []
    for row in measure(options.device, options.data):
        rows.append(where | row | {name: f"{row[name]:.1f}" for name in ("eager_us", "fused_us")})
        eager, fused = row["eager_us"], row["fused_us"]
        print(f"{row['task']}: {row['what']}: eager {eager:.0f} µs, fused {fused:.0f} µs ({eager / fused:.1f}x)")
    if options.record:
        file = harness.results_directory(options.device) / "training.csv"
        print(f"wrote {harness.write_csv(file, rows, COLUMNS)}")


if __name__ == "__main__":
    main()
