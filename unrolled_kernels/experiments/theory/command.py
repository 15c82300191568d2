"""``unrolled-kernels theory``: the tables and figures of the paper's theory, checked with the layers."""

import argparse
import math
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from unrolled_kernels.experiments.figures import save
from unrolled_kernels.experiments.options import environment, resolve_device
from unrolled_kernels.experiments.report import table, write
from unrolled_kernels.experiments.run_directory import RunDirectory
from unrolled_kernels.experiments.synthetic import claims, comparison
from unrolled_kernels.experiments.synthetic.data import B_MAX, DIM, NUM_TRAIN
from unrolled_kernels.experiments.synthetic.grid import select_best
from unrolled_kernels.experiments.theory import figures, report
from unrolled_kernels.theory import empirical
from unrolled_kernels.theory.properties import ALGORITHMS, stable_region


def add_arguments(parser):
    """Describe the subcommand."""
    parser.description = (
        "Print Tables 1 and 2 of the paper in numbers beside what the layers reach, fit the orders in k, and draw "
        "Figure 2 and the bound of Theorem 5.1. With --results, set the predictions beside trained models."
    )
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--mu", type=float, default=0.1, help="smallest eigenvalue of the class")
    parser.add_argument("--L", type=float, default=1.0, help="largest eigenvalue of the class")
    parser.add_argument("--step-size", type=float, default=1.0, metavar="PHI")
    parser.add_argument("--num-steps", type=int, default=30, metavar="K", help="deepest layer")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="random energies of each measurement")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="a run of `unrolled-kernels synthetic`, to compare with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs") / "theory")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …")
    parser.set_defaults(run=run)


def run(arguments):
    """Measure, print, draw and report; see ``unrolled-kernels theory --help``."""
    device = resolve_device(arguments.device)
    _check_arguments(arguments)
    trained = None if arguments.results is None else _read_results(arguments.results)
    settings = {
        "mu": arguments.mu,
        "L": arguments.L,
        "step_size": arguments.step_size,
        "num_steps": arguments.num_steps,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "device": device.type,
    }
    directory = RunDirectory(arguments.out, settings, environment())
    properties, orders = _measure(directory, arguments, device)

    problem = {
        "num_samples": NUM_TRAIN,
        "radius": 0.0,
        "dim": DIM,
        "mu": arguments.mu,
        "L": arguments.L,
        "sigma_b": B_MAX / math.sqrt(3),
        "M": B_MAX * math.sqrt(DIM) / arguments.mu,
    }
    drawn = {
        "figure2_trends": figures.figure2(properties),
        "theorem_bound": figures.theorem(report.theorem_curves(arguments.num_steps, arguments.step_size, **problem)),
    }
    sections = {
        "Table 1: theory and the largest value that the layers reached": report.anchors_markdown(properties),
        "Measured / bound, the largest over k": report.ratios_markdown(properties),
        "Orders in k: fits of C k^p ρ^k to the layers": report.orders_markdown(orders),
        "Table 2: RNN": report.rnn_markdown(arguments.mu, arguments.L),
    }
    if trained is not None:
        sections["Predictions beside trained models"] = claims.table(claims.check(trained))
        orders_there = comparison.order_table(trained, mu=arguments.mu)
        sections["Order of the gaps"] = _markdown(orders_there)
        drawn["gaps"] = figures.gaps(trained, step_size=arguments.step_size, mu=arguments.mu)

    paths = save(drawn, directory.path)
    report_file = directory.path / "report.md"
    sections["What is drawn"] = (
        "Lines are the theory, markers the layers. Theorem 5.1 is drawn for n = 100, d = 5, b uniform on [-5, 5]⁵, "
        "r = 0 and a fixed step size, for classes of Q_θ with the covering numbers N of two functions and of the "
        "smallest and the largest network of the study; above each, which addend of Eq. 15 decides its shape over k."
    )
    write(
        report_file,
        title="Properties of algorithm layers (paper, Sec. 3 to 5)",
        settings=settings,
        figures=paths,
        sections=sections,
    )
    for title, body in sections.items():
        print(f"\n{title}\n\n{body}")
    print()
    for path in (*paths, report_file, directory.results_file):
        print(path)
    return 0


def _measure(directory, arguments, device):
    """The property table, of which finished algorithms are taken from the directory, and the fits."""
    options = arguments.step_size, arguments.mu, arguments.L
    done = directory.results()
    orders = {}
    with tqdm(total=2 * len(ALGORITHMS), desc="measuring", leave=False) as bar:
        for algorithm in ALGORITHMS:
            if done.empty or algorithm not in set(done["algorithm"]):
                rows = report.property_table(
                    algorithm,
                    arguments.num_steps,
                    *options,
                    num_samples=arguments.samples,
                    seed=arguments.seed,
                    device=device,
                )
                directory.append(rows.to_dict("records"))
            bar.update()
            orders[algorithm] = empirical.measured_orders(algorithm, *options, device=device)
            bar.update()
    return directory.results(), orders


def _read_results(directory):
    file = directory / "results.parquet" if directory.is_dir() else directory
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --results takes the directory of a run of `synthetic`")
    try:
        results = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable results table (truncated, or of another kind): {error}") from None
    comparison.check_columns(results, file)
    return select_best(results)


def _markdown(frame):
    rows = ([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in frame.itertuples(index=False))
    return table(frame.columns, rows, left=len(frame.columns))


def _check_arguments(arguments):
    if not 0 < arguments.mu < arguments.L:
        raise ValueError(f"--mu, --L: expected 0 < mu < L, got {arguments.mu} and {arguments.L}")
    largest = stable_region("nag", arguments.mu, arguments.L)[1]
    if not 0 < arguments.step_size < largest:
        raise ValueError(
            f"--step-size: expected a value inside the stable region of both algorithms, (0, {largest:.6g}), "
            f"got {arguments.step_size}"
        )
    for name in ("num_steps", "samples"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
