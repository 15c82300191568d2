"""Which layers are trained: the grid of Figure 6 and its presets."""

import itertools
from dataclasses import dataclass

from unrolled_kernels.experiments.synthetic.data import FIRST_SEED
from unrolled_kernels.experiments.synthetic.grid import PAPER_DEPTHS, PAPER_LEARNING_RATES

ALGORITHMS = ("gd", "nag", "rnn")


@dataclass(frozen=True, order=True)
class Trial:
    """One layer to train; its fields are the columns that identify a row of the results."""

    algorithm: str
    num_steps: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Grid:
    """The product of its axes; see ``PRESETS``."""

    depths: tuple
    learning_rates: tuple
    seeds: int
    epochs: int
    algorithms: tuple = ALGORITHMS

    def trials(self):
        """Every layer of the grid, sorted."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.seeds)
        return sorted(
            {Trial(*point) for point in itertools.product(self.algorithms, self.depths, seeds, self.learning_rates)}
        )


PRESETS = {
    "quick": Grid((1, 2, 4, 8, 14), (1e-2, 1e-3), seeds=3, epochs=300),
    "medium": Grid((1, 2, 3, 4, 6, 8, 10, 14, 20), (1e-2, 1e-3), seeds=3, epochs=800),
    "paper": Grid(PAPER_DEPTHS, PAPER_LEARNING_RATES, seeds=20, epochs=50_000),
}
