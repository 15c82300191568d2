"""The theory beside the results of trained models: the lemmas' two sides, and who generalizes better at which depth.

Results come in as a DataFrame with one row for each trained model: ``algorithm``, ``num_steps``, ``hidden``, ``seed``,
``train``, ``test`` (mean losses), ``gap``, ``true_train``, ``true_test`` (the layer's on Q*), ``qfro2_test``
(P‖Q_θ - Q*‖²_F), ``step_size``, and where it was kept ``test_squared`` (P ℓ²).
"""

import pandas as pd
import torch

from unrolled_kernels.theory.bounds import approximation_bound, predicted_order, representation_bound
from unrolled_kernels.theory.properties import convergence_rate

# the paper's reading of its hidden sizes (Sec. 7.1)
REGIME_OF_HIDDEN = {0: "under", 16: "about_right", 32: "over"}
_COLUMNS = ("algorithm", "num_steps", "hidden", "seed", "train", "test", "gap", "true_train", "true_test", "qfro2_test",
            "step_size")  # fmt: skip


def check_columns(results, source="results"):
    """Refuse a table without the columns that the comparison reads."""
    missing = [name for name in _COLUMNS if name not in results]
    if missing:
        raise ValueError(f"{source}: not a table of trained models; it lacks the columns {', '.join(missing)}")


def lemma_table(results, *, mu, L, sigma_b, M):
    """Both sides of Lemma 4.1, and of Lemma 4.2 where ``test_squared`` is there, for each trained model.

    P‖Q_θ - Q*‖_F is bounded by √qfro2_test, which makes the right side of Lemma 4.1 a little larger.

    Args:
        results: one row for each trained model.
        mu, L: bounds of the spectra.
        sigma_b, M: as in ``bounds.problem_constants``.
    Returns:
        A DataFrame in the order of ``results``: algorithm, num_steps, hidden, seed, convergence, loss, loss_bound, and
        q_error, q_error_bound (NaN without ``test_squared``).
    Raises:
        ValueError: a column is missing.
    """
    check_columns(results)
    rows = []
    for row in results.itertuples(index=False):
        cvg = convergence_rate(row.algorithm, int(row.num_steps), float(row.step_size), mu).item()
        right = sum(approximation_bound(row.qfro2_test**0.5, cvg, mu=mu, sigma_b=sigma_b, M=M))
        squared = getattr(row, "test_squared", float("nan"))
        reverse = sum(representation_bound(squared, cvg, L=L, sigma_b=sigma_b, M=M)) ** 2
        rows.append(
            {
                "algorithm": row.algorithm,
                "num_steps": row.num_steps,
                "hidden": row.hidden,
                "seed": row.seed,
                "convergence": cvg,
                "loss": row.test,
                "loss_bound": right,
                "q_error": row.qfro2_test,
                "q_error_bound": reverse,
            }
        )
    return pd.DataFrame(rows)


def order_table(results, *, mu):
    """The predicted order of GD and NAG over k beside the measured gaps, for the hidden sizes of the paper.

    Args:
        results: one row for each trained model; NAG and GD are paired by seed.
        mu: lower bound of the spectra.
    Returns:
        A DataFrame: regime, hidden, num_steps, gap_gd, gap_nag (means), predicted and measured (1: NAG's gap is the
        larger, -1: GD's, 0: equal), agrees.
    Raises:
        ValueError: a column is missing.
    """
    check_columns(results)
    rows = []
    for (hidden, num_steps), part in results.groupby(["hidden", "num_steps"]):
        regime = REGIME_OF_HIDDEN.get(hidden)
        gaps = part.pivot_table(index="seed", columns="algorithm", values="gap").dropna()
        if regime is None or not {"gd", "nag"} <= set(gaps) or gaps.empty:
            continue
        gap_gd, gap_nag = gaps["gd"].mean(), gaps["nag"].mean()
        predicted = int(predicted_order(torch.tensor(int(num_steps)), regime, float(part["step_size"].mean()), mu))
        measured = int(gap_nag > gap_gd) - int(gap_nag < gap_gd)
        rows.append(
            {
                "regime": regime,
                "hidden": hidden,
                "num_steps": num_steps,
                "gap_gd": gap_gd,
                "gap_nag": gap_nag,
                "predicted": predicted,
                "measured": measured,
                "agrees": predicted == measured,
            }
        )
    columns = ["regime", "hidden", "num_steps", "gap_gd", "gap_nag", "predicted", "measured", "agrees"]
    return pd.DataFrame(rows, columns=columns)
