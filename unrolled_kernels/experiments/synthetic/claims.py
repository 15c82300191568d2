"""The paper's claims of Sec. 7.1 in words, with the numbers of a run and a plain verdict."""

import math

import numpy as np
import pandas as pd
import torch

from unrolled_kernels.experiments.figures import CASES
from unrolled_kernels.experiments.synthetic import comparison
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.experiments.synthetic.data import B_MAX, DIM, MU, L
from unrolled_kernels.theory.bounds import predicted_gap
from unrolled_kernels.theory.properties import convergence_rate

# deeper, the network's own error is what is left of ‖Q_θ - Q*‖², whatever the algorithm
_LAST_FITTED = 10
# a rank correlation over k from which on a claim about a trend counts as seen in a run
_STRONG = 0.7
# a share of pairs from which on a claim about all of them counts as seen in a run
NEARLY_ALL = 0.9


def check(best):
    """Every claim that the rows can decide.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), from ``grid.select_best``.
    Returns:
        A list of sentences.
    """
    lemmas = comparison.claims(best, mu=MU, L=L, sigma_b=B_MAX / math.sqrt(3), M=B_MAX * math.sqrt(DIM) / MU)
    return [*_training_error(best), *_q_error(best), *_gap_trend(best), *_gap_order(best), *lemmas]


def q_error_rates(best):
    """C ρ^k fitted to P‖Q_θ - Q*‖²_F and, over the same depths, to Cvg(k)², the rate of Lemma 4.2.

    Args:
        best: as in ``check``.
    Returns:
        A DataFrame: hidden, algorithm, first and last fitted depth, rate, theory; empty where depths are too few.
    """
    rows = []
    # after one step from zero nothing depends on Q
    fitted = best[best["num_steps"].between(2, _LAST_FITTED)]
    for (hidden, algorithm), part in fitted.groupby(["hidden", "algorithm"]):
        error = part.groupby("num_steps")["qfro2_test"].mean()
        if len(error) < 3:
            continue
        k = torch.tensor(error.index.to_numpy())
        cvg2 = convergence_rate(algorithm, k, float(part["step_size"].mean()), MU) ** 2
        rates = [math.exp(np.polyfit(k, np.log(v), 1)[0]) for v in (error.to_numpy(), cvg2.numpy())]
        rows.append([hidden, algorithm, k[0].item(), k[-1].item(), *rates])
    return pd.DataFrame(rows, columns=["hidden", "algorithm", "first", "last", "rate", "theory"])


def pairs(rows, *algorithms):
    """The rows of two algorithms, aligned by k and seed."""
    first, second = (rows[rows["algorithm"] == name].set_index(["num_steps", "seed"]) for name in algorithms)
    return first.align(second, join="inner")


def _deep_pairs(best, hidden):
    """GD's and NAG's rows of one hidden size at k > 1, where they differ; None where there are no pairs."""
    gd, nag = pairs(best[(best["hidden"] == hidden) & (best["num_steps"] > 1)], "gd", "nag")
    return None if gd.empty else (gd, nag)


def _training_error(best):
    for hidden in sorted(best["hidden"].unique()):
        both = _deep_pairs(best, hidden)
        if both is None:
            continue
        gd, nag = both
        lower = (nag["train"] < gd["train"]).mean()
        yield (
            f"Figure 3, hidden size {hidden}, faster convergence ⇒ lower training error: "
            f"{verdict(lower > NEARLY_ALL)}. NAG trains to a lower error than GD at the same k > 1 and seed in "
            f"{lower:.0%} of {len(gd)} pairs."
        )


def _q_error(best):
    for row in q_error_rates(best).itertuples():
        # the exponent decides: rates near 1 all look alike
        close = abs(math.log(row.rate) / math.log(row.theory) - 1) < 0.25
        yield (
            f"Figure 4, hidden size {row.hidden}, {row.algorithm.upper()}, ‖Q_θ − Q*‖² falls at the algorithm's rate: "
            f"{verdict(close)}. From k = {row.first} to {row.last} the error falls by a factor of {row.rate:.3f} a "
            f"step, Cvg(k)² by {row.theory:.3f} (both fitted to C ρ^k)."
        )


def _gap_trend(best):
    for (hidden, algorithm), part in best.groupby(["hidden", "algorithm"]):
        gap = part.groupby("num_steps")["gap"].mean()
        regime = REGIME_OF_HIDDEN.get(hidden)
        if regime is None or len(gap) < 4:
            continue
        k, step_size = torch.tensor(gap.index.to_numpy()), float(part["step_size"].mean())
        like = {
            "Stab": predicted_gap(algorithm, k, "over", step_size, MU),
            "Stab·Cvg": predicted_gap(algorithm, k, "about_right", step_size, MU),
        }
        ranks = {name: gap.corr(pd.Series(v.numpy(), gap.index), method="spearman") for name, v in like.items()}
        predicted = "Stab·Cvg" if regime == "about_right" else "Stab"
        holds = ranks[predicted] > _STRONG and ranks[predicted] == max(ranks.values())
        yield (
            f"Figure 5, {CASES[regime]}, {algorithm.upper()}, the gap moves with k like {predicted}: "
            f"{verdict(holds)}. Its rank correlation over k is {ranks['Stab']:+.2f} with Stab and "
            f"{ranks['Stab·Cvg']:+.2f} with Stab·Cvg."
        )


def _gap_order(best):
    for hidden in sorted(best["hidden"].unique()):
        both = _deep_pairs(best, hidden)
        if both is None:
            continue
        gd, nag = both
        wider = nag["gap"] - gd["gap"]
        by_depth = wider.groupby("num_steps").mean()
        larger = ", ".join(str(k) for k in by_depth.index[by_depth > 0]) or "none"
        yield (
            f"Figure 5, hidden size {hidden}: NAG's gap is larger than GD's in {(wider > 0).mean():.0%} of {len(gd)} "
            f"pairs (mean difference {wider.mean():+.3f}), on average over the seeds at k = {larger}."
        )


def verdict(holds):
    return "holds" if holds else "does not hold"
