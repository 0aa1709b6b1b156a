"""The command ``cycnn``: what this installation can use, and its cache."""

from __future__ import annotations

import argparse
import json
import platform

from . import __version__, cuda_unavailable_reason
from .errors import CudaError


def main(argv=None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cycnn", description=__doc__)
    parser.add_argument("--version", action="version", version=f"cycnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="versions, GPUs or why there is none, compiler, kernels, cache"
    )
    cache = commands.add_parser("cache", help="the folder of compiled kernels")
    cache.add_argument("action", choices=("info", "clear"))
    options = parser.parse_args(argv)
    if options.command == "info":
        _info()
    elif options.action == "info":
        print(_cache_text())
    else:
        _clear()
    return 0


def _info():
    import numpy

    rows = [
        ("cycnn", __version__),
        ("python", f"{platform.python_version()}, NumPy {numpy.__version__}"),
        *_gpu_rows(),
        ("nvrtc", _nvrtc_text()),
        ("kernels", _kernels_text()),
        ("cache", _cache_text()),
    ]
    for name, text in rows:
        print(f"{name:<8} {text}")


def _gpu_rows():
    reason = cuda_unavailable_reason()
    if reason is not None:
        yield "gpu", f"none: {reason}"
        return
    from .gpu import device

    yield "driver", "CUDA {}.{}".format(*device.driver_version())
    for index in range(device.count()):
        try:
            found = device.get(index)
        except CudaError as error:
            yield f"cuda:{index}", f"cannot be used: {error}"
        else:
            yield f"cuda:{index}", f"{found.name}, {found.arch}, {found.sm_count} SMs"


def _nvrtc_text():
    from .gpu import compile

    try:
        return "{}.{}".format(*compile.nvrtc_version())
    except CudaError:
        return "not installed; only needed for kernels that were not shipped"


def _kernels_text():
    from .gpu import compile

    manifest = compile.source_directory() / "cubin" / "manifest.json"
    try:
        shipped = json.loads(manifest.read_text(encoding="utf-8"))["libraries"]
    except FileNotFoundError:
        count = len(compile.libraries())
        return f"none shipped; NVRTC compiles {count} files on demand"
    targets = sorted(
        {target for entry in shipped.values() for target in entry["files"]},
        key=lambda target: (not target.startswith("sm_"), int(target.split("_")[1])),
    )
    return f"{len(shipped)} files shipped for {', '.join(targets)}"


def _cache_text():
    from .gpu import cache

    found = cache.entries()
    size = sum(path.stat().st_size for path in found)
    return f"{cache.kernels()}: {len(found)} kernels, {size / 1e6:.1f} MB"


def _clear():
    from .gpu import cache

    print(f"{cache.kernels()}: {cache.clear()} kernels deleted")
