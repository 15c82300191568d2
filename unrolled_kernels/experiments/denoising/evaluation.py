"""How good a restored image is, and what the classical methods inside scikit-image reach on the same images."""

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

_AT_ONCE = 20
# strengths that the classical methods may choose from
_NLM_SIGMAS, _TV_WEIGHTS = (0.08, 0.11, 0.14, 0.17, 0.2), (0.1, 0.15, 0.2, 0.3)


def psnr(clean, restored):
    """PSNR in dB of each image, clipped to [0, 1] first, ``[n]``."""
    options = {"data_range": 1.0, "reduction": "none", "dim": (1, 2, 3)}
    return peak_signal_noise_ratio(restored.clamp(0, 1), clean, **options)


def quality(clean, restored):
    """PSNR in dB and SSIM of each image, clipped to [0, 1] first; two tensors ``[n]``."""
    ssim = structural_similarity_index_measure(restored.clamp(0, 1), clean, data_range=1.0, reduction="none")
    return psnr(clean, restored), ssim


@torch.no_grad()
def restore(model, noisy, device="cpu"):
    """The model's Y_k of noisy images ``[n, 1, H, W]``, on the CPU; the model is left in evaluation mode."""
    model.eval()
    return torch.cat([model(part.to(device)).float().cpu() for part in noisy.split(_AT_ONCE)])


def squared_error(clean, restored):
    """The training loss of each image: the mean squared error of a pixel, ``[n]``."""
    return (restored - clean).square().mean((1, 2, 3))


class ClassicalMethods:
    """Non-local means and total variation, each at the strength that is best on training images.

    Args:
        clean, noisy: a few training pairs ``[n, 1, H, W]``.
    """

    def __init__(self, clean, noisy):
        self.strengths = {}
        for name, (method, strengths) in _METHODS.items():
            means = [psnr(clean, _each(method, noisy, strength)).mean() for strength in strengths]
            self.strengths[name] = strengths[int(np.argmax(means))]

    def restore(self, noisy):
        """A dict from the method's name to its images ``[n, 1, H, W]``."""
        return {name: _each(_METHODS[name][0], noisy, strength) for name, strength in self.strengths.items()}


def _non_local_means(image, sigma):
    # h and sizes as scikit-image recommends them where σ is given
    return denoise_nl_means(image, h=0.8 * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True)


def _total_variation(image, weight):
    return denoise_tv_chambolle(image, weight=weight)


_METHODS = {"non-local means": (_non_local_means, _NLM_SIGMAS), "total variation": (_total_variation, _TV_WEIGHTS)}


def _each(method, noisy, strength):
    restored = [method(image.numpy(), strength) for image in noisy[:, 0]]
    return torch.from_numpy(np.stack(restored)).to(noisy.dtype).unsqueeze(1)
