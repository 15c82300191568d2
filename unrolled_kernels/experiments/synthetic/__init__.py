"""The paper's synthetic task (Sec. 7.1): GD and NAG layers above a network that puts out the energy's matrix.

from unrolled_kernels.experiments import synthetic

task = synthetic.generate()
trials = synthetic.Grid((1, 4, 16), (16,), ("adam",), (1e-2,), seeds=3, epochs=1000).trials()
results = synthetic.train_all(task, trials, synthetic.Training(epochs=1000))
synthetic.draw(synthetic.select_best(results), Path("figures"))
"""

from unrolled_kernels.experiments import lazily

# what a study of one's own needs
__getattr__ = lazily(
    __name__,
    {
        "data": ("SyntheticTask", "generate", "load_reference"),
        "figures": ("draw",),
        "grid": ("PRESETS", "Grid", "Training", "Trial", "select_best"),
        "model": ("SpectrumNetwork", "SyntheticModel", "make_layer"),
        "train": ("train_all", "train_one"),
    },
)
