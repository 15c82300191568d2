"""The paper's denoising task (Sec. 7.2): GD and NAG layers above networks that put out the energy of an image.

from unrolled_kernels.experiments import denoising

task = denoising.DenoisingTask(denoising.photographs(size=96))
row = denoising.train_one(task, denoising.Trial("about-right", "nag", 8, seed=0), denoising.Training(20, crop=48))
"""

import importlib

# what a study of one's own needs, and where it is; imported when it is asked for
_PUBLIC = {
    "data": ("DenoisingTask",),
    "evaluation": ("restore",),
    "figures": ("draw",),
    "grid": ("PRESETS", "Grid", "Training", "Trial"),
    "images": ("load_folder", "photographs", "read_gray"),
    "model": ("CASES", "DnCNN", "HybridDenoiser", "PlainDenoiser", "energy_layer"),
    "train": ("train_one",),
}


def __getattr__(name):
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
