"""Where the images come from: a folder of the reader's, or the photographs that scikit-image carries."""

import warnings
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image

SIZE = 180
_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "rocket",
    "stereo_motorcycle",
)


def load_folder(directory, size=SIZE):
    """Read every image under ``directory``, as gray, and keep its middle.

    Args:
        directory: a folder, searched to any depth; files that Pillow has no format for are passed over.
        size: side of the square that is kept.
    Returns:
        ``[N, 1, size, size]`` float32 in [0, 1], in the order of the paths, and how many images were left out: those
        that cannot be read or are smaller, each named by a warning.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two images are usable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"--data: {directory}: no such folder")
    suffixes = Image.registered_extensions()
    files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    kept, skipped = [], 0
    for file in files:
        try:
            pixels = _read_gray(file)
            if min(pixels.shape) < size:
                raise ValueError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels, expected at least {size}×{size}")
        # Pillow's decoders raise SyntaxError and struct.error too on damaged files
        except Exception as error:
            warnings.warn(f"--data: skipped {file}: {error}", stacklevel=2)
            skipped += 1
            continue
        top, left = ((side - size) // 2 for side in pixels.shape)
        kept.append(pixels[top : top + size, left : left + size])
    if len(kept) < 2:
        raise ValueError(
            f"--data: {directory}: expected at least 2 images of {size}×{size} pixels or more, found {len(kept)} "
            f"({skipped} skipped); give another folder or a smaller --size"
        )
    return torch.from_numpy(np.stack(kept)).unsqueeze(1), skipped


def photographs(size=SIZE):
    """Tiles of the photographs inside scikit-image, gray, ``[N, 1, size, size]`` float32 in [0, 1]; 44 at size 180."""
    tiles = []
    for name in _PHOTOGRAPHS:
        image = getattr(skimage.data, name)()
        # the stereo pair shows one scene twice
        image = image[0] if isinstance(image, tuple) else image
        gray = skimage.util.img_as_float32(image if image.ndim == 2 else skimage.color.rgb2gray(image))
        rows, columns = (side // size for side in gray.shape)
        for row in range(rows):
            for column in range(columns):
                tiles.append(gray[row * size : (row + 1) * size, column * size : (column + 1) * size])
    if len(tiles) < 2:
        raise ValueError(f"--size: {size} is larger than the photographs inside scikit-image; give --data")
    return torch.from_numpy(np.stack(tiles)).unsqueeze(1)


def _read_gray(file):
    with Image.open(file) as image:
        if image.mode.startswith("I"):
            # convert("L") would clip 16 bits to 8
            return np.asarray(image, dtype=np.float32) / 65535
        return np.asarray(image.convert("L"), dtype=np.float32) / 255
