"""Named arrays in safetensors files, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets

import numpy as np

from ..errors import DataError

try:
    import fcntl
except ImportError:  # not a Unix: temporary files of killed writers stay there
    fcntl = None

# numbers of a file, little-endian whatever the machine is
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "C64": "<c8",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def write(path, arrays, metadata=None) -> None:
    """Write arrays to a safetensors file, replacing it in one step.

    Parameters
    ----------
    path : str or os.PathLike
    arrays : dict of str to ndarray
    metadata : None or dict of str to str

    Raises
    ------
    OSError
        If the folder cannot be written. A file that was there is unchanged.
    """
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace_file(path, save(arrays, metadata))


def read(path) -> tuple:
    """Read a safetensors file.

    Returns
    -------
    arrays : dict of str to ndarray
    metadata : dict of str to str

    Raises
    ------
    DataError
        If it is damaged, truncated or no safetensors file.
    TypeError
        If it holds numbers that NumPy does not have, for instance bfloat16.
    FileNotFoundError
    """
    from safetensors import SafetensorError, deserialize

    path = os.fspath(path)
    # Not mapped: who shortens a mapped file ends the process that reads it.
    with open(path, "rb") as file:
        content = file.read()
    try:
        found = deserialize(content)
    except SafetensorError as error:
        raise DataError(
            f"{path} is damaged or is no safetensors file ({error})"
        ) from None
    arrays = {}
    # they come in an order of chance, and what is wrong is said of the first one
    for name, tensor in sorted(found, key=lambda item: item[0]):
        kind = tensor["dtype"]
        if kind not in _DTYPES:
            raise TypeError(
                f"{path}: {name} holds {kind}, which NumPy cannot read; save it as "
                f"float32"
            )
        try:
            array = np.frombuffer(tensor["data"], _DTYPES[kind])
            arrays[name] = array.reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:
            # a shape that NumPy refuses, with a 0 in it or of 65 dimensions
            raise DataError(
                f"{path} is damaged: {name} is no array ({error})"
            ) from None
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])  # deserialize has checked it
    return arrays, header.get("__metadata__") or {}


def replace_file(path, content: bytes) -> None:
    """Make ``content`` the content of a file in one step.

    A reader, or a machine that loses power, sees the old file or the new one. The
    content is written to ``<path>.<8 hex digits>.tmp`` and renamed. A writer that is
    killed leaves that file behind; the next one removes it, before it takes space of
    its own, so that they never pile up.
    """
    path = os.fspath(path)
    _remove_abandoned(path)
    file = _temporary(path)
    # A second descriptor keeps the lock until the file has its name: without it
    # another writer could take the file for abandoned.
    lock = os.dup(file.fileno())
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if fcntl is None:
            os.close(lock)  # Windows does not rename what is open
            lock = None
        os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _temporary(path):
    """A new file to be renamed to ``path``, locked for as long as this process lives.

    In the same folder, since a rename does not cross file systems.
    """
    while True:
        # "x" with the ordinary mode: the file gets the permissions of the user's umask
        file = open(f"{path}.{secrets.token_hex(4)}.tmp", "xb")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file  # no locks on this file system, so nobody removes it either
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another writer removed it before it was locked


def _remove_abandoned(path) -> None:
    """Remove the temporary files of writers of ``path`` that are no more."""
    if fcntl is None:
        return
    folder, base = os.path.split(path)
    ours = re.compile(re.escape(base) + r"\.[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder or ".") if ours.fullmatch(name)]
        for name in names:
            temporary = os.path.join(folder, name)
            # what cannot be locked is in use, or is not for us to judge
            with contextlib.suppress(OSError), open(temporary, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(temporary)
