"""Where the images come from: a folder of the reader's, or the photographs that scikit-image carries."""

import warnings
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image, ImageOps

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
            pixels = read_gray(file)
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


# what a pixel of one channel may be as, and its white; 32-bit integers have none that all programs agree on
_WHITE = {"1": 1, "L": 255, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "F": 1}


def read_gray(file):
    """An image as people have it, upright and gray.

    Colours become their luminance, a palette the colours it stands for, alpha is laid over white, and CMYK is taken as
    the format defines it. 16 bits a channel are read as 16 where Pillow does, which is gray images.

    Args:
        file: its path.
    Returns:
        ``[H, W]`` float32 in [0, 1].
    Raises:
        ValueError: it cannot be read, in full and without doubt about what its numbers mean; the message says why.
        OSError: there is no such file, or it may not be read.
    """
    try:
        # Pillow warns of 89 million pixels, and refuses twice as many
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _gray(image)
    except OSError as error:
        # Pillow's own, of a file that is there
        raise error if error.errno is not None else ValueError(f"cannot be read: {error}") from None
    # decoders raise SyntaxError, struct.error, EOFError and others on damaged files
    except (SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from None


def _gray(image):
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"has {image.n_frames} frames; save the one that is meant as a file of its own")
    image.load()  # a truncated file fails here
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "I":
        return _of_32_bits(np.asarray(image))
    if image.mode not in _WHITE:
        image = image.convert("L")
    gray = np.asarray(image, dtype=np.float32) / _WHITE[image.mode]
    if not (np.isfinite(gray).all() and gray.min() >= 0 and gray.max() <= 1):
        raise ValueError(
            f"its pixels are floating-point numbers from {gray.min():g} to {gray.max():g}, expected finite ones in "
            "[0, 1]; scale them"
        )
    return gray


def _of_32_bits(pixels):
    """Integers of 32 bits, which some programs store numbers of 16 in: what fills neither kind is in doubt."""
    largest = pixels.max()
    if pixels.min() >= 0 and 255 < largest <= 65535:
        return pixels.astype(np.float32) / 65535
    raise ValueError(
        f"its pixels are 32-bit integers from {pixels.min()} to {largest}, whose white is not known; save it with 8 or "
        "16 bits a channel"
    )
