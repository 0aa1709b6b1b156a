"""Named arrays in safetensors files, written whole or not at all."""

from __future__ import annotations

import os
import secrets

import numpy as np

from ..errors import DataError


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
                arrays[name] = file.get_tensor(name)
            return arrays, dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataError(
            f"{path} is damaged or is no safetensors file ({error})"
        ) from None


def replace_file(path, content: bytes) -> None:
    """Make ``content`` the content of a file in one step.

    A reader, or a machine that loses power, sees the old file or the new one.
    """
    path = os.fspath(path)
    # in the same folder, since a rename does not cross file systems
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        # "x" with the ordinary mode: the file gets the permissions of the user's umask
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
