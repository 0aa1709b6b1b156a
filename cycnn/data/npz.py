"""Images and labels in a NumPy archive (.npz)."""

from __future__ import annotations

import math
import os
import zipfile

import numpy as np

from ..errors import DataError
from .dataset import ArrayDataset

_IMAGES = ("images", "x", "X")
_LABELS = ("labels", "y", "Y")
_LAYOUTS = ("NCHW", "NHWC")
_CHANNELS = (1, 3, 4)  # what tells the axis of the channels from height and width
# bytes that one byte can unpack to, at most, in the packings that NumPy writes
_PACKINGS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}


def load_npz(
    path,
    images=None,
    labels=None,
    layout=None,
    scale=1.0,
    shift=0.0,
    classes=None,
    ignore_index=None,
) -> ArrayDataset:
    """A dataset from two arrays of an ``.npz`` file, as ``numpy.savez`` writes it.

    Parameters
    ----------
    path : str or os.PathLike
    images, labels : str, optional
        Names of the arrays. By default ``images``, ``x`` or ``X``, and ``labels``,
        ``y`` or ``Y``, whichever the file has one of. Labels are integers of shape
        (M,) or (M, 1).
    layout : {"NCHW", "NHWC"}, optional
        Where the channels of four-dimensional images are. By default on the axis of
        size 1, 3 or 4, which must be either the second or the last, not both.
    scale, shift, classes, ignore_index
        As in :class:`ArrayDataset`.

    Raises
    ------
    DataError
        If the file is damaged, has no such arrays or needs pickle, the layout cannot be
        told, or the arrays make no dataset. The message names the file, and what it
        holds where a name or a layout is missing.
    OSError
        If it cannot be opened or read.

    Notes
    -----
    Arrays of objects are refused: unpickling them could run code. No memory is taken
    for what a header claims beyond what the file can hold.
    """
    name = os.fspath(path)
    if layout not in (None, *_LAYOUTS):
        raise ValueError(f"layout must be NCHW, NHWC or None, got {layout!r}")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                headers = _headers(archive, name)
                images = _choose(images, _IMAGES, "images", headers, name)
                labels = _choose(labels, _LABELS, "labels", headers, name)
                if layout is None and len(headers[images][0]) == 4:
                    layout = _layout(images, headers, name)
                pixels = _read(archive, images, headers, name)
                classes_of = _read(archive, labels, headers, name)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # zipfile, zlib and NumPy raise nearly everything
            raise DataError(f"{name}: damaged, or no .npz file: {error}") from error
    if pixels.ndim == 4 and layout == "NHWC":
        pixels = pixels.transpose(0, 3, 1, 2)
    if classes_of.ndim == 2 and classes_of.shape[1] == 1:
        classes_of = classes_of[:, 0]
    try:
        return ArrayDataset(pixels, classes_of, scale, shift, classes, ignore_index)
    except (DataError, TypeError) as error:
        raise DataError(f"{name}: {images} with {labels}: {error}") from error


def _headers(archive, name) -> dict:
    """(shape, dtype) of each array, whose data is not read."""
    headers, size = {}, os.fstat(archive.fp.fileno()).st_size
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                header = np.lib.format.read_array_header_2_0(file)
            else:  # only arrays with named fields need it
                raise DataError(
                    f"{name}: {info.filename} has version {version} of the format: "
                    f"expected 1.0 or 2.0"
                )
            shape, _, dtype = header
            claim = file.tell() + dtype.itemsize * math.prod(shape)
        packing = _PACKINGS.get(info.compress_type, 0)
        room = packing * min(info.compress_size, size)
        # objects are pickled: their length is not known, and _read refuses them
        if not dtype.hasobject and not claim == info.file_size <= room:
            raise DataError(
                f"{name}: {info.filename} claims {claim} bytes for shape {shape} of "
                f"{dtype}, the file has {info.file_size} in {info.compress_size} packed"
            )
        headers[info.filename.removesuffix(".npy")] = shape, dtype
    return headers


def _choose(wanted, usual, role, headers, name) -> str:
    found = [wanted] if wanted is not None else [n for n in usual if n in headers]
    if len(found) == 1 and found[0] in headers:
        return found[0]
    if wanted is not None:
        problem = f"no array {wanted!r}"
    elif found:
        problem = f"several arrays that may be the {role}, {', '.join(found)}"
    else:
        problem = f"no array named {', '.join(usual[:-1])} or {usual[-1]}"
    raise DataError(
        f"{name}: {problem}: name one with {role}=. The file holds {_told(headers)}"
    )


def _told(headers) -> str:
    arrays = (f"{name} {shape} {dtype}" for name, (shape, dtype) in headers.items())
    return ", ".join(arrays) or "no arrays"


def _layout(images, headers, name) -> str:
    shape = headers[images][0]
    may_be = [layout for layout in _LAYOUTS if shape[layout.index("C")] in _CHANNELS]
    if len(may_be) == 1:
        return may_be[0]
    which = "both" if may_be else "neither"
    raise DataError(
        f"{name}: {images} has shape {shape}: of second and last axis {which} may be "
        f'the channels: say layout="NCHW" or layout="NHWC"'
    )


def _read(archive, array, headers, name) -> np.ndarray:
    if headers[array][1].hasobject:
        raise DataError(
            f"{name}: {array} holds Python objects, which are not read: they could run "
            f"code. Save it as an array of numbers"
        )
    with archive.open(array + ".npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
