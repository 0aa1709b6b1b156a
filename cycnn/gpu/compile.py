"""Kernels from source: NVRTC, the cubins shipped with the package, the user's cache.

The build compiles every ``cuda/*.cu`` for the architectures below, so an installed
package needs no compiler. A source that differs from what was shipped, or a GPU that
nothing shipped runs on, is compiled by NVRTC when it is first needed and cached. So are
the kernels of ``cuda/templates``, which are specialised for the shapes of a layer.

This module uses neither NumPy nor a GPU: the build imports it too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .. import __version__
from ..errors import CompileError, CudaError
from . import cache

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# For GPUs that none of the cubins runs on. 8.0 is the first with the tensor-core
# instructions that the kernels use.
PTX_ARCHITECTURE = "compute_80"
OPTIONS = ("--std=c++17",)
_MANIFEST = "manifest.json"
_log = logging.getLogger("cycnn")


def source_directory() -> Path:
    """The folder of the ``.cu`` files: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "cuda"


def libraries(directory: Path | None = None) -> list[str]:
    """Names of the kernel files, without ``.cu``."""
    directory = directory or source_directory()
    return sorted(path.stem for path in directory.glob("*.cu"))


def _options(extra: tuple) -> tuple:
    # line numbers for compute-sanitizer and profilers; they make cubins larger
    lines = ("-lineinfo",) if os.environ.get("CYCNN_LINEINFO", "0") != "0" else ()
    return OPTIONS + lines + extra


@functools.lru_cache(maxsize=None)
def _sources(directory: Path) -> dict:
    folders = (directory, directory / "templates")
    return {
        path.name: path.read_text(encoding="utf-8")
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix in (".cu", ".cuh")
    }


def _headers(sources: dict) -> dict:
    return {name: text for name, text in sources.items() if name.endswith(".cuh")}


def digest(name: str, sources: dict, options: tuple) -> str:
    """SHA-256 over what a compiled library depends on, but for compiler and GPU."""
    found = hashlib.sha256()
    for part in (name, *options):
        found.update(part.encode() + b"\0")
    parts = {**_headers(sources), name + ".cu": sources[name + ".cu"]}
    for file, text in sorted(parts.items()):
        found.update(file.encode() + b"\0" + text.encode() + b"\0")
    return found.hexdigest()


def load(name: str, arch: str, options: tuple = ()) -> bytes:
    """An image of ``cuda/<name>.cu`` that runs on ``arch``.

    Parameters
    ----------
    name : str
        Stem of the file.
    arch : str
        Architecture of the device, for instance ``"sm_90"``.
    options : tuple of str
        Further options for the compiler, which specialise the kernels.

    Returns
    -------
    bytes
        A cubin, or PTX text.

    Raises
    ------
    CompileError
        If the source does not compile.
    CudaError
        If nothing shipped fits and NVRTC is not installed.
    """
    image, key = _find(name, arch, options)
    if image is None:
        sources = _sources(source_directory())
        image = compile_source(
            sources[name + ".cu"],
            name + ".cu",
            arch,
            _options(options),
            _headers(sources),
        )
        cache.write(key, image)
    return image


def _find(name, arch, options) -> tuple:
    """(image, key in the cache): one that was shipped, or cached, or None."""
    options = _options(options)
    wanted = digest(name, _sources(source_directory()), options)
    image = _shipped(name, wanted, arch)
    if image is not None:
        return image, None
    key = hashlib.sha256(
        "\0".join((wanted, arch, nvrtc_version_text(), __version__)).encode()
    ).hexdigest()
    return cache.read(key), key


def _shipped(name, wanted, arch) -> bytes | None:
    folder = source_directory() / "cubin"
    manifest = _manifest(folder)
    entry = manifest.get(name)
    if entry is None or entry["digest"] != wanted:
        return None
    target = _fitting(arch, entry["files"]) if not arch.endswith("a") else None
    if target is None:
        return None
    data = (folder / entry["files"][target]["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["files"][target]["sha256"]:
        raise CudaError(
            f"{folder / entry['files'][target]['file']} is damaged: install cycnn again"
        )
    return data


def _capability(arch: str) -> tuple:
    number = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)a?", arch)
    return int(number[1]), int(number[2])


def _fitting(arch: str, available) -> str | None:
    """The best of the shipped targets: a cubin runs on later minors of its major."""
    major, minor = _capability(arch)
    cubins = [
        target
        for target in available
        if target.startswith("sm_")
        and _capability(target)[0] == major
        and _capability(target)[1] <= minor
    ]
    if cubins:
        return max(cubins, key=_capability)
    if PTX_ARCHITECTURE in available and _capability(PTX_ARCHITECTURE) <= (major, minor):
        return PTX_ARCHITECTURE
    return None


@functools.lru_cache(maxsize=None)
def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["libraries"]
    except FileNotFoundError:
        return {}


# Many at once


def prepare(requests, jobs: int | None = None) -> int:
    """Compile in parallel what :func:`load` would compile one after the other.

    NVRTC compiles one program at a time in a process, so there are several, which put
    what they make into the cache. They are fresh interpreters that import this module
    and nothing of the program that runs.

    Parameters
    ----------
    requests : iterable of (str, str, tuple of str)
        Arguments of :func:`load`. What is shipped or cached is passed over.
    jobs : int, optional
        Processes at most; 1 compiles in this one, as a single kernel always is.
        Default: one for each processor that this process may use, and 16 at most.

    Returns
    -------
    int
        How many were compiled. What does not compile, or not without NVRTC or a cache
        that can be written, is left for :func:`load` to complain about.
    """
    try:
        missing = _missing(requests)
    except CudaError:  # without NVRTC, for one
        return 0
    if not missing or not cache.usable():
        return 0
    if jobs is None:
        jobs = min(_processors(), _MOST_JOBS)
    jobs = min(jobs, len(missing))
    if jobs < 2 or not _is_interpreter(sys.executable):
        for request in missing:
            _try(request)
    else:
        _log.info("compiling %d kernels in %d processes", len(missing), jobs)
        _compile_apart(missing, jobs)
    return len(missing) - len(_missing(missing))


def _missing(requests) -> list:
    """Those that nothing is there for, once each; first what takes longest, roughly."""
    sources = _sources(source_directory())
    found = [
        request for request in dict.fromkeys(requests) if _find(*request)[0] is None
    ]
    return sorted(found, key=lambda request: -len(sources[request[0] + ".cu"]))


_MOST_JOBS = 16  # each takes some 200 MB


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_interpreter(executable) -> bool:
    # of a frozen program, or one that embeds Python, it is that program: it would run
    # again
    name = Path(executable or "").name.lower()
    return name.startswith("python") and not getattr(sys, "frozen", False)


# -I keeps the current folder and the environment out; the path is this process's.
_WORKER = """\
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
sys.path[:] = job["path"]
from cycnn.gpu.compile import _work
_work(job)
"""


def _compile_apart(requests, jobs) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="cycnn-") as folder:
            job = {
                "path": [entry for entry in sys.path if isinstance(entry, str)],
                "folder": folder,
                "requests": requests,
            }
            file = Path(folder) / "job.json"
            file.write_text(json.dumps(job), encoding="utf-8")
            _run_apart([sys.executable, "-I", "-c", _WORKER, str(file)], jobs)
    except OSError as error:
        _log.info("kernels are compiled one by one: %s", error)


def _run_apart(command, jobs) -> None:
    nothing, running = subprocess.DEVNULL, []
    try:
        for _ in range(jobs):
            running.append(
                subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
            )
        for process in running:
            process.wait()
    finally:
        # after Ctrl-C, say; who is done already does not mind
        for process in running:
            process.kill()
            process.wait()


def _work(job) -> None:
    """What a process does: each request that none of the others has taken."""
    for number, (name, arch, options) in enumerate(job["requests"]):
        try:
            with open(Path(job["folder"]) / f"{number}.taken", "x"):
                pass
        except FileExistsError:
            continue
        _try((name, arch, tuple(options)))


def _try(request) -> None:
    with contextlib.suppress(CompileError, CudaError):
        load(*request)


# NVRTC


def _nvrtc():
    try:
        from cuda.bindings import nvrtc

        status, *_ = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CudaError(
            f"a kernel must be compiled and NVRTC cannot be loaded ({error}). "
            f"pip install 'cycnn[jit]' brings it.",
            call="nvrtcVersion",
        ) from None
    _check(nvrtc, status, "nvrtcVersion")
    return nvrtc


def _check(nvrtc, status, call):
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CudaError(
            f"{call} failed: {status.name}", int(status), status.name, call
        )


def nvrtc_version() -> tuple:
    """(major, minor) of NVRTC; CudaError where it is not installed."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def nvrtc_version_text() -> str:
    return ".".join(map(str, nvrtc_version()))


def compile_source(source, filename, arch, options=OPTIONS, headers=None) -> bytes:
    """Compile CUDA C++ with NVRTC; no GPU is needed.

    Parameters
    ----------
    source : str
    filename : str
        Shown in messages.
    arch : str
        ``"sm_90"`` gives a cubin, ``"compute_80"`` PTX.
    options : tuple of str
    headers : dict of str
        Text by name, for ``#include "name"``.

    Raises
    ------
    CompileError
        With the compiler's whole log and the numbered source.
    """
    nvrtc = _nvrtc()
    headers = headers or {}
    status, program = nvrtc.nvrtcCreateProgram(
        source.encode(),
        filename.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    _check(nvrtc, status, "nvrtcCreateProgram")
    try:
        arguments = [option.encode() for option in (f"--gpu-architecture={arch}", *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if status == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION:
            raise _compile_error(nvrtc, program, source, filename, arch)
        _check(nvrtc, status, "nvrtcCompileProgram")
        if arch.startswith("sm_"):
            size, get = nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN
        else:
            size, get = nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX
        status, length = size(program)
        _check(nvrtc, status, size.__name__)
        buffer = b" " * length
        (status,) = get(program, buffer)
        _check(nvrtc, status, get.__name__)
        return buffer
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile_error(nvrtc, program, source, filename, arch):
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * length
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.decode(errors="replace").rstrip("\0 \n")
    numbered = "\n".join(
        f"{number:5} {line}" for number, line in enumerate(source.splitlines(), 1)
    )
    return CompileError(
        f"{filename} does not compile for {arch}:\n{log}", log, f"{filename}\n{numbered}"
    )


# The build


def build_all(source_dir: Path, output_dir: Path, jobs: int) -> list[Path]:
    """Compile every kernel file for every architecture, as the package ships them.

    Parameters
    ----------
    source_dir : Path
        Folder of the ``.cu`` and ``.cuh`` files.
    output_dir : Path
        Where the images and their manifest go. Images that are up to date stay.
    jobs : int
        Number of processes.

    Returns
    -------
    list of Path
        All files of ``output_dir`` that belong to the package.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    sources, options = _sources(source_dir), OPTIONS
    compiler = nvrtc_version_text()
    before = _read_build_manifest(output_dir)
    if before.get("nvrtc") != compiler:
        before = {}
    made, tasks = {}, {}
    with ProcessPoolExecutor(max_workers=max(1, jobs)) as pool:
        for name in libraries(source_dir):
            wanted = digest(name, sources, options)
            entry = before.get("libraries", {}).get(name)
            if entry and entry["digest"] == wanted and _intact(output_dir, entry):
                made[name] = entry
                continue
            made[name] = {"digest": wanted, "files": {}}
            for target in (*ARCHITECTURES, PTX_ARCHITECTURE):
                tasks[name, target] = pool.submit(
                    compile_source,
                    sources[name + ".cu"],
                    name + ".cu",
                    target,
                    options,
                    _headers(sources),
                )
        for (name, target), task in tasks.items():
            image = task.result()
            suffix = "cubin" if target.startswith("sm_") else "ptx"
            file = f"{name}.{target}.{suffix}"
            (output_dir / file).write_bytes(image)
            made[name]["files"][target] = {
                "file": file,
                "sha256": hashlib.sha256(image).hexdigest(),
            }
    manifest = output_dir / _MANIFEST
    text = json.dumps({"nvrtc": compiler, "libraries": made}, indent=1)
    manifest.write_text(text + "\n", encoding="utf-8")
    kept = [
        output_dir / file["file"]
        for entry in made.values()
        for file in entry["files"].values()
    ]
    for stale in set(output_dir.iterdir()) - {*kept, manifest}:
        stale.unlink()
    return [*kept, manifest]


def _read_build_manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _intact(folder: Path, entry: dict) -> bool:
    return all(
        (folder / file["file"]).is_file()
        and hashlib.sha256((folder / file["file"]).read_bytes()).hexdigest()
        == file["sha256"]
        for file in entry["files"].values()
    )
