"""Generalization gaps with intervals: each image under the model that was trained on it and those that were not."""

import math

import numpy as np
import pandas as pd
from scipy.stats import t as student

from unrolled_kernels.experiments.denoising.data import FOLDS, folds
from unrolled_kernels.experiments.denoising.model import CASES


def of_images(rows):
    """The gap of each image: its mean loss under a round's models of other folds less that under its own fold's.

    The mean over the images of a whole round is the mean gap of its models. That images differ is no part of it: a
    denoiser that no training has touched has a gap of zero on every image.

    Args:
        rows: of the results, models that differ in the seed alone.
    Returns:
        ``[N]``, in the mean over the rounds; NaN of an image that is in no fold, or in one without another beside it.
    """
    rounds = []
    for number, models in rows.groupby(rows["seed"] // FOLDS):
        losses = np.stack(models["image_losses"])  # [models, N]
        trained = np.zeros(losses.shape, bool)
        for row, seed in zip(trained, models["seed"], strict=True):
            row[folds(losses.shape[1], number)[seed % FOLDS]] = True
        inside, others = (losses * trained).sum(0), (losses * ~trained).sum(0)
        known = trained.any(0) & (len(models) > 1)
        rounds.append(np.where(known, others / max(len(models) - 1, 1) - inside, np.nan))
    rounds = np.stack(rounds)
    known = ~np.isnan(rounds)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, rounds, 0).sum(0) / np.maximum(count, 1), np.nan)


def interval(values):
    """Mean of values and half the width of its 95 % interval, by Student's t; NaN and infinite for less than two."""
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        return math.nan, math.inf
    return values.mean(), student.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)


def of_results(results):
    """Every case and k: a DataFrame of ``gd``, ``nag`` and ``difference`` (GD − NAG, by image), and ``…_half`` of each.

    The intervals are over images, for the models that were trained; what other models of the same images would have
    is no part of them.

    Args:
        results: one row for each trained model that did not diverge.
    """
    lines = []
    for case in (case for case in CASES if case in set(results["case"])):
        of_case = results[results["case"] == case]
        for num_steps in sorted(of_case["num_steps"].unique()):
            of_k = of_case[of_case["num_steps"] == num_steps]
            models = {name: of_k[of_k["algorithm"] == name] for name in ("gd", "nag")}
            images = {name: of_images(rows) if len(rows) else np.array([np.nan]) for name, rows in models.items()}
            # on the folds of both
            seeds = set(models["gd"]["seed"]) & set(models["nag"]["seed"])
            both = [of_images(rows[rows["seed"].isin(seeds)]) for rows in models.values() if seeds]
            images["difference"] = both[0] - both[1] if both else np.array([np.nan])
            line = {"case": case, "num_steps": num_steps}
            for name, values in images.items():
                line[name], line[f"{name}_half"] = interval(values)
            lines.append(line)
    return pd.DataFrame(lines)
