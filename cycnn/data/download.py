"""Downloads that are checked, resumed where they stopped, and complete or absent."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import re
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib

from .. import __version__
from ..errors import DataError
from .idx import GZIP_MAGIC

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 10.0  # seconds for a mirror's first answer, and for each piece after it
_CHUNK = 1 << 16
_SLACK = 1 << 20  # bytes that packing may add to what does not compress

# what a mirror can do wrong
_FAILURES = (OSError, http.client.HTTPException, DataError)


def fetch(names, mirrors, folder) -> None:
    """Download files into a folder, each from the first mirror that has it.

    Parameters
    ----------
    names : dict of str to (int, str)
        For each file the length and the SHA-256 of its content, without the gzip
        packing that it may have: mirrors may pack differently.
    mirrors : sequence of str
        URLs of folders, ending in a slash. One that fails is asked last from then on.
    folder : pathlib.Path
        Made if it does not exist. A file appears in it only when its content is
        right; until then it grows as ``<name>.part``, from which a later call goes on.

    Raises
    ------
    DataError
        If no mirror gives a file; the message has a line for each mirror.
    OSError
        If the folder cannot be written.
    """
    mirrors = list(mirrors)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, (size, digest) in names.items():
        if (folder / name).exists():
            continue
        with _part(folder / name) as file:
            failures = []
            for mirror in list(mirrors):
                try:
                    _fetch_one(mirror + name, file, size, digest)
                    break
                except _FAILURES as error:
                    failures.append(f"  {mirror}{name}: {_reason(error)}")
                    mirrors.append(mirrors.pop(0))
            else:
                raise DataError("\n".join(failures))
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
            os.replace(file.name, folder / name)


@contextlib.contextmanager
def _part(target):
    """``<target>.part``, open and positioned at its end.

    A second process that downloads the same at the same time gets a file of its own.
    """
    path = target.with_name(target.name + ".part")
    file, private = open(path, "a+b"), False
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the one who held the lock may have just renamed what we opened
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except OSError:
            mine = False
        private = not mine
    if private:
        file.close()
        file = tempfile.NamedTemporaryFile(
            "a+b", dir=target.parent, prefix=target.name + ".", delete=False
        )
    try:
        yield file
    finally:
        # complete, it was renamed, and the name may by now be of another process's part
        with contextlib.suppress(OSError, ValueError):
            status = os.fstat(file.fileno())
            ours = os.path.samestat(status, os.stat(file.name))
            if ours and (private or status.st_size == 0):
                os.unlink(file.name)
        file.close()


def _fetch_one(url, file, size, digest) -> None:
    """Bring ``file`` to the right content from one mirror, or raise what went wrong."""
    resumed = file.seek(0, os.SEEK_END) > 0
    _transfer(url, file, size + _SLACK)
    try:
        _verify(file, size, digest)
    except DataError:
        file.truncate(0)
        if not resumed:
            raise
        # the first part may be of another mirror, packed differently
        _transfer(url, file, size + _SLACK)
        try:
            _verify(file, size, digest)
        except DataError:
            file.truncate(0)
            raise


def _transfer(url, file, limit) -> None:
    """Append to ``file`` what is missing of ``url``."""
    start = file.seek(0, os.SEEK_END)
    try:
        response = _open(url, start)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not start:
            raise
        # nothing after what we have: it may be complete, else it is of no use
        return
    with response:
        if start and not _goes_on_at(response, start):
            file.truncate(0)
            if response.status == 206:
                raise DataError(
                    f"answered with the range "
                    f"{response.headers.get('Content-Range')!r}, not from {start} on"
                )
            start = 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        have = start
        if total is not None and total > limit:
            raise DataError(f"has {total} bytes, expected at most {limit}")
        with _progress(url.rsplit("/", 1)[1], start, total) as advance:
            while piece := response.read1(_CHUNK):
                have += len(piece)
                if have > limit:
                    file.truncate(0)
                    raise DataError(f"sends more than {limit} bytes")
                file.write(piece)
                advance(len(piece))
        file.flush()
        if total is not None and have < total:
            raise DataError(f"broke off after {have} of {total} bytes")


def _goes_on_at(response, start) -> bool:
    if response.status != 206:
        return False
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == start


def _open(url, start):
    """The response to a request for ``url`` from byte ``start`` on."""
    headers = {"User-Agent": f"cycnn/{__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    answer, given_up, lock = [], threading.Event(), threading.Lock()

    def ask():
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except BaseException as error:
            response = error
        with lock:
            answer.append(response)
            if given_up.is_set() and not isinstance(response, BaseException):
                response.close()

    # The timeout of a socket counts anew for every address of the host and not at all
    # for the look-up of its name; a thread bounds the sum.
    thread = threading.Thread(target=ask, name="cycnn-download", daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    with lock:
        if not answer:
            given_up.set()
            raise TimeoutError(f"no answer within {TIMEOUT:g} s")
    if isinstance(answer[0], BaseException):
        raise answer[0]
    return answer[0]


def _verify(file, size, digest) -> None:
    file.flush()
    file.seek(0)
    packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    content = gzip.GzipFile(fileobj=file, mode="rb") if packed else file
    found, have = hashlib.sha256(), 0
    try:
        while have <= size and (piece := content.read(min(_CHUNK, size + 1 - have))):
            found.update(piece)
            have += len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"damaged gzip file: {error}") from error
    if have != size:
        more = "more than " if have > size else ""
        raise DataError(f"content has {more}{min(have, size)} bytes, expected {size}")
    if found.hexdigest() != digest:
        raise DataError(f"content has SHA-256 {found.hexdigest()}, expected {digest}")


def _reason(error) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _progress(name, start, total):
    """A function to be told of every new byte; shows a bar where a person watches."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        bar = _TextBar(name, start, total)
    else:
        bar = tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True)
    try:
        yield bar.update
    finally:
        bar.close()


class _TextBar:
    """One line on stderr, rewritten ten times a second at most."""

    def __init__(self, name, start, total):
        self._name, self._have, self._total = name, start, total
        self._shown = 0.0

    def update(self, count):
        self._have += count
        now = time.monotonic()
        if now - self._shown >= 0.1:
            self._shown = now
            self._show()

    def _show(self):
        share = f" of {self._total / 1e6:.1f}" if self._total else ""
        line = f"\r{self._name}: {self._have / 1e6:.1f}{share} MB"
        print(line, end="", file=sys.stderr, flush=True)

    def close(self):
        self._show()
        print(file=sys.stderr)
