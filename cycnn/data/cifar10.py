"""CIFAR-10: 50,000 colour images to learn from, 10,000 to test on, 32x32 pixels.

The binary version: files of 10,000 records, each

    0     the class, 0 to 9
    1     1024 bytes of red, row by row, then as many of green and of blue
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import ArrayDataset

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)
_FOLDER = "cifar-10-batches-bin"  # made when the archive is unpacked
_IMAGE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_RECORDS = 10_000  # in each file


def cifar10(root, scale=1 / 255, shift=-0.5) -> tuple:
    """CIFAR-10 from the files of its binary version, as (train, test).

    Nothing is downloaded: https://www.cs.toronto.edu/~kriz/cifar.html has the archive,
    ``cifar-10-binary.tar.gz``.

    Parameters
    ----------
    root : str or os.PathLike
        The folder that has ``data_batch_1.bin`` to ``data_batch_5.bin`` and
        ``test_batch.bin``, or the one where the archive was unpacked.
    scale, shift : float
        As in :class:`ArrayDataset`; by default pixels become -0.5 to 0.5.

    Returns
    -------
    train, test : ArrayDataset
        uint8 images (M, 3, 32, 32). Label i is ``data.CIFAR10_CLASSES[i]``.

    Raises
    ------
    DataError
        If a file is missing, has not the length of 10,000 records, or holds a label
        above 9. The message names the file.
    OSError
        If a file cannot be opened or read.
    """
    root = Path(root).expanduser()
    inner = root / _FOLDER
    folder = inner if inner.is_dir() else root
    _check_files(folder)
    return tuple(_load(folder, names, scale, shift) for names in (_TRAIN, _TEST))


def _check_files(folder) -> None:
    """Refuse missing files and wrong lengths before memory is taken."""
    names = (*_TRAIN, *_TEST)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: put the files of CIFAR-10's binary "
            f"version there, {names[0]} to {_TRAIN[-1]} and {_TEST[0]}, unpacked from "
            f"cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html)"
        )
    for name in names:
        _check_length(folder / name, os.path.getsize(folder / name))


def _check_length(path, have) -> None:
    claim = _RECORDS * _RECORD
    if have != claim:
        what = "truncated" if have < claim else "trailing bytes"
        raise DataError(
            f"{path}: {what}: {_RECORDS} records of {_RECORD} bytes take {claim} "
            f"bytes, the file has {have}"
        )


def _load(folder, names, scale, shift) -> ArrayDataset:
    count = len(names) * _RECORDS
    images, labels = np.empty((count, *_IMAGE), np.uint8), np.empty(count, np.int32)
    for number, name in enumerate(names):
        path = folder / name
        records = np.fromfile(path, np.uint8, _RECORDS * _RECORD)
        _check_length(path, records.size)  # somebody may be writing to it
        records = records.reshape(_RECORDS, _RECORD)
        rows = slice(number * _RECORDS, (number + 1) * _RECORDS)
        labels[rows] = records[:, 0]
        wrong = labels[rows] >= len(CLASSES)
        if wrong.any():
            at = int(wrong.argmax())
            raise DataError(
                f"{path}: record {at} has label {records[at, 0]}: expected 0 to "
                f"{len(CLASSES) - 1}"
            )
        images[rows] = records[:, 1:].reshape(-1, *_IMAGE)
    return ArrayDataset(images, labels, scale, shift, len(CLASSES))
