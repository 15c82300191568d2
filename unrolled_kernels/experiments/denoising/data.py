"""The pairs of the denoising task: clean images, and noise that is weaker on edges than in smooth regions."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

NOISE = ("fixed", "fresh")
FOLDS = 4
SIGMA_MAX, SIGMA_MIN = 50 / 255, 10 / 255
_EDGE_CONTRAST, _WINDOW = 0.1, 7
# stand for what a random stream is for, so that no two share their numbers
_SPLIT, _NOISE, _ORDER, _CROP = range(4)


@dataclass(frozen=True, eq=False)
class DenoisingTask:
    """Images to restore.

    Attributes:
        clean: ``[N, 1, H, W]`` float32 in [0, 1], on the CPU.
    """

    clean: torch.Tensor

    @functools.cached_property
    def sigma(self):
        """σ of the noise at each pixel, ``[N, 1, H, W]``; see ``noise_level``."""
        return noise_level(self.clean)

    def split(self, seed):
        """Indices of a quarter of the images to train on and of the others to test on (100 and 300 of BSD's 400).

        Seeds 4i to 4i + 3 train on the four quarters of one random order: over such a round the gap (test minus train
        error) of a denoiser that is not trained sums to zero, where the number of images is a multiple of four, and
        what is left of a gap is what training made of it.
        """
        train = torch.zeros(len(self.clean), dtype=torch.bool)
        train[folds(len(train), seed // FOLDS)[seed % FOLDS]] = True
        return train.nonzero()[:, 0], (~train).nonzero()[:, 0]

    def pairs(self, index, seed):
        """The images of ``index`` and their noisy versions, ``[n, 1, H, W]``; an image has one noise in a round."""
        window = slice(None), slice(None)
        noisy = [self.noisy(i, window, _NOISE, seed // FOLDS) for i in index.tolist()]
        return self.clean[index], torch.stack(noisy)

    def noisy(self, image, window, *key):
        """X = Y + σ n inside a window, ``[1, h, w]``, clipped to the paper's [0, 1]; n is a function of the key."""
        clean, sigma = (stack[image, :, window[0], window[1]] for stack in (self.clean, self.sigma))
        normal = _random(*key, image).standard_normal(clean.shape, dtype=np.float32)
        return (clean + sigma * torch.from_numpy(normal)).clamp_(0, 1)


def folds(images, number):
    """The images, by index, of each of the ``FOLDS`` folds of a round, the ``number``-th; a few may be in none."""
    order = _random(_SPLIT, number).permutation(images)
    count = max(1, images // FOLDS)
    return [order[i * count :][:count] for i in range(FOLDS)]


def noise_level(clean):
    """The law of σ, ours: the paper says only that it is lower on edges than in smooth regions.

        σ = σ_min + (σ_max - σ_min) exp(-(s / 0.1)²),   s = standard deviation of the 7×7 neighbourhood

    Args:
        clean: ``[N, 1, H, W]`` in [0, 1].
    Returns:
        ``[N, 1, H, W]``: 50/255 where the image is flat, falling to 10/255 on strong edges.
    """
    padded = torch.nn.functional.pad(clean.double(), [_WINDOW // 2] * 4, mode="reflect")
    mean, mean_of_squares = (torch.nn.functional.avg_pool2d(x, _WINDOW, stride=1) for x in (padded, padded.square()))
    variance = (mean_of_squares - mean.square()).clamp_(min=0)
    return (SIGMA_MIN + (SIGMA_MAX - SIGMA_MIN) * torch.exp(-variance / _EDGE_CONTRAST**2)).to(clean.dtype)


class TrainingPairs:
    """What a model is trained on: crops of the training images, all a function of seed and epoch.

    A resumed run needs no random state, and a process needs to make only what it trains on itself.

    Args:
        task: the images.
        seed: of the split, the order, the crops and the noise.
        crop: side of the crops, at most that of the images.
        noise: ``"fixed"``: each image has one noise for all epochs; ``"fresh"``: a new one in each epoch.
        device: where minibatches are wanted; whole images with one noise are kept there.
    """

    def __init__(self, task, seed, crop, noise, device="cpu"):
        self.task, self.seed, self.device = task, seed, device
        self.index = task.split(seed)[0]
        self.crop = min(crop, *task.clean.shape[-2:])
        self.fixed = task.pairs(self.index, seed)[1] if noise == "fixed" else None
        whole = noise == "fixed" and task.clean.shape[-2:] == (self.crop, self.crop)
        self.kept = torch.stack([task.clean[self.index], self.fixed]).to(device) if whole else None

    def batches(self, epoch, batch_size, rank=0, ranks=1):
        """Yield ``(clean, noisy, count)`` for each minibatch of an epoch.

        clean and noisy ``[n, 1, crop, crop]`` are on the device: this rank's share of a global batch of ``count``.
        """
        order = _random(_ORDER, self.seed, epoch).permutation(len(self.index))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            clean, noisy = self._pairs(torch.from_numpy(batch[rank::ranks]), epoch)
            yield clean, noisy, len(batch)

    def _pairs(self, positions, epoch):
        if self.kept is not None:
            return self.kept[:, positions.to(self.device)]
        pairs = self.task.clean.new_empty(2, len(positions), 1, self.crop, self.crop)
        for row, position in enumerate(positions.tolist()):
            pairs[0, row], pairs[1, row] = self._pair(position, epoch)
        return pairs.to(self.device)

    def _pair(self, position, epoch):
        image = self.index[position].item()
        height, width = self.task.clean.shape[-2:]
        random = _random(_CROP, self.seed, epoch, image)
        top, left = random.integers(height - self.crop + 1), random.integers(width - self.crop + 1)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        clean = self.task.clean[image, :, window[0], window[1]]
        if self.fixed is not None:
            return clean, self.fixed[position, :, window[0], window[1]]
        return clean, self.task.noisy(image, window, _NOISE, self.seed, epoch + 1)


def _random(*key):
    return np.random.default_rng(key)
