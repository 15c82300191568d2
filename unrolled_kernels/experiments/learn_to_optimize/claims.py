"""The paper's finding about RNNs against a run: shares of pairs with their intervals over seeds, and verdicts."""

from unrolled_kernels.experiments.figures import NAMES
from unrolled_kernels.experiments.synthetic.claims import NEARLY_ALL, Claim, verdict
from unrolled_kernels.experiments.synthetic.statistics import resampled, seed_table

_CLAIMS = {
    "train": ("represents better: lower training error", 1),
    "gap": ("generalizes worse: larger gap", -1),
    "test": ("what counts in the end: larger test error", -1),
}


def check(best):
    """Figure 6, "RNN has a better representation power but worse generalization ability", paired by k and seed.

    Args:
        best: one row for each (algorithm, num_steps, seed), from ``select_best``.
    Returns:
        A list of ``Claim``; empty without an RNN.
    """
    claims = []
    for other in ("gd", "nag"):
        rows = best[best["algorithm"].isin(["rnn", other])]
        if rows["algorithm"].nunique() < 2:
            continue
        for column, (claim, sign) in _CLAIMS.items():
            values, algorithms, k = seed_table(rows, column)
            rnn, plain = (values[:, algorithms.index(name)] for name in ("rnn", other))
            better = (sign * (rnn - plain) < 0).astype(float)
            share = resampled(better, lambda x: x.mean((1, 2)))
            depths = k[better.mean(0) > 0.5].tolist()
            where = "every k" if len(depths) == len(k) else f"k = {', '.join(map(str, depths))}" if depths else "no k"
            claims.append(
                Claim(
                    "6",
                    "Q and b given",
                    f"RNN against {NAMES[other]}",
                    claim,
                    f"in {share.value:.0%} of {better.size} pairs [{share.low:.0%}, {share.high:.0%}], in most seeds "
                    f"at {where}",
                    verdict(share.low, share.high, NEARLY_ALL),
                )
            )
    return claims
