"""IDX files: the format of MNIST.

    0      two zero bytes
    2      type of the elements, see ``_TYPES``
    3      number of dimensions d
    4      d sizes, uint32, big-endian
    4+4d   the elements, big-endian, last index fastest

A file may be compressed with gzip; that is seen from its first bytes, not its name.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import secrets
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import ArrayDataset

_TYPES = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_CODES = {dtype.newbyteorder("="): code for code, dtype in _TYPES.items()}
_MAX_DIMENSIONS = 32  # of a NumPy array, before NumPy 2
_MAX_BYTES = 2**63 - 1
_CHUNK = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path) -> np.ndarray:
    """Read an IDX file, plain or compressed with gzip.

    Memory is never taken for what the header claims but only for what the file holds:
    a plain file's size is compared first, a compressed one is read in pieces and no
    further than one byte beyond the claim.

    Parameters
    ----------
    path : str or os.PathLike

    Returns
    -------
    numpy.ndarray
        With the file's shape, in native byte order: uint8, int8, int16, int32, float32
        or float64.

    Raises
    ------
    DataError
        If the file is not IDX, damaged, truncated, or goes on after its last element.
    OSError
        If it cannot be opened or read.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        if file.peek(2)[:2] != GZIP_MAGIC:
            dtype, shape = _read_header(file, name)
            data = _read_plain(file, name, dtype, shape)
        else:
            try:
                with gzip.GzipFile(fileobj=file, mode="rb") as content:
                    dtype, shape = _read_header(content, name)
                    data = _read_compressed(content, name, dtype, shape)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(
                    f"{name}: damaged or truncated gzip file: {error}"
                ) from error
    array = np.frombuffer(data, dtype)
    return array.astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _read_header(file, name) -> tuple:
    head = file.read(4)
    if len(head) < 4:
        raise DataError(f"{name}: {len(head)} bytes are too few for an IDX file")
    if head[:2] != b"\0\0":
        raise DataError(
            f"{name}: not an IDX file: starts with 0x{head.hex()}, expected 0x0000, a "
            f"type and a number of dimensions"
        )
    code, rank = head[2], head[3]
    if code not in _TYPES:
        known = ", ".join(f"0x{known:02x}" for known in _TYPES)
        raise DataError(
            f"{name}: unknown type of elements 0x{code:02x}: expected {known}"
        )
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise DataError(f"{name}: {rank} dimensions: expected 1 to {_MAX_DIMENSIONS}")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(
            f"{name}: truncated: the header of {rank} dimensions takes {4 + 4 * rank} "
            f"bytes, the file has {4 + len(sizes)}"
        )
    dtype, shape = _TYPES[code], struct.unpack(f">{rank}I", sizes)
    # NumPy refuses such a shape even where another size is 0 and nothing is stored
    if dtype.itemsize * math.prod(n for n in shape if n) > _MAX_BYTES:
        raise DataError(
            f"{name}: absurd dimensions {shape}: more bytes than can be addressed"
        )
    return dtype, shape


def _claim(dtype, shape) -> int:
    return dtype.itemsize * math.prod(shape)


def _refuse_length(name, dtype, shape, have) -> None:
    claim = _claim(dtype, shape)
    what = "truncated" if have < claim else "trailing bytes"
    found = "more" if have == claim + 1 else have  # no more of a gzip file was read
    raise DataError(
        f"{name}: {what}: {shape} elements of {dtype.itemsize} byte(s) take {claim} "
        f"bytes after the header, the file has {found}"
    )


def _read_plain(file, name, dtype, shape):
    claim = _claim(dtype, shape)
    have = os.fstat(file.fileno()).st_size - file.tell()
    if have != claim:
        _refuse_length(name, dtype, shape, have)
    data = bytearray(claim)
    have = file.readinto(data)
    if have != claim:  # somebody is writing to it
        _refuse_length(name, dtype, shape, have)
    return data


def _read_compressed(file, name, dtype, shape):
    claim = _claim(dtype, shape)
    data = bytearray()
    # the byte beyond the claim shows trailing data and makes gzip check its sum
    while len(data) <= claim:
        piece = file.read(min(_CHUNK, claim + 1 - len(data)))
        if not piece:
            break
        data += piece
    if len(data) != claim:
        _refuse_length(name, dtype, shape, len(data))
    return data


def write_idx(path, array) -> None:
    """Write an array as an IDX file, all of it or nothing.

    Parameters
    ----------
    path : str or os.PathLike
        Compressed with gzip where the name ends in ``.gz``. A file of that name is
        replaced at the end, in one step.
    array : array_like of uint8, int8, int16, int32, float32 or float64
        One dimension or more.

    Raises
    ------
    TypeError
        If IDX has no such type of elements.
    ValueError
        If the number of dimensions or one of the sizes does not fit the format.
    """
    path = Path(path)
    array = np.asarray(array)
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise TypeError(
            f"IDX has no elements of dtype {array.dtype}: expected one of "
            f"{', '.join(map(str, _CODES))}"
        )
    if not 1 <= array.ndim <= _MAX_DIMENSIONS or max(array.shape) >= 2**32:
        raise ValueError(
            f"IDX cannot hold shape {array.shape}: expected 1 to {_MAX_DIMENSIONS} "
            f"sizes below 2**32"
        )
    header = struct.pack(f">2xBB{array.ndim}I", code, array.ndim, *array.shape)
    content = header + array.astype(_TYPES[code], copy=False).tobytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # no time: equal arrays, equal files
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_idx_pair(images, labels, scale=1.0, shift=0.0, classes=None) -> ArrayDataset:
    """A dataset from a file of images and a file of labels.

    Parameters
    ----------
    images : str or os.PathLike
        IDX file of shape (M, H, W) or (M, C, H, W).
    labels : str or os.PathLike
        IDX file of integers, shape (M,).
    scale, shift, classes
        As in :class:`ArrayDataset`.

    Raises
    ------
    DataError
        If a file is damaged, the counts differ, or a label is out of range. The
        message names the file.
    """
    pixels, classes_of = read_idx(images), read_idx(labels)
    if pixels.ndim not in (3, 4):
        raise DataError(
            f"{os.fspath(images)}: shape {pixels.shape}: expected images, (M, H, W) or "
            f"(M, C, H, W)"
        )
    if classes_of.ndim != 1 or classes_of.dtype.kind not in "iu":
        raise DataError(
            f"{os.fspath(labels)}: shape {classes_of.shape} of {classes_of.dtype}: "
            f"expected labels, integers of shape (M,)"
        )
    if len(pixels) != len(classes_of):
        raise DataError(
            f"{os.fspath(images)} holds {len(pixels)} images but {os.fspath(labels)} "
            f"{len(classes_of)} labels"
        )
    try:
        return ArrayDataset(pixels, classes_of, scale, shift, classes)
    except DataError as error:
        raise DataError(
            f"{os.fspath(images)} with {os.fspath(labels)}: {error}"
        ) from error
