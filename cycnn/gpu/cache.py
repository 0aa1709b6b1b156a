"""A folder of compiled kernels, one file an entry.

A cubin is code that the GPU will run, so the folder belongs to one user (mode 0700),
and entries that somebody else owns or could have written are not read. Each entry
starts with the SHA-256 of the rest: that finds damage; it does not prove who wrote it.
Writers make a temporary file and rename it, so readers see a whole entry or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import sys
import tempfile
from pathlib import Path

_log = logging.getLogger("cycnn")
_told = set()


def directory() -> Path:
    """``$CYCNN_CACHE_DIR``, else the platform's per-user cache folder."""
    given = os.environ.get("CYCNN_CACHE_DIR")
    if given:
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cycnn"


def kernels() -> Path:
    """The folder of compiled kernels."""
    return directory() / "kernels"


def read(key: str) -> bytes | None:
    """The entry, or None where there is none that can be trusted."""
    path = kernels() / f"{key}.bin"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            problem = _untrusted(path.parent.stat()) or _untrusted(status)
            if problem:
                _tell(f"kernel cache: {path} is not used: {problem}")
                return None
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        _tell(f"kernel cache: {path} cannot be read: {error}")
        return None
    if len(data) < 32 or hashlib.sha256(data[32:]).digest() != data[:32]:
        _tell(f"kernel cache: {path} is damaged and will be made anew")
        return None
    return data[32:]


def usable() -> bool:
    """Whether entries can be kept. If not, why is said once."""
    folder = kernels()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _untrusted(folder.stat())
        if problem:
            _tell(f"kernel cache: {folder} is not used: {problem}")
            return False
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        _tell(f"kernel cache: {folder} cannot be written: {error}")
        return False
    return True


def write(key: str, payload: bytes) -> None:
    """Keep an entry. A folder that cannot be written is said once and ignored."""
    if not usable():
        return
    folder = kernels()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        os.replace(temporary, folder / f"{key}.bin")
        temporary = None
    except OSError as error:
        _tell(f"kernel cache: {folder} cannot be written: {error}")
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def entries() -> list[Path]:
    """Files of the cache."""
    return sorted(kernels().glob("*.bin"))


def clear() -> int:
    """Delete all entries; returns how many there were."""
    found = entries()
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _untrusted(status) -> str | None:
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"user {status.st_uid} owns it, not {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _tell(message):
    if message not in _told:
        _told.add(message)
        _log.warning(message)
