"""The command ``cycnn``: what this installation can use, and its cache."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time

from . import __version__, cuda_unavailable_reason
from .errors import CompileError, CudaError

_PRECISIONS = ("fp32", "tf32", "bf16")
# Multiprocessors, on which tiles depend, of a common GPU of each kind: A100, A40, L40S,
# H100 and H200 (SXM), B200, RTX 5090.
_PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
}
_IMAGES = 60_000  # of MNIST, which the reference network trains on


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
    warm = commands.add_parser(
        "warm",
        help="compile the kernels of the reference network ahead, into the cache",
    )
    warm.add_argument(
        "--arch",
        nargs="+",
        type=_machine,
        metavar="ARCH[:SMS]",
        help="GPUs to compile for: sm_90, or sm_90:114 for a number of multiprocessors "
        "other than the usual, on which some kernels depend (default: this machine's)",
    )
    warm.add_argument("--batch-size", type=int, default=128)
    warm.add_argument(
        "--precision", nargs="+", choices=_PRECISIONS, default=_PRECISIONS
    )
    warm.add_argument("--jobs", type=int, help="processes (default: as many as CPUs)")
    options = parser.parse_args(argv)
    if options.command == "warm":
        for name in ("batch_size", "jobs"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                warm.error(f"--{name.replace('_', '-')} must be at least 1")
        return _warm(options)
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


def _machine(text):
    """("sm_90", 132) from "sm_90" or "sm_90:132"."""
    match = re.fullmatch(r"(sm_(\d+)\d)(?::([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like sm_90 or sm_90:132")
    arch, major, processors = match.groups()
    if int(major) < 8:
        raise argparse.ArgumentTypeError(f"{arch} has no fused kernels, only sm_80 on")
    if processors is None and arch not in _PROCESSORS:
        raise argparse.ArgumentTypeError(
            f"{arch}: say how many multiprocessors it has, as in {arch}:20"
        )
    return arch, int(processors or _PROCESSORS[arch])


def _warm(options) -> int:
    from .gpu import cache, compile

    if not cache.usable():
        return 1
    try:
        compile.nvrtc_version()
        machines = options.arch or _own_machines()
        for arch, processors in machines:
            start = time.perf_counter()
            requests = _reference_requests(arch, processors, options)
            made = compile.prepare(requests, options.jobs)
            for request in requests:
                compile.load(*request)  # what could not be compiled says so
            print(
                f"{arch}, {processors} SMs: {len(requests)} kernels, {made} compiled in "
                f"{time.perf_counter() - start:.1f} s"
            )
    except (CompileError, CudaError, ImportError) as error:
        # an ImportError: built without GPU modules
        print(f"cycnn warm: {error}", file=sys.stderr)
        return 1
    print(f"cache {_cache_text()}")
    return 0


def _own_machines():
    reason = cuda_unavailable_reason()
    if reason is not None:
        raise CudaError(f"no GPU to compile for ({reason}); name one with --arch")
    from .gpu import device

    found = [device.get(index) for index in range(device.count())]
    return list(dict.fromkeys((gpu.arch, gpu.sm_count) for gpu in found))


def _reference_requests(arch, processors, options):
    """What :func:`gpu.compile.load` is asked for by the reference network.

    When it trains, is evaluated, and predicts one image.
    """
    from . import nn
    from .nn.fuse import forward_kernels
    from .nn.inference import BATCH
    from .ops import fused

    machine = fused.machine(arch, processors)
    objective = nn.Objective(nn.reference_network(), nn.NLLLoss(), fused=True)
    batches = {options.batch_size, _IMAGES % options.batch_size} - {0}
    kernels = [
        kernel
        for precision in options.precision
        for batch in sorted(batches)
        for gather in (True, False)  # captured steps, and eager ones
        for kernel in objective.kernels((batch, 1, 28, 28), machine, precision, gather)
    ]
    for precision in options.precision:
        for batch in (BATCH, 1):
            shape = batch, 1, 28, 28
            kernels += forward_kernels(objective.model, shape, machine, precision)
    return list(dict.fromkeys(kernel.request(arch) for kernel in kernels))


def _cache_text():
    from .gpu import cache

    found = cache.entries()
    size = sum(path.stat().st_size for path in found)
    return f"{cache.kernels()}: {len(found)} kernels, {size / 1e6:.1f} MB"


def _clear():
    from .gpu import cache

    print(f"{cache.kernels()}: {cache.clear()} kernels deleted")
