"""Which models are trained and how: the grid of Figure 7 and its presets."""

import itertools
from dataclasses import asdict, dataclass

from unrolled_kernels.experiments.denoising.model import ALGORITHMS, CASES, PLAIN

SCHEDULES = ("cosine", "step", "constant")
AUTOCAST = ("none", "bfloat16", "float16")


@dataclass(frozen=True, order=True)
class Trial:
    """One model to train; its fields are the columns that identify a row of the results."""

    case: str
    algorithm: str
    num_steps: int
    seed: int

    @property
    def name(self):
        """For files and messages."""
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Training:
    """What all models of a run share.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of a minibatch, over all processes together.
        crop: side of the square that is seen of an image in an epoch.
        noise: ``"fixed"`` or ``"fresh"``, see ``data.TrainingPairs``.
        learning_rate: of Adam, at the start.
        schedule: of the learning rate over the epochs.
        step_size: kind of φ, see ``model.StepSize``.
        step_size_start: φ at the start.
        autocast: dtype of the networks' arithmetic.
    """

    epochs: int
    batch_size: int = 10
    crop: int = 180
    noise: str = "fixed"
    learning_rate: float = 1e-2
    schedule: str = "cosine"
    step_size: str = "guarded"
    step_size_start: float = 0.5
    autocast: str = "none"


@dataclass(frozen=True)
class Grid:
    """The product of its axes, and one plain DnCNN for each seed."""

    depths: tuple
    seeds: int
    cases: tuple = tuple(CASES)
    algorithms: tuple = ALGORITHMS

    def trials(self, first_seed=0):
        """Every model of the grid, sorted."""
        seeds = range(first_seed, first_seed + self.seeds)
        hybrid = itertools.product(self.cases, self.algorithms, self.depths, seeds)
        return sorted({Trial(*point) for point in hybrid} | {Trial(PLAIN, "none", 0, seed) for seed in seeds})


PRESETS = {
    "quick": (
        Grid((1, 12), seeds=1),
        # what the about-right model needs to pass non-local means
        Training(epochs=80, batch_size=2, crop=48, noise="fresh", learning_rate=2e-2),
    ),
    "paper": (
        # one round of folds, see ``data.DenoisingTask.split``
        Grid((1, 2, 3, 4, 5, 6, 8, 10, 12, 16), seeds=4),
        Training(epochs=3000, learning_rate=1e-3),
    ),
}
