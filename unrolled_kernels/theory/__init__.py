"""The paper's theory as functions: properties of algorithm layers, bounds, and help for their design.

``properties`` has Tables 1 and 2 in closed form, ``empirical`` measures them with the layers, ``bounds`` has the lemmas
and the theorem, ``rademacher`` the complexities of finite sets of models, ``design`` the advice.
"""

from unrolled_kernels.regions import rnn_contraction
from unrolled_kernels.theory.bounds import (
    approximation_bound,
    check_lemmas,
    local_rademacher_bound,
    log_covering_bound,
    log_covering_interval,
    log_covering_parametric,
    model_bound,
    predicted_error,
    predicted_gap,
    predicted_order,
    problem_constants,
    representation_bound,
    schedule_error,
)
from unrolled_kernels.theory.design import check, recommend, spectrum_bounds
from unrolled_kernels.theory.empirical import (
    ascend_stability_ratio,
    fit_order,
    measure_convergence,
    measure_sensitivity,
    measure_stability,
    measured_orders,
    random_energies,
    random_pairs,
    stability_ratio,
)
from unrolled_kernels.theory.properties import (
    convergence_rate,
    rnn_best_convergence_rate,
    rnn_sensitivity,
    rnn_stability,
    schedule_convergence,
    schedule_stability,
    sensitivity,
    stability,
    stable_region,
)
from unrolled_kernels.theory.rademacher import cover, local_rademacher_complexity, rademacher_complexity

__all__ = [
    "approximation_bound",
    "ascend_stability_ratio",
    "check",
    "check_lemmas",
    "convergence_rate",
    "cover",
    "fit_order",
    "local_rademacher_bound",
    "local_rademacher_complexity",
    "log_covering_bound",
    "log_covering_interval",
    "log_covering_parametric",
    "measure_convergence",
    "measure_sensitivity",
    "measure_stability",
    "measured_orders",
    "model_bound",
    "predicted_error",
    "predicted_gap",
    "predicted_order",
    "problem_constants",
    "rademacher_complexity",
    "random_energies",
    "random_pairs",
    "recommend",
    "representation_bound",
    "rnn_best_convergence_rate",
    "rnn_contraction",
    "rnn_sensitivity",
    "rnn_stability",
    "schedule_convergence",
    "schedule_error",
    "schedule_stability",
    "sensitivity",
    "spectrum_bounds",
    "stability",
    "stability_ratio",
    "stable_region",
]
