"""The kernels without a GPU: they compile, and are what the launches take them for."""

import functools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from cycnn.gpu import compile as kernel_compile  # noqa: E402

SOURCES = kernel_compile.source_directory()
# Every Kernel(...) of ops/cuda.py, found by running it with a Kernel that only notes
# what it is given; the GPU modules need not be built for that.
COLLECT = """
import json, sys, types
made = []
launch = types.ModuleType("cycnn.gpu.launch")
launch.Kernel = lambda library, name, signature: made.append((library, name, signature))
device = types.ModuleType("cycnn.gpu.device")
device.get = None
import cycnn.gpu
cycnn.gpu.device, cycnn.gpu.launch = device, launch
sys.modules["cycnn.gpu.device"] = device
sys.modules["cycnn.gpu.launch"] = launch
import cycnn.ops.cuda
print(json.dumps(made))
"""
LETTERS = {"int": "i", "uint32": "u", "int64": "q", "uint64": "Q", "float": "f"}
PTX_TYPES = {"P": "u64", "i": "u32", "u": "u32", "q": "u64", "Q": "u64", "f": "f32"}
LIBRARIES = (
    "activation", "augment", "avgpool", "batch_norm", "blocks", "conv", "data",
    "depthwise", "dropout", "elementwise", "gemm", "layer_norm", "loss", "maxpool",
    "optim", "reduce", "softmax",
)  # fmt: skip


@pytest.fixture(scope="session")
def declared(tmp_path_factory):
    """{library: {kernel: signature}} as ops/cuda.py declares them."""
    root = Path(kernel_compile.__file__).resolve().parent.parent.parent
    out = subprocess.run(
        [sys.executable, "-c", COLLECT],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    found = {}
    for library, name, signature in json.loads(out.stdout):
        assert name not in found.setdefault(library, {}), f"{name} is declared twice"
        found[library][name] = signature
    return found


def read(library):
    return (SOURCES / f"{library}.cu").read_text(encoding="utf-8")


def source_kernels(library):
    """[(pattern of the name, signature)] of the ``extern "C" __global__`` functions."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", read(library), flags=re.DOTALL)
    text = text.replace("\\\n", " ")
    kernels = []
    for name, parameters in re.findall(
        r'extern "C" __global__\s+(?:__launch_bounds__\([^)]*\)\s+)?void\s+([\w#]+)\s*'
        r"\(([^)]*)\)",
        text,
    ):
        # a name pasted together in a macro, gemm_##NAME##_##TILE, has parts that vary
        pattern = re.sub(r"##[A-Z]+(?:##)?", r"\\w+", name)
        signature = ""
        for parameter in parameters.split(","):
            kind = parameter.replace("const ", "").split()[0]
            signature += "P" if "*" in parameter else LETTERS[kind]
        kernels.append((pattern, signature))
    return kernels


@functools.lru_cache(maxsize=None)
def ptx_of(library):
    headers = {path.name: path.read_text("utf-8") for path in SOURCES.glob("*.cuh")}
    ptx = kernel_compile.compile_source(
        read(library), f"{library}.cu", kernel_compile.PTX_ARCHITECTURE,
        kernel_compile.OPTIONS, headers,
    )  # fmt: skip
    return ptx.rstrip(b"\0").decode()


def ptx_entries(ptx):
    """{kernel: [types of its parameters]}"""
    return {
        name: re.findall(r"\.param \.(\w+)", parameters)
        for name, parameters in re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    }


def test_every_library_is_looked_at(declared):
    assert set(declared) == set(LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES)
def test_declarations_match_the_source(declared, library):
    kernels = source_kernels(library)
    assert kernels
    for name, signature in declared[library].items():
        matching = [found for pattern, found in kernels if re.fullmatch(pattern, name)]
        assert matching == [signature], name


@pytest.mark.parametrize("library", LIBRARIES)
def test_declarations_match_what_the_compiler_made(declared, library):
    entries = ptx_entries(ptx_of(library))
    assert entries == {
        name: [PTX_TYPES[letter] for letter in signature]
        for name, signature in declared[library].items()
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_double_arithmetic_and_no_float_atomics(library):
    ptx = ptx_of(library)
    assert ".f32" in ptx
    assert ".f64" not in ptx
    assert not re.findall(r"\b(?:atom|red)\.\S*\.(?:f|bf)\d+\S*", ptx)


@pytest.mark.parametrize("library", LIBRARIES)
def test_includes_are_our_own(library):
    included = re.findall(r"^\s*#\s*include\s*(.*)$", read(library), re.MULTILINE)
    assert all(re.fullmatch(r'"\w+\.cuh"', name) for name in included)
    assert all((SOURCES / name.strip('"')).is_file() for name in included)


# A cubin's section .nv.info is a list of attributes; number 0x11 gives the bytes of
# local memory that a function keeps on its stack.
FRAME_SIZE, WITH_VALUE = 0x11, 4


def frame_sizes(cubin):
    """{kernel: bytes of stack}, out of the ELF sections of a cubin."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)
    ]

    def text(section, at):
        start = headers[section][4] + at
        return cubin[start : cubin.index(b"\0", start)].decode()

    sections = {text(names_at, header[0]): header for header in headers}
    symbols, info = sections[".symtab"], sections[".nv.info"]
    found = {}
    at, end = info[4], info[4] + info[5]
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == WITH_VALUE:
            if attribute == FRAME_SIZE:
                symbol, bytes_ = struct.unpack_from("<II", cubin, at)
                (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
                found[text(symbols[6], name)] = bytes_
            at += length
    return found


SPILLS = """
extern "C" __global__ void spills(int* x, int i) {
  int local[64] = {};
  for (int j = 0; j < 64; ++j) local[x[j] & 63] = j;
  x[i] = local[x[i] & 63];
}
extern "C" __global__ void does_not(int* x) { *x = 1; }
"""


def test_stack_is_found_where_there_is_some():
    cubin = kernel_compile.compile_source(SPILLS, "spills.cu", "sm_90")
    sizes = frame_sizes(cubin)
    assert sizes["spills"] >= 256 and sizes["does_not"] == 0


@pytest.mark.parametrize("arch", kernel_compile.ARCHITECTURES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_compiles_without_spilling(declared, library, arch):
    sizes = frame_sizes(kernel_compile.load(library, arch))
    assert set(declared[library]) <= set(sizes)
    # beside the kernels there are subroutines of theirs, such as a division's slow path
    assert {name: size for name, size in sizes.items() if size} == {}
