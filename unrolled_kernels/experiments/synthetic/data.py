"""The data of the synthetic task: quadratic energies whose spectrum is a function of x, and their minimizers."""

import functools
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from unrolled_kernels import Spectral
from unrolled_kernels import functional as F

MU, L = 0.1, 1.0
# b and x are uniform on [-5, 5]
B_MAX = X_MAX = 5.0
NUM_SAMPLES, NUM_TRAIN = 10_000, 100
X_DIM, DIM, TRUE_HIDDEN = 10, 5, 3
FIRST_SEED = 100
# stand for what a random stream is for, so that no two share their numbers
_DATA, _SUBSET, _WEIGHTS, _ORDER = range(4)
_ORDER_BLOCK = 256
_REFERENCE_ORDER_SEED = 10086


@dataclass(frozen=True, eq=False)
class SyntheticTask:
    """Samples of the energy 1/2 yᵀQ*(x)y + bᵀy with Q*(x) = R diag(e(x)) Rᵀ (paper, Sec. 7.1).

    Attributes:
        x: ``[N, 10]`` float32, what the network sees.
        R: ``[N, 5, 5]`` float32, a rotation for each sample; data, not learned.
        b: ``[N, 5]`` float32.
        y_star: ``[N, 5]`` float32, the minimizer -Q*⁻¹b.
        eigenvalues: e(x), ``[N, 5]`` float32, ordered [L, μ + (L-μ) softmax(MLP(x)), μ].
        seed: the seed that the samples were drawn from.
        num_train: how many of them a training seed trains on.
        same_start: initial weights and the order of the minibatches are those of the first training seed for all, as
            in the authors' release, so that only the training samples vary; else all three vary.
    """

    x: torch.Tensor
    R: torch.Tensor
    b: torch.Tensor
    y_star: torch.Tensor
    eigenvalues: torch.Tensor
    seed: int
    num_train: int = field(default=NUM_TRAIN, kw_only=True)
    same_start: bool = field(default=False, kw_only=True)

    def train_index(self, seed):
        """The samples that training seed ``seed`` trains on, ``[num_train]`` int64."""
        index = _random(_SUBSET, self.seed, seed).choice(len(self.x), self.num_train, replace=False)
        return torch.from_numpy(index)

    def initial_weights(self, hidden, seed):
        """What a network starts from: its (weight ``[out, in]``, bias ``[out]``) pairs, float32, input side first.

        Weights are Glorot-uniform and biases zero; models of the same hidden size and seed share them, whatever their
        layer and optimizer, so that comparisons are paired.
        """
        random = _random(_WEIGHTS, self.seed, self._start(seed), hidden)
        sizes = (X_DIM, hidden, DIM - 2) if hidden else (X_DIM, DIM - 2)
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            weight = torch.from_numpy(_glorot_uniform(random, fan_out, fan_in)).float()
            layers.append((weight, torch.zeros(fan_out)))
        return layers

    def minibatch_orders(self, seed, block):
        """The orders in which training seed ``seed`` visits its samples in the epochs of one block.

        A function of the epoch alone: a resumed run needs no random state.

        Args:
            seed: the training seed.
            block: epochs ``256 · block … 256 · block + 255``, counted from zero; see ``epoch_blocks``.
        Returns:
            ``[256, num_train]`` int64, a permutation in each row.
        """
        rows = np.tile(np.arange(self.num_train), (_ORDER_BLOCK, 1))
        return torch.from_numpy(_random(_ORDER, self.seed, self._start(seed), block).permuted(rows, axis=1))

    def _start(self, seed):
        return FIRST_SEED if self.same_start else seed

    @property
    def largest_loss(self):
        """The distance between any two minimizers, or more: a model whose loss is above it has diverged."""
        return 2 * torch.linalg.vector_norm(self.y_star, dim=-1).max().item()

    def to(self, device_or_dtype):
        """The same task with its samples on another device or in another dtype, which models of it follow."""
        names = ("x", "R", "b", "y_star", "eigenvalues")
        return replace(self, **{name: getattr(self, name).to(device_or_dtype) for name in names})


@dataclass(frozen=True, eq=False)
class ReferenceTask(SyntheticTask):
    """The samples, training subsets and initial weights that the paper's authors used; see ``load_reference``."""

    file: Path
    subsets: dict
    weights: dict

    def train_index(self, seed):
        if seed not in self.subsets:
            raise ValueError(f"{self.file}: no training indices for seed {seed}; there are {sorted(self.subsets)}")
        return self.subsets[seed]

    def initial_weights(self, hidden, seed):
        if hidden not in self.weights:
            raise ValueError(
                f"{self.file}: no initial weights for hidden size {hidden}; there are {list(self.weights)}"
            )
        return self.weights[hidden]

    def minibatch_orders(self, seed, block):
        # the authors' order is the same for every seed
        return _reference_orders(block)[0]


def generate(seed=2, num_samples=NUM_SAMPLES, num_train=NUM_TRAIN, same_start=False):
    """Draw the task: x and b uniform on [-5, 5], R a Haar rotation, the true network 10 → 3 → 3 with ReLU.

    Args:
        seed: a non-negative int; equal seeds give equal data.
        num_samples: N.
        num_train, same_start: as in ``SyntheticTask``.
    Returns:
        A ``SyntheticTask``.
    """
    random = _random(_DATA, seed)
    layers = [
        (_glorot_uniform(random, out, fan_in), random.standard_normal(out))
        for fan_in, out in ((X_DIM, TRUE_HIDDEN), (TRUE_HIDDEN, DIM - 2))
    ]
    x = random.uniform(-X_MAX, X_MAX, (num_samples, X_DIM))
    b = random.uniform(-B_MAX, B_MAX, (num_samples, DIM))
    R = _haar_rotations(random, num_samples)
    e = _true_eigenvalues(x, layers)
    x, b, R, e = (torch.from_numpy(array) for array in (x, b, R, e))
    y_star = F.minimize(Spectral(e, R), b)
    options = {"num_train": num_train, "same_start": same_start}
    return SyntheticTask(x.float(), R.float(), b.float(), y_star.float(), e.float(), seed, **options)


def load_reference(directory):
    """Read the authors' own samples and weights from ``directory/reference.npz``.

    Their release minimises 1/2 yᵀQy - bᵀy; the sign of b is turned here to the paper's.

    Args:
        directory: the folder that holds ``reference.npz``.
    Returns:
        A ``ReferenceTask``.
    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated or of another kind; the message names it.
    """
    file = Path(directory) / "reference.npz"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --reference takes the folder that holds reference.npz")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    # zlib's own error has no public base class but Exception
    except Exception as error:
        raise ValueError(f"{file}: not a readable .npz archive (truncated, or of another kind): {error}") from None
    wanted = {"x": (X_DIM,), "R": (DIM, DIM), "b": (DIM,), "y_star": (DIM,)}
    for name, shape in wanted.items():
        got = arrays[name].shape if name in arrays else None
        if got is None or got[1:] != shape or got[0] != len(arrays["x"]):
            raise ValueError(f"{file}: expected an array {name} of shape [N, {', '.join(map(str, shape))}], got {got}")
    try:
        true = [(arrays[f"true.layers_w.{i}.weight"], arrays[f"true.layers_w.{i}.bias"]) for i in range(2)]
    except KeyError as error:
        raise ValueError(f"{file}: the true network is not complete: {error}") from None
    e = _true_eigenvalues(arrays["x"].astype(np.float64), [(w.astype(np.float64), b) for w, b in true])
    x, R, b, y_star = (torch.from_numpy(arrays[name]) for name in wanted)
    subsets, weights = {}, {}
    for name, array in sorted(arrays.items()):
        tensor = torch.from_numpy(array)
        if name.startswith("train_index.seed"):
            subsets[int(name.removeprefix("train_index.seed"))] = tensor
        elif name.startswith("init.hidden") and name.endswith(".weight"):
            hidden = int(name.split(".")[1].removeprefix("hidden"))
            bias = torch.from_numpy(arrays[name.removesuffix("weight") + "bias"])
            weights.setdefault(hidden, []).append((tensor, bias))
    eigenvalues = torch.from_numpy(e).float()
    return ReferenceTask(x, R, -b, y_star, eigenvalues, 2, file=file, subsets=subsets, weights=weights)


@functools.lru_cache(maxsize=2)
def _reference_orders(block):
    """The orders of the authors' loader, and the state of its generator after them.

    It shuffles what it shuffled the epoch before, so a block continues the one before it.
    """
    generator = torch.Generator()
    if block == 0:
        generator.manual_seed(_REFERENCE_ORDER_SEED)
        order = torch.arange(NUM_TRAIN)
    else:
        orders, state = _reference_orders(block - 1)
        generator.set_state(state)
        order = orders[-1]
    orders = []
    for _ in range(_ORDER_BLOCK):
        order = order[torch.randperm(NUM_TRAIN, generator=generator)]
        orders.append(order)
    return torch.stack(orders), generator.get_state()


def epoch_blocks(first_epoch, last_epoch):
    """Cut ``range(first_epoch, last_epoch)`` where ``minibatch_orders`` is: each block, and the slice of its rows."""
    while first_epoch < last_epoch:
        block, row = divmod(first_epoch, _ORDER_BLOCK)
        rows = slice(row, min(_ORDER_BLOCK, row + last_epoch - first_epoch))
        yield block, rows
        first_epoch += rows.stop - rows.start


def _random(*key):
    return np.random.default_rng(key)


def _glorot_uniform(random, fan_out, fan_in):
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return random.uniform(-bound, bound, (fan_out, fan_in))


def _haar_rotations(random, count):
    """QR of a Gaussian matrix is Haar once R's diagonal is made positive; a flipped column makes it a rotation."""
    q, r = np.linalg.qr(random.standard_normal((count, DIM, DIM)))
    q *= np.sign(np.einsum("nii->ni", r))[:, None, :]
    q[:, :, 0] *= np.linalg.det(q)[:, None].round()
    return q


def _true_eigenvalues(x, layers):
    (w1, b1), (w2, b2) = layers
    logits = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2  # [N, 3]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    edge = np.ones((len(x), 1))
    return np.concatenate([L * edge, MU + (L - MU) * p, MU * edge], axis=1)
