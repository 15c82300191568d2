"""The paper's denoising task (Sec. 7.2): GD and NAG layers above networks that put out the energy of an image.

from unrolled_kernels.experiments import denoising

task = denoising.DenoisingTask(denoising.photographs(size=96))
row = denoising.train_one(task, denoising.Trial("about-right", "nag", 8, seed=0), denoising.Training(20, crop=48))
"""

from unrolled_kernels.experiments import lazily

# what a study of one's own needs
__getattr__ = lazily(
    __name__,
    {
        "data": ("DenoisingTask",),
        "evaluation": ("restore",),
        "figures": ("draw",),
        "grid": ("PRESETS", "Grid", "Training", "Trial"),
        "images": ("load_folder", "photographs", "read_gray"),
        "model": ("CASES", "DnCNN", "HybridDenoiser", "PlainDenoiser", "energy_layer"),
        "train": ("train_one",),
    },
)
