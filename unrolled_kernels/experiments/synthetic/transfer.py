"""Trained with k steps, run with k′: what the networks of a study do under a layer of another depth."""

import itertools
import math

import pandas as pd
import torch

from unrolled_kernels.experiments.synthetic.data import MU, X_DIM, L
from unrolled_kernels.experiments.synthetic.model import inner_eigenvalues
from unrolled_kernels.schedules import nesterov_momentum


def at_other_depths(task, rows, depths):
    """The mean test loss of trained networks under layers of other depths, φ = 1.

    Args:
        task: the data that the networks were trained on.
        rows: of the results table, with their ``weights``.
        depths: k′, at least 1.
    Returns:
        A DataFrame: hidden, algorithm, num_steps (k), seed, run_steps (k′), test.
    """
    b, y_star = (torch.einsum("nij,ni->jn", task.R, v).double() for v in (task.b, task.y_star))  # [5, N]
    found = []
    for row in rows.itertuples():
        network = _network(torch.tensor(row.weights), row.hidden)
        inner = inner_eigenvalues(network(task.x), dim=-1).T.double()  # [3, N]
        edge = torch.ones_like(inner[:1])
        q = torch.cat([L * edge, inner, MU * edge])
        beta = nesterov_momentum(1.0, MU) if row.algorithm == "nag" else 0.0
        y = before = torch.zeros_like(q)
        for k in range(1, max(depths) + 1):
            z = y + beta * (y - before)
            before, y = y, z - (q * z + b)
            if k in depths:
                test = (y - y_star).norm(dim=0).mean().item()
                found.append((row.hidden, row.algorithm, row.num_steps, row.seed, k, test))
    return pd.DataFrame(found, columns=["hidden", "algorithm", "num_steps", "seed", "run_steps", "test"])


def _network(weights, hidden):
    """x ``[N, 10]`` to logits ``[N, 3]``, from parameters in the order of ``evaluation.result_columns``."""
    sizes = (X_DIM, hidden, 3) if hidden else (X_DIM, 3)
    shapes = [shape for fan_in, out in itertools.pairwise(sizes) for shape in ((out, fan_in), (out,))]
    parts = weights.split([math.prod(shape) for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def logits(x):
        x = x @ parts[0].T + parts[1]
        return torch.relu(x) @ parts[2].T + parts[3] if hidden else x

    return logits
