"""The paper's synthetic task (Sec. 7.1): GD and NAG layers above a network that puts out the energy's matrix.

from unrolled_kernels.experiments import synthetic

task = synthetic.generate()
trials = synthetic.Grid((1, 4, 16), (16,), ("adam",), (1e-2,), seeds=3, epochs=1000).trials()
results = synthetic.train_all(task, trials, synthetic.Training(epochs=1000))
synthetic.draw(synthetic.select_best(results), Path("figures"))
"""

import importlib

# what a study of one's own needs, and where it is; imported when it is asked for, the core needs no pandas
_PUBLIC = {
    "data": ("SyntheticTask", "generate", "load_reference"),
    "figures": ("draw",),
    "grid": ("PRESETS", "Grid", "Training", "Trial", "select_best"),
    "model": ("SpectrumNetwork", "SyntheticModel", "make_layer"),
    "train": ("train_all", "train_one"),
}


def __getattr__(name):
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
