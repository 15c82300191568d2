"""``unrolled-kernels denoising apply``: one image through a trained model."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unrolled_kernels.experiments import checkpoint
from unrolled_kernels.experiments.denoising import evaluation, images
from unrolled_kernels.experiments.denoising.grid import Training, Trial
from unrolled_kernels.experiments.denoising.model import CASES, PLAIN, make_model
from unrolled_kernels.experiments.denoising.weights import load_model
from unrolled_kernels.experiments.run_directory import atomic_path

# models that come with the package, by name
TRAINED = {file.stem: file for file in sorted((Path(__file__).parent / "trained").glob("*.safetensors"))}


def add_parser(subparsers):
    """Register the subcommand of ``denoising``."""
    parser = subparsers.add_parser(
        "apply",
        help="restore an image with a trained model",
        description="Restore an image with the weights of a model that was trained before. The result is gray.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FILE",
        help=f"{' or '.join(TRAINED)}, which come with the package, or DIR/models/*.safetensors of a finished run",
    )
    parser.add_argument("input", type=Path, metavar="IN", help="the image, of any size")
    parser.add_argument("output", type=Path, metavar="OUT", help="where it goes; its suffix is the format")
    parser.set_defaults(run=run)


def run(arguments):
    """Restore; see ``unrolled-kernels denoising apply --help``."""
    if Image.registered_extensions().get(arguments.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"OUT: {arguments.output}: expected the suffix of an image, .png for instance")
    model = load(arguments.model)
    try:
        noisy = images.read_gray(arguments.input)
    except ValueError as error:
        raise ValueError(f"IN: {arguments.input}: {error}") from None
    restored = evaluation.restore(model, torch.from_numpy(noisy)[None, None])[0, 0]
    pixels = (restored.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    with atomic_path(arguments.output) as temporary:
        Image.fromarray(pixels).save(temporary)
    print(arguments.output)
    return 0


def load(model):
    """A trained model, whatever its case, algorithm and depth.

    Args:
        model: a name in ``TRAINED``, or the file of its weights.
    Raises:
        ValueError: the file is no trained model of this study; the message names it.
    """
    file = TRAINED.get(str(model), model)
    name = checkpoint.model_name(file)
    *case, algorithm, num_steps, seed = name.split("-")
    known = "-".join(case) in (*CASES, PLAIN) and num_steps.isdigit() and seed.isdigit()
    if not known:
        raise ValueError(f"--model: {file}: holds {name!r}, which is no denoising model")
    trial = Trial("-".join(case), algorithm, int(num_steps), int(seed))
    tensors, progress = checkpoint.read(file, name)
    training = Training(epochs=1, step_size=progress.get("step_size", Training.step_size))
    model = make_model(trial, training)
    load_model(file, trial, model, tensors)
    return model
