"""Reproduce what the authors' released code reached on their own data: ``python -m …synthetic.golden --reference DIR``.

Trains every configuration of ``golden.csv`` on the authors' samples, from their weights and in their order, and
compares: the initial errors to 1e-4, then what training reached to the tolerances that come with the file. Deep layers
with a large learning rate are chaotic: for a row that misses, ``--spread N`` trains N copies whose initial weights
differ by float32's rounding and prints where these end.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from unrolled_kernels.experiments.run_directory import RunDirectory
from unrolled_kernels.experiments.synthetic import runner
from unrolled_kernels.experiments.synthetic.data import epoch_blocks
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.grid import Training, Trial

_RENAMED = {"algo": "algorithm", "k": "num_steps", "opt": "optimizer", "lr": "learning_rate"}
KEYS = list(Trial.__dataclass_fields__)
EPOCHS = 2000


def load_golden(directory):
    """The rows of ``directory/golden.csv`` at 2000 epochs, with this package's names of the columns.

    Raises:
        FileNotFoundError, ValueError: the file is missing or of another kind; the message names it.
    """
    file = Path(directory) / "golden.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --reference takes the folder that holds golden.csv")
    try:
        table = pd.read_csv(file).rename(columns=_RENAMED)
        return table[table["epochs"] == EPOCHS].reset_index(drop=True)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: not the authors' results (truncated, or of another kind): {error}") from None


def tolerances(num_steps):
    """The relative error that each column may have at depth ``num_steps``."""
    late = 0.05 if num_steps <= 5 else 0.15
    return {"init_train": 1e-4, "init_test": 1e-4, "train": 0.02, "test": late, "qspec_test": late}


def compare(golden, results):
    """Relative errors of results against golden, one row each, with ``passed``.

    Args:
        golden: rows from ``load_golden``.
        results: rows of a results table for the same trials.
    Returns:
        A DataFrame: the keys, an error for each column of ``tolerances``, and ``passed``.
    """
    both = golden.merge(results, on=KEYS, suffixes=("", "_got"), validate="one_to_one", how="left")
    columns = list(tolerances(1))
    errors = both[KEYS].copy()
    for column in columns:
        errors[column] = (both[f"{column}_got"] - both[column]).abs() / both[column].abs()
    # NaN, a row that is missing, does not pass
    errors["passed"] = [
        all(row[column] <= limit for column, limit in tolerances(row["num_steps"]).items())
        for row in errors.to_dict("records")
    ]
    return errors


def golden_trials(golden):
    """The trials of golden's rows, sorted."""
    return sorted(Trial(*point) for point in golden[KEYS].itertuples(index=False, name=None))


def rounding_spread(task, trial, training, copies):
    """The results of ``copies`` of a trial whose initial weights differ by float32's rounding, a DataFrame."""
    ensemble = Ensemble(task, [trial] * copies, training)
    noise = torch.randn(ensemble.theta.shape, generator=torch.Generator().manual_seed(0)).to(ensemble.theta)
    ensemble.theta *= 1 + torch.finfo(torch.float32).eps * noise
    for block, rows in epoch_blocks(0, training.epochs):
        ensemble.train(ensemble.minibatch_orders(block)[rows])
    return pd.DataFrame(ensemble.results())


def main(argv=None):
    """Train, print the table; exit code 1 if a row misses its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="holds reference.npz, golden.csv")
    parser.add_argument("--trainer", choices=("ensemble", "single"), default="ensemble")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--spread", type=int, metavar="N", help="for rows that miss, where N rounded copies end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the results here, and continue from them")
    arguments = parser.parse_args(argv)
    golden = load_golden(arguments.reference)
    setup = runner.Setup(
        training=Training(EPOCHS),
        reference=arguments.reference,
        device=arguments.device,
        backend=arguments.backend,
        trainer=arguments.trainer,
    )
    with tempfile.TemporaryDirectory() as temporary:
        settings = {"epochs": EPOCHS, "reference": str(arguments.reference.resolve()), "trainer": arguments.trainer}
        directory = RunDirectory(arguments.out or temporary, settings)
        runner.train_grid(setup, golden_trials(golden), directory, workers=arguments.workers)
        table = compare(golden, directory.results())
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2g}"))
    print(f"\n{table['passed'].sum()} of {len(table)} configurations within their tolerances")
    missed = table.loc[~table["passed"], KEYS]
    if arguments.spread and not missed.empty:
        task = setup.task()
        print(
            f"\nrows that miss: the authors' value, and the range over {arguments.spread} copies that start a float32 "
            "rounding apart"
        )
        for trial in golden_trials(missed):
            copies = rounding_spread(task, trial, setup.training, arguments.spread)
            reached = golden.merge(pd.DataFrame([vars(trial)]), on=KEYS).iloc[0]
            ranges = (
                f"{name} {reached[name]:.4g} in [{copies[name].min():.4g}, {copies[name].max():.4g}]"
                for name in ("train", "test", "qspec_test")
            )
            print(f"{trial.algorithm} k={trial.num_steps} hidden={trial.hidden} lr={trial.learning_rate}:", *ranges)
    return 0 if missed.empty else 1


if __name__ == "__main__":
    sys.exit(main())
