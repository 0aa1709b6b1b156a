"""Named arrays in safetensors files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets

import numpy as np

from ..errors import DataError

try:
    import fcntl
except ImportError:  # not a Unix: temporary files of killed writers stay there
    fcntl = None


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
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    # what a folder or an unreadable file is called by safe_open depends on its version
    with open(path, "rb"):
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {}
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if kind.startswith(("BF", "F8", "F4")):
                    raise TypeError(
                        f"{path}: {name} holds {kind}, which NumPy cannot read; save "
                        f"it as float32"
                    )
                try:
                    arrays[name] = file.get_tensor(name)
                except (ValueError, OverflowError) as error:
                    # a shape that NumPy refuses, with a 0 in it or of 65 dimensions
                    raise DataError(
                        f"{path} is damaged: {name} is no array ({error})"
                    ) from None
            return arrays, dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataError(
            f"{path} is damaged or is no safetensors file ({error})"
        ) from None


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
