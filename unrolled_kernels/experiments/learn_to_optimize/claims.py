"""The paper's finding about RNNs in words, with the numbers of a run and a plain verdict."""

from unrolled_kernels.experiments.synthetic.claims import NEARLY_ALL, pairs, verdict


def check(best):
    """Figure 6, "RNN has a better representation power but worse generalization ability", paired by k and seed.

    Args:
        best: one row for each (algorithm, num_steps, seed), from ``grid.select_best``.
    Returns:
        A list of sentences.
    """
    sentences = []
    for other in ("gd", "nag"):
        rnn, plain = pairs(best, "rnn", other)
        if rnn.empty:
            continue
        name = other.upper()
        represents, generalizes_worse, tests_worse = (
            rnn[column] * sign < plain[column] * sign for column, sign in (("train", 1), ("gap", -1), ("test", -1))
        )
        sentences += [
            f"Figure 6, the RNN represents better than {name}: {verdict(represents.mean() > NEARLY_ALL)}. Its "
            f"training error is lower {_share(represents)}.",
            f"Figure 6, the RNN generalizes worse than {name}: {verdict(generalizes_worse.mean() > NEARLY_ALL)}. Its "
            f"generalization gap is larger {_share(generalizes_worse)}.",
            f"What counts in the end, the error on all samples: the RNN's is larger than {name}'s "
            f"{_share(tests_worse)}.",
        ]
    return sentences


def _share(holds):
    """How often a comparison of pairs holds, and at which k it does in most seeds."""
    by_depth = holds.groupby("num_steps").mean()
    chosen = by_depth.index[by_depth > 0.5]
    depths = {0: "at no k", len(by_depth): "at every k"}.get(len(chosen), f"at k = {', '.join(map(str, chosen))} only")
    return f"in {holds.mean():.0%} of {len(holds)} pairs, in most seeds {depths}"
