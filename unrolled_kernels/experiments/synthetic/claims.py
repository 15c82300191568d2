"""The paper's claims of Sec. 7.1 against a run: a number with its interval over seeds, and a verdict that reads it.

A verdict is "holds" or "does not hold" where the whole interval says so, else "undecided". The gap is compared with the
theory after the control variate: the gap of the same layer on the true Q*, which is sampling alone, is taken off.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from unrolled_kernels.experiments import report
from unrolled_kernels.experiments.figures import CASES, NAMES
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN, lemma_table
from unrolled_kernels.experiments.synthetic.data import B_MAX, DIM, MU, L
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS
from unrolled_kernels.experiments.synthetic.statistics import (
    factor,
    rank_correlation,
    rate_above_floor,
    resampled,
    seed_table,
)
from unrolled_kernels.theory.bounds import predicted_gap, predicted_order
from unrolled_kernels.theory.properties import convergence_rate

# σ_b and M of the task: b uniform on [-5, 5]⁵
CONSTANTS = {"mu": MU, "L": L, "sigma_b": B_MAX / math.sqrt(3), "M": B_MAX * math.sqrt(DIM) / MU}
# of three eigenvalues in [μ, L] of a known sum, the farthest apart: the largest ‖Q_θ - Q*‖²_F that there is
LARGEST_Q_ERROR = 2 * (L - MU) ** 2
# a share of pairs from which on a claim about all of them counts as seen in a run
NEARLY_ALL = 0.9
# how far a rate may be from those of Cvg and of Cvg², Lemma 4.2's, as a power of Cvg
_NEAR = 0.25
# what the gap is like, and the regime in which the theory says so
LIKE = {"Stab": "over", "Stab·Cvg": "about_right"}


class Claim(NamedTuple):
    """A row of the table: what is claimed of a case and an algorithm, what was measured, and the verdict."""

    figure: str
    case: str
    algorithm: str
    claim: str
    measured: str
    verdict: str


def check(best):
    """Every claim that the rows can decide.

    Args:
        best: one row for each (hidden, algorithm, num_steps, seed), from ``grid.select_best``.
    Returns:
        A list of ``Claim``; they are about the paper's two algorithms.
    """
    best, claims = best[best["algorithm"].isin(ALGORITHMS)], []
    for hidden, rows in best.groupby("hidden"):
        case = REGIME_OF_HIDDEN.get(hidden)
        name = f"{hidden}, {CASES[case]}" if case else str(hidden)
        claims += [*_training_error(name, rows), *_q_error(name, rows)]
        if case:
            claims += [*_gap_trend(name, case, rows), *_gap_order(name, case, rows), *_law(name, case, rows)]
    if not best.empty:
        claims += _lemmas(best)
    return sorted(claims, key=lambda claim: claim.figure)


def table(claims):
    """The claims as a Markdown table."""
    head = "figure", "hidden size, case", "algorithm", "the paper's claim", "measured [95 % over seeds]", "verdict"
    return report.table(head, claims, left=len(head))


def verdict(low, high, threshold):
    """Whether a quantity is above a threshold, where its interval tells."""
    return "holds" if low > threshold else "does not hold" if high <= threshold else "undecided"


def controlled_gap(rows):
    """The gap less that of the same layer on Q*: the mean is the same, and what of it is sampling alone is gone."""
    return rows["gap"] - (rows["true_test"] - rows["true_train"])


def prediction(algorithm, depths, regime):
    """What the gap is predicted to be proportional to, ``[k]``; φ = 1 as in the study."""
    return predicted_gap(algorithm, torch.tensor(depths), regime, 1.0, MU).numpy()


def law(rows, regime):
    """gap = c · prediction with one c for all algorithms and depths k > 1: c and R², two ``Interval``s."""
    values, algorithms, k = _gaps(rows)
    predicted = np.concatenate([prediction(name, k, regime) for name in algorithms])
    flat = values.reshape(len(values), -1)
    return [resampled(flat, lambda x, i=i: factor(x.mean(1), predicted)[i]) for i in (0, 1)]


def _gaps(rows):
    """Controlled gaps ``[seeds, algorithms, k]`` at k > 1: after one step from zero nothing depends on Q."""
    return seed_table(rows[rows["num_steps"] > 1].assign(gap=controlled_gap), "gap")


def _training_error(case, rows):
    values, algorithms, _ = seed_table(rows[rows["num_steps"] > 1], "train")
    if algorithms != ["gd", "nag"] or not values.size:
        return
    lower = (values[:, 1] < values[:, 0]).astype(float)
    share = resampled(lower, lambda x: x.mean((1, 2)))
    yield Claim(
        "3",
        case,
        "NAG against GD",
        "faster convergence ⇒ lower training error",
        f"lower in {share.value:.0%} of {lower.size} pairs [{share.low:.0%}, {share.high:.0%}]",
        verdict(share.low, share.high, NEARLY_ALL),
    )


def _q_error(case, rows):
    values, algorithms, k = seed_table(rows[rows["num_steps"] > 1], "qfro2_test")
    # floor, factor and rate need more than three points
    if len(k) < 5:
        return
    for values_of, algorithm in zip(values.swapaxes(0, 1), algorithms, strict=True):
        rate = resampled(values_of, lambda x: rate_above_floor(np.median(x, 1), k))
        cvg = convergence_rate(algorithm, torch.tensor(k), 1.0, MU).numpy()
        once = math.exp(np.polyfit(k, np.log(cvg), 1)[0])
        power, high, low = (math.log(r) / math.log(once) for r in rate)
        inside = low >= 1 - _NEAR and high <= 2 + _NEAR
        outside = high < 1 - _NEAR or low > 2 + _NEAR
        yield Claim(
            "4",
            case,
            NAMES[algorithm],
            "‖Q_θ − Q*‖² falls at a rate like the algorithm's, Cvg to Cvg²",
            f"ρ = {rate} above a floor: like Cvg to the power {power:.1f} [{low:.1f}, {high:.1f}]",
            "holds" if inside else "does not hold" if outside else "undecided",
        )


def _gap_trend(case, regime, rows):
    values, algorithms, k = _gaps(rows)
    if len(k) < 4:
        return
    predicted = "Stab·Cvg" if regime == "about_right" else "Stab"
    (other,) = LIKE.keys() - {predicted}
    for values_of, algorithm in zip(values.swapaxes(0, 1), algorithms, strict=True):
        like = {name: prediction(algorithm, k, of) for name, of in LIKE.items()}
        ranks = {name: resampled(values_of, lambda x, p=p: rank_correlation(x.mean(1), p)) for name, p in like.items()}
        lead = resampled(
            values_of,
            lambda x, like=like: (
                rank_correlation(x.mean(1), like[predicted]) - rank_correlation(x.mean(1), like[other])
            ),
        )
        # a seed that ends in a bad minimum outweighs all others in a mean
        middle = {name: rank_correlation(np.median(values_of, 0), p) for name, p in like.items()}
        yield Claim(
            "5",
            case,
            NAMES[algorithm],
            f"the gap moves with k like {predicted}",
            f"rank correlation {ranks[predicted]} with {predicted}, {ranks[other]} with {other}; "
            f"of the median over seeds {middle[predicted]:.2f} and {middle[other]:.2f}",
            verdict(lead.low, lead.high, 0),
        )


def _gap_order(case, regime, rows):
    values, algorithms, k = _gaps(rows)
    if algorithms != ["gd", "nag"] or not values.size:
        return
    predicted = predicted_order(torch.tensor(k), regime, 1.0, MU).numpy()
    signs = []
    for i in range(len(k)):
        wider = resampled(values[:, 1, i] - values[:, 0, i], lambda x: x.mean(1))
        signs.append(int(wider.low > 0) - int(wider.high < 0))
    agrees, against = (np.sum(np.array(signs) == sign * predicted) for sign in (1, -1))
    yield Claim(
        "5",
        case,
        "NAG against GD",
        "whose gap is larger, by the same prediction",
        f"of {len(k)} depths as predicted at {agrees}, the other way at {against}, undecided at "
        f"{len(k) - agrees - against}",
        "holds" if agrees > 0 == against else "does not hold" if against > agrees else "undecided",
    )


def _law(case, regime, rows):
    if len(_gaps(rows)[2]) < 4:
        return
    c, explained = law(rows, regime)
    predicted = "Stab·Cvg" if regime == "about_right" else "Stab"
    yield Claim(
        "5",
        case,
        "both",
        f"gap = c · {predicted}, one c",
        f"c = {c.value:.3f} [{c.low:.3f}, {c.high:.3f}], R² = {explained}",
        verdict(explained.low, explained.high, 0.5),
    )


def _lemmas(best):
    lemmas = lemma_table(best, **CONSTANTS)
    for number, left, right, trivial in (
        ("4.1", "loss", "loss_bound", None),
        ("4.2", "q_error", "q_error_bound", LARGEST_Q_ERROR),
    ):
        known = lemmas.dropna(subset=right)
        if known.empty:
            continue
        holds, slack = (known[left] <= known[right]).mean(), (known[right] / known[left]).median()
        says = "" if trivial is None else f"; says something in {(known[right] < trivial).sum()} models"
        yield Claim(
            f"Lemma {number}",
            "all",
            "both",
            "left ≤ right",
            f"in {holds:.0%} of {len(known)} models, right/left {slack:.3g} in the middle{says}",
            "holds" if holds == 1 else "does not hold",
        )
