"""Images in folders, one folder a class, decoded by Pillow."""

from __future__ import annotations

import logging
import operator
import os
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import ArrayDataset

_log = logging.getLogger("cycnn")

# what a file's name says it is, and what may be in it
_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_BLOCK = 1024  # images handed to the threads in one go
_WHITE = (255, 255, 255, 255)


def image_folder(
    root, size=None, channels=3, classes=None, scale=1 / 255, shift=-0.5
) -> tuple:
    """A dataset from images in folders, one folder a class: ``root/cat/0001.jpg``.

    Parameters
    ----------
    root : str or os.PathLike
        The folder of the class folders. These are searched to any depth; links to
        folders in them are not followed.
    size : None, int or (int, int)
        Height and width of the images, one number for both: an image is resized
        (bilinear, antialiased) until it covers that, and what stands out is cut off on
        both sides equally. None takes images as they are, all of one size.
    channels : {3, 1}
        RGB, or grey.
    classes : sequence of str, optional
        The classes in order. By default the names of the folders, sorted. For a test
        set give those of the training set, so that a label means the same in both; a
        class without a folder then is no error.
    scale, shift : float
        As in :class:`ArrayDataset`; by default pixels become -0.5 to 0.5.

    Returns
    -------
    dataset : ArrayDataset
        uint8 images (M, C, H, W), class by class, in each in the order of the names.
    classes : list of str
        The name of each label.

    Raises
    ------
    DataError
        If there is no image, a class has none, a file is damaged or truncated or has
        more pixels than Pillow's limit against decompression bombs, its pixels do not
        fit 8 bits, or sizes differ where ``size`` is None. The message names the file:
        of several the first.
    ImportError
        If Pillow (``cycnn[images]``) is not installed.

    Notes
    -----
    JPEG, PNG, BMP, GIF, PPM, TIFF and WebP are read, by the names' usual suffixes.
    Other files and hidden ones are left out; how many is logged once, at INFO. A file
    that has the suffix of an image but cannot be read as one is an error.

    An image is turned as its EXIF orientation says. Transparent pixels lie on white.
    Of several frames the first counts. Where ``size`` is less than a fourth of a
    JPEG's, the decoder shrinks it already, which is several times as fast.

    The whole set is held in memory: M * C * H * W bytes.
    """
    _require_pillow()
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    size = None if size is None else _as_size(size)
    root = Path(root).expanduser()
    paths, labels, classes = _find(root, classes)
    # the first image decides the size, hence the memory
    first = _decode(paths[0], size, channels)
    images = np.empty((len(paths), *first.shape), np.uint8)
    images[0] = first
    _decode_rest(paths, images, size)
    return ArrayDataset(images, labels, scale, shift, len(classes)), classes


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "image_folder needs Pillow, which is not installed: "
            'pip install "cycnn[images]"'
        ) from error


def _as_size(size) -> tuple:
    try:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(
            f"size must be an int or (height, width), got {size!r}"
        ) from None
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be 1 or more, got size={size!r}")
    return height, width


# which files


def _find(root, classes) -> tuple:
    """(paths, labels, names of the classes), in order."""
    entries = sorted(os.listdir(root))
    folders = [name for name in entries if _is_class(root / name)]
    left_out = [str(root / name) for name in entries if not (root / name).is_dir()]
    given = classes is not None
    if given:
        if isinstance(classes, str):
            raise TypeError(f"classes must be a sequence of names, got {classes!r}")
        classes = list(classes)
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes must differ from each other, got {classes}")
        unknown = [name for name in folders if name not in classes]
        if unknown:
            raise DataError(
                f"{root / unknown[0]}: {unknown[0]!r} is none of the classes {classes}"
            )
    else:
        classes = folders
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_in(root / name, left_out) if name in folders else []
        if not found and not given:
            raise DataError(
                f"{root / name}: a class without images: expected files named "
                f"{_suffixes()}"
            )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(
            f"{root}: no images: expected a folder for each class, in it files named "
            f"{_suffixes()}"
        )
    if left_out:
        _log.info(
            "%s: %d images of %d classes; %d files that are hidden or not named as "
            "images were left out, first %s",
            root, len(paths), len(classes), len(left_out), left_out[0],
        )  # fmt: skip
    return paths, labels, classes


def _is_class(path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images_in(folder, left_out) -> list:
    paths = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            wanted = suffix in _SUFFIXES and not name.startswith(".")
            (paths if wanted else left_out).append(os.path.join(place, name))
    return paths


def _raise(error):
    raise error


def _suffixes() -> str:
    return "*" + ", *".join(_SUFFIXES)


# what is in them


def _decode_rest(paths, images, size) -> None:
    """Decode all but the first image, in threads: Pillow lets go of the GIL."""
    from concurrent.futures import ThreadPoolExecutor  # takes as long as half of cycnn

    def put(number):
        image = _decode(paths[number], size, images.shape[1])
        if image.shape != images.shape[1:]:
            raise DataError(
                f"{paths[number]}: {_pixels(image)} pixels, {paths[0]} has "
                f"{_pixels(images[0])}: size=(height, width) brings all to one size"
            )
        images[number] = image

    with ThreadPoolExecutor(thread_name_prefix="cycnn-images") as pool:
        for start in range(1, len(paths), _BLOCK):
            block = range(start, min(start + _BLOCK, len(paths)))
            # in order, so that the first bad file is the one that is named
            for _ in pool.map(put, block):
                pass


def _pixels(image) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"


def _decode(path, size, channels) -> np.ndarray:
    """An image as uint8 (C, H, W)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if size is not None:
                # twice the larger side: enough whichever way the image is turned
                image.draft(None, (2 * max(size), 2 * max(size)))
            image = ImageOps.exif_transpose(image)
            image = _to_channels(image, path, channels)
            if size is not None:
                height, width = size
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly everything
        raise DataError(f"{path}: no image, or a damaged one: {error}") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _to_channels(image, path, channels):
    from PIL import Image

    if image.mode[0] in "IF":
        raise DataError(
            f"{path}: pixels of Pillow's mode {image.mode} do not fit 8 bits: convert "
            f"the image, or give arrays to ArrayDataset"
        )
    if image.getbands()[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("L" if channels == 1 else "RGB")
