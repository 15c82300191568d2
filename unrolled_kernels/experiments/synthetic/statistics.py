"""Statistics over seeds: resamples, rank correlations over k, rates with a floor, and factors of a law.

Seeds are the unit of everything: which samples are drawn moves all models of a seed alike, so a resample draws seeds
with replacement and keeps every algorithm and depth of each together.
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
_RATES = np.linspace(0.2, 0.995, 319)


class Interval(NamedTuple):
    """An estimate and the middle 95 % of its resamples."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def seed_table(rows, column):
    """``column`` as an array ``[seeds, algorithms, k]``, and the labels of its axes.

    Args:
        rows: one row for each (algorithm, num_steps, seed) of one hidden size.
        column: its name.
    Returns:
        The array over the seeds and depths that every algorithm has, the algorithms, and k.
    """
    wide = rows.pivot_table(index="seed", columns=["algorithm", "num_steps"], values=column)
    algorithms = sorted(rows["algorithm"].unique())
    depths = sorted(set.intersection(*(set(wide[name].columns) for name in algorithms)))
    wide = wide[[(name, k) for name in algorithms for k in depths]].dropna()
    return wide.to_numpy().reshape(len(wide), len(algorithms), len(depths)), algorithms, np.array(depths)


def resampled(values, statistic, *, seed=0):
    """A statistic of the seeds, and its interval over resamples of them.

    Args:
        values: ``[seeds, ...]``.
        statistic: maps ``[resamples, seeds, ...]`` to ``[resamples]``.
    Returns:
        An ``Interval``.
    """
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.nanpercentile(statistic(values[draws]), [2.5, 97.5])
    return Interval(float(statistic(values[None])[0]), float(low), float(high))


def rank_correlation(values, prediction):
    """Spearman's correlation of each row of ``[..., k]`` with a prediction ``[k]``."""
    a, b = (_ranks(x) for x in (values, np.asarray(prediction)))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def factor(values, prediction):
    """c of values ≈ c · prediction by least squares, and R², for each row of ``[..., m]``."""
    c = (values * prediction).sum(-1) / (prediction * prediction).sum(-1)
    left = values - c[..., None] * prediction
    spread = values - values.mean(-1, keepdims=True)
    return c, 1 - (left * left).sum(-1) / (spread * spread).sum(-1)


def rate_above_floor(values, depths):
    """ρ of v ≈ floor + C ρ^k with floor, C ≥ 0, the fit of least relative error, for each row of ``[..., k]``."""
    weight = 1 / values  # relative errors
    best, rate = np.full(values.shape[:-1], np.inf), np.zeros(values.shape[:-1])
    for rho in _RATES:
        x, y = weight * rho ** (depths - depths[0]), np.ones_like(values)
        # the normal equations of [floor, C], then the edges floor = 0 and C = 0
        ww, wx, xx = (weight * weight).sum(-1), (weight * x).sum(-1), (x * x).sum(-1)
        wy, xy = (weight * y).sum(-1), (x * y).sum(-1)
        determinant = ww * xx - wx * wx
        floor, C = (wy * xx - xy * wx) / determinant, (ww * xy - wx * wy) / determinant
        C = np.where(floor < 0, xy / xx, C)
        floor = np.where(floor < 0, 0, floor)
        floor, C = np.where(C < 0, wy / ww, floor), np.where(C < 0, 0, C)
        error = ((y - floor[..., None] * weight - C[..., None] * x) ** 2).sum(-1)
        rate, best = np.where(error < best, rho, rate), np.minimum(error, best)
    return rate


def _ranks(x):
    """Ranks along the last dimension, ties by their mean."""
    smaller = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return smaller + (equal + 1) / 2
