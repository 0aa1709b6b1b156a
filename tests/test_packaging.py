"""What is shipped, and that it works where it is installed.

The wheel is the one that CYCNN_TEST_WHEEL names (`make test` has built it already),
else it is built here.
"""

import email
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cycnn
from cycnn.gpu import compile as kernel_compile

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "cycnn/kernels/"
GPU_BUILD = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
gpu_build = pytest.mark.skipif(not GPU_BUILD, reason="a CPU-only platform")


def call(*command, cwd, **environment):
    """Run a command that must succeed; what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def build(hook, tree, out, **environment):
    """Call a hook of the build backend as a front end does; the file that it made."""
    code = (
        f"from setuptools.build_meta import {hook} as hook; "
        f"print('made:', hook({str(out)!r}))"
    )
    output = call(sys.executable, "-c", code, cwd=tree, **environment)
    return out / output.split("made:")[-1].strip(), output


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """A source distribution, built from a copy: the build writes into its tree."""
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    made = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".data"
    )
    shutil.copytree(ROOT, tree, ignore=made)
    return build("build_sdist", tree, tree.parent)[0]


@pytest.fixture(scope="session")
def unpacked(sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(request, tmp_path_factory):
    built = os.environ.get("CYCNN_TEST_WHEEL")
    if built:
        return Path(built)
    out = tmp_path_factory.mktemp("wheel")
    tree = request.getfixturevalue("unpacked")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, tree, cwd=out)
    return next(out.glob("cycnn-*.whl"))


@pytest.fixture(scope="session")
def files(wheel):
    """Name to content of the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def metadata(files):
    name = next(name for name in files if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(files[name])


def install(wheel, folder):
    """A virtual environment with this wheel; other packages come from this one."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"),
        wheel,
        cwd=folder.parent,
    )
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(str(Path(np.__file__).resolve().parent.parent))
    return python


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("installed") / "env")


@pytest.fixture(scope="session")
def cpu_only(unpacked, tmp_path_factory):
    """(wheel, what its build printed) of a CPU-only build from the sdist."""
    out = tmp_path_factory.mktemp("cpu-only")
    return build("build_wheel", unpacked, out, CYCNN_BUILD_GPU="0", CFLAGS="-O0 -g0")


def package_folders():
    found = {p.parent.relative_to(ROOT) for p in ROOT.glob("cycnn/**/__init__.py")}
    return {".".join(folder.parts) for folder in found}


def load_setup():
    spec = importlib.util.spec_from_file_location("cycnn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The tree


def test_every_package_is_listed():
    assert set(load_setup().PACKAGES) == package_folders() | {"cycnn.kernels"}


def test_the_kernels_are_no_package():
    assert not list((ROOT / "cuda").rglob("*.py"))
    assert not (ROOT / "cuda.py").exists()


def test_cuda_python_is_importable_from_the_checkout():
    pytest.importorskip("cuda.bindings")
    call(sys.executable, "-c", "import cuda.bindings.driver", cwd=ROOT)


# The wheel


def test_version_and_licence(files, metadata):
    assert metadata["Version"] == cycnn.__version__
    assert metadata["License-Expression"] == "MIT"
    licence = next(name for name in files if name.endswith("licenses/LICENSE"))
    assert files[licence] == (ROOT / "LICENSE").read_bytes()


def test_the_base_install_is_small(wheel, metadata):
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = {re.match(r"[\w-]+", r)[0] for r in required}
    assert names == {"numpy", "safetensors", "cuda-bindings"}
    assert wheel.stat().st_size < 5e6


def test_the_wheel_holds_the_package_and_nothing_else(files):
    top = {name.split("/")[0] for name in files}
    assert top == {"cycnn", f"cycnn-{cycnn.__version__}.dist-info"}
    sources = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("cycnn/**/*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    assert not [name for name in files if name.endswith((".c", ".cpp"))]


@gpu_build
def test_every_extension_module_is_built_and_links_no_cuda(files):
    for source in ROOT.glob("cycnn/**/*.pyx"):
        stem = source.relative_to(ROOT).with_suffix("").as_posix() + "."
        modules = [n for n in files if n.startswith(stem) and n.endswith(".so")]
        assert len(modules) == 1, f"{stem}pyx is not built: {modules}"
        for library in (b"libcuda.so", b"libcudart.so", b"libnvrtc.so"):
            assert library not in files[modules[0]]


def test_the_kernel_sources_are_shipped(files):
    shipped = {n.removeprefix(KERNELS) for n in files if n.startswith(KERNELS)}
    folder = ROOT / "cuda"
    sources = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    sources = {name for name in sources if not name.startswith("cubin/")}
    assert {name for name in shipped if not name.startswith("cubin/")} == sources
    assert {"README.md", "templates/fused.cuh"} < sources


@gpu_build
def test_the_kernels_are_compiled_for_every_architecture(files):
    targets = [*kernel_compile.ARCHITECTURES, kernel_compile.PTX_ARCHITECTURE]
    assert targets == [
        *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        "compute_80",
    ]
    folder = KERNELS + "cubin/"
    expected = {"manifest.json"}
    for library in kernel_compile.libraries(ROOT / "cuda"):
        for target in targets:
            suffix = "cubin" if target.startswith("sm_") else "ptx"
            expected.add(f"{library}.{target}.{suffix}")
    shipped = {n.removeprefix(folder) for n in files if n.startswith(folder)}
    assert shipped == expected
    manifest = json.loads(files[folder + "manifest.json"])
    sources = kernel_compile._sources(ROOT / "cuda")
    for library, entry in manifest["libraries"].items():
        options = kernel_compile.OPTIONS
        assert entry["digest"] == kernel_compile.digest(library, sources, options)
        for target, file in entry["files"].items():
            magic = b"\x7fELF" if target.startswith("sm_") else b"//"
            assert files[folder + file["file"]].startswith(magic)


# The wheel, installed

USE = """
import sys
import tarfile
import numpy as np
import cycnn
from cycnn.gpu import compile

assert cycnn.__file__.startswith(sys.prefix), cycnn.__file__
scores = cycnn.nn.reference_network()(np.zeros((2, 1, 28, 28), np.float32))
assert scores.shape == (2, 10) and np.isfinite(scores.numpy()).all()
assert compile.source_directory().is_relative_to(sys.prefix)
"""


def test_the_installed_wheel_works_elsewhere(installed, tmp_path):
    call(installed, "-c", USE, cwd=tmp_path)


@gpu_build
def test_the_installed_kernels_need_no_nvrtc(installed, tmp_path):
    code = """
from cycnn.gpu import compile

def refuse():
    raise SystemExit("NVRTC was asked for")

compile._nvrtc = refuse
for name in compile.libraries():
    for arch in ("sm_75", "sm_80", "sm_87", "sm_90", "sm_103", "sm_121"):
        assert compile.load(name, arch)[:4] == b"\\x7fELF"
    assert b".target sm_80" in compile.load(name, "sm_110")
"""
    call(installed, "-c", code, cwd=tmp_path)


def test_the_command_is_installed(installed, tmp_path):
    assert "cycnn" in call(installed.parent / "cycnn", "--help", cwd=tmp_path)


# The source distribution


def test_the_sdist_holds_what_the_build_and_the_tests_need(unpacked):
    held = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*")}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "tests/conftest.py"}
    needed.add("tools/build_kernels.py")
    kernels = ("cuda/*.cu*", "cuda/templates/*.cu*")
    for pattern in ("cycnn/**/*.py", "cycnn/**/*.pyx", "cycnn/**/*.pxd", *kernels):
        needed |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)}
    assert needed <= held, needed - held
    made = [name for name in held if name.endswith((".so", ".c", ".cpp", ".cubin"))]
    assert made == []


def test_a_cpu_only_build_says_so_and_works(cpu_only, tmp_path):
    wheel, output = cpu_only
    assert "CPU-ONLY BUILD" in output
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [n for n in names if n.startswith("cycnn/gpu/") and n.endswith(".so")]
    assert not [n for n in names if n.startswith(KERNELS + "cubin")]
    python = install(wheel, tmp_path / "env")
    call(python, "-c", USE, cwd=tmp_path)
    code = "import cycnn; print(cycnn.cuda_unavailable_reason())"
    assert "built without CUDA headers" in call(python, "-c", code, cwd=tmp_path)


# Finding the CUDA headers


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """setup.py's functions, looking for headers in three folders only."""
    module = load_setup()
    monkeypatch.setattr(
        module, "include_candidates", lambda: [tmp_path / n for n in ("a", "b", "c")]
    )

    def write(folder, version=13000, without=()):
        for name in set(module.CUDA_HEADERS) - set(without):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#define CUDA_VERSION {version}\n")

    return module, write


def test_the_first_complete_headers_are_taken(headers, tmp_path):
    module, write = headers
    write("a", without=["crt/host_defines.h"])
    write("c")
    include, rejected = module.find_cuda_headers()
    assert include == tmp_path / "c"
    assert "lacks crt/host_defines.h" in rejected[0] and "no CUDA" in rejected[1]


def test_headers_of_another_cuda_are_refused(headers):
    module, write = headers
    write("b", version=12090)
    include, rejected = module.find_cuda_headers()
    assert include is None and "CUDA_VERSION is 12090" in rejected[1]


def test_a_misspelt_choice_is_refused(monkeypatch):
    module = load_setup()
    monkeypatch.setenv("CYCNN_BUILD_GPU", "yes")
    with pytest.raises(module.SetupError, match="CYCNN_BUILD_GPU='yes'"):
        module.gpu_wanted()
