"""Training steps of the paper's two tasks, end to end: with the eager loop and with the fused layer, all else equal.

    python -m benchmarks.training [--device cpu|cuda] [--data DIR] [--record]

The experiments measure themselves (their reports show the same numbers); this writes them down beside the others.
"""

import argparse
from pathlib import Path

from benchmarks import harness, suite
from unrolled_kernels.experiments.denoising import images, measurements
from unrolled_kernels.experiments.denoising.data import DenoisingTask
from unrolled_kernels.experiments.synthetic import speed
from unrolled_kernels.experiments.synthetic.data import generate

COLUMNS = (
    "task",
    "what",
    "eager_us",
    "fused_us",
    "threads",
    "device",
    "torch",
    "commit",
    "kernel_sources_sha256",
    "date",
)


def measure(device, directory=None):
    """``{"task", "what", "eager_us", "fused_us"}`` for the layer and the training step of each task."""
    for row in speed.measure(generate().to(device)):
        yield {"task": f"synthetic, NAG, k = {speed.NUM_STEPS}, batch {speed.BATCH}, one thread", **row}
    clean = images.photographs() if directory is None else images.load_folder(directory)[0]
    for row in measurements.speed(DenoisingTask(clean), device):
        times = {f"{name}_us": 1e3 * row[f"{name}_ms"] for name in ("eager", "fused")}
        yield {"task": "denoising, about right, k = 12, 10 images of 180 x 180", "what": row["what"], **times}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=suite.DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, help="folder of images (default: those of scikit-image)")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/<device>/, to be committed")
    options = parser.parse_args(arguments)
    where = {name: value for name, value in harness.environment(options.device).items() if name in COLUMNS}
    rows = []
    for row in measure(options.device, options.data):
        rows.append({**row, "eager_us": f"{row['eager_us']:.1f}", "fused_us": f"{row['fused_us']:.1f}", **where})
        eager, fused = row["eager_us"], row["fused_us"]
        print(f"{row['task']}: {row['what']}: eager {eager:.0f} µs, fused {fused:.0f} µs ({eager / fused:.1f}x)")
    if options.record:
        file = harness.results_directory(options.device) / "training.csv"
        print(f"wrote {harness.write_csv(file, rows, COLUMNS)}")


if __name__ == "__main__":
    main()
