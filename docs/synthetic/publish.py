"""Every figure, table and number of docs/synthetic, from the tables in docs/synthetic/results.

``--collect NAME RUN…`` first writes the models of some runs, a row each, to ``results/NAME.parquet``.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd

from unrolled_kernels.experiments import report
from unrolled_kernels.experiments.figures import NAMES, save
from unrolled_kernels.experiments.learn_to_optimize import claims as learned_claims
from unrolled_kernels.experiments.learn_to_optimize.command import figure6
from unrolled_kernels.experiments.learn_to_optimize.grid import PRESETS as LEARNED
from unrolled_kernels.experiments.run_directory import atomic_path
from unrolled_kernels.experiments.synthetic import beyond, choice, claims, figures
from unrolled_kernels.experiments.synthetic.data import DIM, MU, NUM_TRAIN, L, load_reference
from unrolled_kernels.experiments.synthetic.grid import PRESETS, Trial, select_best
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS
from unrolled_kernels.experiments.synthetic.statistics import rank_correlation, resampled, seed_table
from unrolled_kernels.experiments.synthetic.transfer import at_other_depths
from unrolled_kernels.experiments.theory import figures as theory
from unrolled_kernels.experiments.theory import report as properties

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER / "README.md", FOLDER / "learn_to_optimize.md"
# the paper's grid, of which the tables say what was run
_BUDGETS = 5, 10, 20, 30
_TRANSFER, _TRANSFER_HIDDEN = (2, 4, 6, 10, 14, 20, 30), 16


def collect(name, runs):
    """Merge the results of runs into one table, and say where it went."""
    tables = []
    for run in runs:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        table = pd.read_parquet(run / "results.parquet").drop(columns="weights", errors="ignore")
        tables.append(table.assign(num_train=settings.get("num_train", NUM_TRAIN)))
    table = pd.concat(tables, ignore_index=True)
    keys = identity(table)
    table = table.drop_duplicates(keys).sort_values(keys)
    for column in table.select_dtypes("float64"):
        if column != "learning_rate":
            table[column] = table[column].astype("float32")
    file = FOLDER / "results" / f"{name}.parquet"
    file.parent.mkdir(exist_ok=True)
    with atomic_path(file) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")
    return file


def identity(table):
    """The columns of a table that say which model a row is."""
    return [column for column in ("num_train", *Trial.__dataclass_fields__) if column in table]


def read(name):
    """The rows of ``results/NAME.parquet``."""
    return pd.read_parquet(FOLDER / "results" / f"{name}.parquet")


def sections():
    """The text of every generated section by its name."""
    tables = {name: read(name) for name in ("authors", "second")}
    best = {name: select_best(table) for name, table in tables.items()}
    text = {f"{name}-models": models(table) for name, table in tables.items()}
    text |= {f"{name}-claims": claims.table(claims.check(rows)) for name, rows in best.items()}
    text["optimizers"] = optimizers(tables["authors"])
    text["factors"] = factors(best)
    text["regret"] = regret(best, read("map"), read("chebyshev"))
    text["map"] = regime_map(read("map"))
    text["transfer"] = transferred(read("transfer"))
    text["beyond"] = beyond.table(further(tables["authors"]))
    text |= {f"learned-{name}": part for name, part in learned(read("learn_to_optimize")).items()}
    return text


def optimizers(table):
    """Whether SGD is ever chosen, where both were trained."""
    lines = []
    for hidden, rows in table.groupby("hidden"):
        if rows["optimizer"].nunique() < 2:
            continue
        chosen = select_best(rows)
        keys = ["algorithm", "num_steps", "seed"]
        adam, sgd = (select_best(rows[rows["optimizer"] == name]).set_index(keys)["train"] for name in ("adam", "sgd"))
        ratio = sgd / adam
        lines.append(
            [
                hidden,
                len(chosen),
                int((chosen["optimizer"] == "sgd").sum()),
                f"{ratio.median():.3f}",
                f"{ratio.max():.2f}",
            ]
        )
    head = "hidden size", "choices", "of SGD", "SGD's training loss over Adam's, median", "largest"
    return report.table(head, lines)


def further(authors):
    """Rows of further algorithms, and of the paper's two that were trained as they were."""
    table = read("beyond")
    same = authors[authors["algorithm"].isin(ALGORITHMS)]
    for column in ("hidden", "optimizer", "learning_rate", "seed", "num_steps"):
        same = same[same[column].isin(table[column])]
    return select_best(pd.concat([same, table], ignore_index=True))


def learned(table):
    """Learning to optimize: what was trained, the paper's finding, and what every algorithm ends with."""
    best = select_best(table)
    head = "algorithm", "layers", "seeds", "depths", "epochs", "learning rates"
    lines = []
    for algorithm, rows in table.groupby("algorithm"):
        rates = ", ".join(f"{rate:g}" for rate in sorted(rows["learning_rate"].unique(), reverse=True))
        epochs = f"{rows['epochs'].max():,}".replace(",", " ")
        lines.append([NAMES[algorithm], len(rows), rows["seed"].nunique(), rows["num_steps"].nunique(), epochs, rates])
    whole = len(LEARNED["paper"].trials())
    results = []
    for k, rows in best.groupby("num_steps"):
        cells = [
            f"{of[column].median():.3g}" if len(of) else ""
            for column in ("train", "test")
            for of in (rows[rows["algorithm"] == name] for name in ("gd", "nag", "rnn"))
        ]
        results.append([k, *cells])
    columns = ("k", *(f"{what}, {NAMES[name]}" for what in ("train", "test") for name in ("gd", "nag", "rnn")))
    phi = best[best["algorithm"] != "rnn"].groupby("algorithm")["step_size"].agg(["min", "max"])
    ends = [f"{NAMES[name]} {row['min']:.2f} to {row['max']:.2f}" for name, row in phi.iterrows()]
    return {
        "models": f"{len(table)} of the protocol's {whole} layers:\n\n" + report.table(head, lines, left=1),
        "claims": claims.table(learned_claims.check(best)),
        "results": report.table(columns, results),
        "step-sizes": f"Learned φ: {'; '.join(ends)}.",
    }


def models(table):
    """What was trained, and what of the paper's protocol was not."""
    paper = PRESETS["paper"]
    lines = []
    for hidden, rows in table.groupby("hidden"):
        lines.append(
            [
                hidden,
                len(rows),
                rows["seed"].nunique(),
                rows["num_steps"].nunique(),
                f"{rows['epochs'].max():,}".replace(",", " "),
                ", ".join(rows["optimizer"].map({"adam": "Adam", "sgd": "SGD"}).unique()),
                ", ".join(f"{rate:g}" for rate in sorted(rows["learning_rate"].unique(), reverse=True)),
            ]
        )
    whole = len(paper.trials())
    head = "hidden size", "models", "seeds", "depths", "epochs", "optimizer", "learning rates"
    return f"{len(table)} of the protocol's {whole} models:\n\n" + report.table(head, lines)


def factors(best):
    """The law's one factor on both data sets."""
    lines = []
    for name, rows in best.items():
        for hidden, of_hidden in rows.groupby("hidden"):
            regime = claims.REGIME_OF_HIDDEN[hidden]
            c, explained = claims.law(of_hidden, regime)
            what = "Stab·Cvg" if regime == "about_right" else "Stab"
            lines.append(
                [name, hidden, what, f"{c.value:.4f} [{c.low:.4f}, {c.high:.4f}]", explained,
                 f"{choice.gap_factor(of_hidden, regime):.3f}"]
            )  # fmt: skip
    return report.table(("data", "hidden size", "gap like", "c", "R²", "g"), lines, left=3)


def regret(best, other_sizes, chebyshev):
    """The advice fitted to the authors' data, on the second Q* and on other numbers of training samples."""
    tables = {n: select_best(rows) for n, rows in other_sizes.groupby("num_train")}
    # trained as the map was, but for the hidden size that it does not have at this n
    there = best["second"]["hidden"].isin(tables[NUM_TRAIN]["hidden"])
    tables[NUM_TRAIN] = pd.concat([tables[NUM_TRAIN], best["second"][~there]], ignore_index=True)
    names = "advice", "advice, GD and NAG", "chebyshev", "nag", "gd"
    show = lambda point: f"{NAMES[point[0]]}, {point[1]}"
    lines, regrets = [], []
    for num_train, rows in tables.items():
        third = select_best(chebyshev[chebyshev["num_train"] == num_train])
        rows = pd.concat([rows[rows["seed"].isin(third["seed"])], third], ignore_index=True)
        for row in choice.validate(best["authors"], rows, num_train, _BUDGETS):
            regrets.append([row["regrets"].get(name, math.nan) for name in names])
            chosen = show(row["choices"]["advice"]), show(row["best"]), f"{row['smallest']:.3f}"
            cells = ["" if math.isnan(value) else f"{value:.3f}" for value in regrets[-1]]
            lines.append([num_train, row["hidden"], row["budget"], *chosen, *cells])
    mean = pd.DataFrame(regrets).mean()
    lines.append(["mean", "", "", "", "", "", *(f"**{value:.3f}**" for value in mean)])
    head = (
        "n",
        "hidden size",
        "steps",
        "advice",
        "best",
        "its test error",
        "regret of the advice",
        "of GD and NAG alone",
    )
    return report.table((*head, "Chebyshev, all", "NAG, all", "GD, all"), lines)


def regime_map(table):
    """How the gap moves with k for each width and number of training samples."""
    lines = []
    for (num_train, hidden), rows in table.groupby(["num_train", "hidden"]):
        values, algorithms, k = seed_table(rows[rows["num_steps"] > 1].assign(gap=claims.controlled_gap(rows)), "gap")
        cells, seen = [], set()
        for of_algorithm, algorithm in zip(values.swapaxes(0, 1), algorithms, strict=True):
            ranks = {
                name: resampled(
                    of_algorithm,
                    lambda x, of=of, a=algorithm, k=k: rank_correlation(x.mean(1), claims.prediction(a, k, of)),
                )
                for name, of in claims.LIKE.items()
            }
            cells += [f"{ranks[name].value:+.2f}" for name in claims.LIKE]
            leader = max(ranks, key=lambda name: ranks[name].value)
            (other,) = ranks.keys() - {leader}
            seen.add(leader if ranks[leader].low > ranks[other].high else "undecided")
        lines.append([num_train, hidden, rows["seed"].nunique(), *cells, " / ".join(sorted(seen))])
    head = "n", "hidden size", "seeds", *(f"{a}: {like}" for a in ("GD", "NAG") for like in claims.LIKE), "gap like"
    return report.table(head, lines)


def transferred(table):
    """Mean test error over the seeds, trained with k steps (rows) and run with k′ (columns)."""
    depths = sorted(table["run_steps"].unique())
    lines = []
    for (algorithm, hidden, k), rows in table.groupby(["algorithm", "hidden", "num_steps"]):
        mean = rows.groupby("run_steps")["test"].mean()
        # what was trained for this depth, and the best of the column
        cells = [f"**{mean[depth]:.2f}**" if depth == k else f"{mean[depth]:.2f}" for depth in depths]
        lines.append([NAMES[algorithm], hidden, k, *cells])
    return report.table(
        ("algorithm", "hidden size", "trained with k", *(f"run with {d}" for d in depths)), lines, left=1
    )


def transfer_table(runs):
    """``results/transfer.parquet``: networks of some runs on the authors' data, hidden size 16, at other depths."""
    settings = [json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"] for run in runs]
    (source,) = {found["data"] for found in settings}
    best = select_best(pd.concat([pd.read_parquet(run / "results.parquet") for run in runs], ignore_index=True))
    chosen = best[best["num_steps"].isin(_TRANSFER) & (best["hidden"] == _TRANSFER_HIDDEN)]
    table = at_other_depths(load_reference(source), chosen, _TRANSFER)
    file = FOLDER / "results" / "transfer.parquet"
    with atomic_path(file) as temporary:
        table.astype({"test": "float32"}).to_parquet(temporary, index=False, compression="zstd")
    return file


def theory_figures():
    """Figure 2, and Theorem 5.1 for three classes of networks, on the study's task."""
    problem = {"num_samples": NUM_TRAIN, "radius": 0.0, "dim": DIM, **claims.CONSTANTS}
    table = pd.concat([properties.property_table(name, 30, 1.0, MU, L, num_samples=500) for name in ("gd", "nag")])
    curves = properties.theorem_curves(30, 1.0, **problem)
    return {"figure2_trends": theory.figure2(table), "theorem_bound": theory.theorem(curves)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", nargs="+", metavar=("NAME", "RUN"), action="append", default=[])
    parser.add_argument("--transfer", nargs="+", metavar="RUN", help="runs whose networks are run at other depths")
    arguments = parser.parse_args(argv)
    for name, *runs in arguments.collect:
        print(collect(name, [Path(run) for run in runs]))
    if arguments.transfer:
        print(transfer_table([Path(run) for run in arguments.transfer]))
    report.fill(PAGES, sections())
    for name in ("authors", "second"):
        directory = FOLDER / name
        directory.mkdir(exist_ok=True)
        for path in figures.draw(select_best(read(name)), directory):
            print(path)
    drawn = theory_figures() | {"beyond": beyond.figure(further(read("authors")))}
    drawn["figure6"] = figure6(select_best(read("learn_to_optimize")))
    for path in save(drawn, FOLDER):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
