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
        clean = self.clean[index]
        return clean, add_noise(clean, self.sigma[index], [(_NOISE, seed // FOLDS, i) for i in index.tolist()])


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


def add_noise(clean, sigma, keys):
    """X = Y + σ n of images ``[n, 1, H, W]``, clipped to the paper's [0, 1]; n of each is a function of its key."""
    normal = torch.empty(clean.shape)
    for plane, key in zip(normal.numpy(), keys, strict=True):
        _random(*key).standard_normal(dtype=np.float32, out=plane)
    return (clean + sigma * normal.to(clean.device)).clamp_(0, 1)


class TrainingPairs:
    """What a model is trained on: crops of the training images, all a function of seed and epoch.

    A resumed run needs no random state, and a process needs to make only what it trains on itself.

    Args:
        task: the images.
        seed: of the split, the order, the crops and the noise.
        crop: side of the crops, at most that of the images.
        noise: ``"fixed"``: each image has one noise for all epochs; ``"fresh"``: a new one in each epoch.
        device: where minibatches are wanted, and the images are kept.
    """

    def __init__(self, task, seed, crop, noise, device="cpu"):
        self.seed, self.index, self.fresh = seed, task.split(seed)[0], noise == "fresh"
        self.crop = min(crop, *task.clean.shape[-2:])
        clean, noisy = (task.clean[self.index], None) if self.fresh else task.pairs(self.index, seed)
        images = torch.stack([clean, task.sigma[self.index] if self.fresh else noisy])[:, :, 0].to(device)
        # clean and noisy, or clean and σ: every crop of every image, [2, n, tops, lefts, crop, crop], in no new memory
        self.crops = images.unfold(2, self.crop, 1).unfold(3, self.crop, 1)

    def batches(self, epoch, batch_size, rank=0, ranks=1):
        """Yield ``(clean, noisy, count)`` for each minibatch of an epoch.

        clean and noisy ``[n, 1, crop, crop]`` are on the device: this rank's share of a global batch of ``count``.
        """
        order = _random(_ORDER, self.seed, epoch).permutation(len(self.index))
        # top and left in every image, whoever takes it in whatever batch
        corners = _random(_CROP, self.seed, epoch).integers(self.crops.shape[2:4], size=(len(order), 2))
        places = torch.from_numpy(np.stack([order, *corners[order].T])).to(self.crops.device)
        for start in range(0, len(order), batch_size):
            share = slice(start + rank, start + batch_size, ranks)
            clean, noisy = self.crops[:, *places[:, share]].unsqueeze(2)
            if self.fresh:
                keys = [(_NOISE, self.seed, epoch + 1, i) for i in self.index[order[share]].tolist()]
                noisy = add_noise(clean, noisy, keys)
            yield clean, noisy, min(batch_size, len(order) - start)


def _random(*key):
    return np.random.default_rng(key)
