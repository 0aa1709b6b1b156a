"""Build of cycnn: Cython extension modules and precompiled CUDA kernels.

What can be said without running code is in pyproject.toml. Here is the rest: finding
the CUDA headers, asking the compiler what it can do, and compiling the kernels.

Environment
-----------
CYCNN_BUILD_GPU
    ``1``: the build fails where it cannot make the GPU modules and the kernels.
    ``0``: a CPU-only build. Unset: with GPU modules where they can be built.
CYCNN_COVERAGE
    ``1``: the extension modules report lines to coverage.py (slower).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
# A PEP 517 build does not put the source tree on the path; cycnn.gpu.compile is there.
sys.path.insert(0, str(ROOT))

PACKAGES = [
    "cycnn",
    "cycnn.data",
    "cycnn.gpu",
    "cycnn.nn",
    "cycnn.onnx",
    "cycnn.ops",
    "cycnn.optim",
    "cycnn.train",
    "cycnn.kernels",
]
# The kernels live in cuda/, which must not be a package of its own: cuda-python's
# package is called `cuda` too.
PACKAGE_DIR = {"cycnn.kernels": "cuda"}

CUDA_MAJOR = 13
# What the .pxd files of cydriver and cyruntime include, directly or not.
CUDA_HEADERS = (
    "cuda.h",
    "cudaProfiler.h",
    "cuda_runtime_api.h",
    "crt/host_defines.h",
)

# The exit status of tools/build_kernels.py where there is no NVRTC.
NO_NVRTC = 3

COVERAGE = os.environ.get("CYCNN_COVERAGE") == "1"
CYTHON_DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "embedsignature": True,
    "linetrace": COVERAGE,
}


def say(message: str) -> None:
    print(f"cycnn: {message}", flush=True)


def gpu_wanted() -> bool | None:
    """CYCNN_BUILD_GPU as a bool, or None where the choice is left to the build."""
    value = os.environ.get("CYCNN_BUILD_GPU", "")
    if value not in ("", "0", "1"):
        raise SetupError(
            f"CYCNN_BUILD_GPU={value!r} is not understood: give 1 (a build without GPU "
            f"support fails), 0 (CPU only), or leave it unset"
        )
    return None if value == "" else value == "1"


def include_candidates():
    """Folders that may hold the CUDA headers, the likeliest first."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield Path(folder) / f"cu{CUDA_MAJOR}" / "include"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes.append("/usr/local/cuda")
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(f"/usr/local/cuda-{CUDA_MAJOR}")
    for home in homes:
        if home:
            yield Path(home) / "include"


def nvrtc_folders():
    """Folders with a library of NVRTC, the likeliest first."""
    for include in include_candidates():
        for name in ("lib64", "lib"):
            if (include.parent / name / f"libnvrtc.so.{CUDA_MAJOR}").exists():
                yield include.parent / name


def header_version(include: Path) -> int | None:
    """The CUDA_VERSION that cuda.h defines, such as 13000."""
    text = (include / "cuda.h").read_text(errors="replace")
    found = re.search(r"^#define\s+CUDA_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def find_cuda_headers() -> tuple[Path | None, list[str]]:
    """The include folder with all the headers of CUDA 13, and why others are not it."""
    rejected = []
    for include in dict.fromkeys(include_candidates()):
        missing = [name for name in CUDA_HEADERS if not (include / name).is_file()]
        if len(missing) == len(CUDA_HEADERS):
            rejected.append(f"{include}: no CUDA headers")
            continue
        if missing:
            rejected.append(f"{include}: lacks {', '.join(missing)}")
            continue
        version = header_version(include)
        if version is None or version // 1000 != CUDA_MAJOR:
            rejected.append(
                f"{include}: CUDA_VERSION is {version}, not {CUDA_MAJOR}xxx"
            )
            continue
        return include, rejected
    return None, rejected


def find_cuda_bindings() -> Path | None:
    """The folder of cuda.bindings with its .pxd files, or None."""
    try:
        spec = importlib.util.find_spec("cuda.bindings")
    except ModuleNotFoundError:
        return None
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "cyruntime.pxd").is_file():
            return Path(folder)
    return None


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def extensions(pattern: str, language: str) -> list[Extension]:
    return [
        Extension(
            module_name(p),
            [str(p.relative_to(ROOT))],
            language=language,
            # Headers of our own lie beside the .pyx, the generated file does not.
            include_dirs=[str(p.relative_to(ROOT).parent)],
        )
        for p in sorted(ROOT.glob(pattern))
    ]


class BuildExt(build_ext):
    """Cython, the C and C++ compilers, then NVRTC: each on all cores."""

    def initialize_options(self):
        super().initialize_options()
        self.gpu = False
        self.kernel_files = []

    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None or self.parallel is True:
            self.parallel = os.cpu_count() or 1

    def run(self):
        super().run()
        if self.gpu:
            self.compile_kernels()

    def build_extensions(self):
        self.check_compiler()
        gpu = [e for e in self.extensions if e.name.startswith("cycnn.gpu.")]
        include = self.cuda_include()
        self.gpu = include is not None
        if not self.gpu:
            self.extensions = [e for e in self.extensions if e not in gpu]
        openmp = ["-fopenmp"] if self.compiles(["-fopenmp"], OPENMP_PROBE) else []
        if COVERAGE:
            openmp = []  # what traces a line may leave a parallel loop, which C forbids
        elif not openmp:
            say("this compiler has no OpenMP: the CPU operations will use one core")
        for extension in self.extensions:
            loops = extension.name.startswith("cycnn.ops._cpu")
            # What follows the compiler's own flags wins; a person's CFLAGS shall too.
            if self.compiler.compiler_type == "unix" and not os.environ.get("CFLAGS"):
                extension.extra_compile_args += ["-g0", "-O3" if loops else "-O2"]
            if extension.name == "cycnn.ops._cpu_augment":
                # a fused product and sum would round differently from the GPU
                if self.compiles(["-ffp-contract=off"], C_PROBE):
                    extension.extra_compile_args += ["-ffp-contract=off"]
            if loops:
                extension.extra_compile_args += openmp
                extension.extra_link_args += openmp
            if COVERAGE:
                extension.define_macros += [("CYTHON_TRACE_NOGIL", "1")]
            if self.gpu and extension in gpu:
                extension.include_dirs += [str(include)]
        self.cythonise()
        super().build_extensions()

    def cythonise(self):
        from Cython.Build import cythonize

        done = cythonize(
            self.extensions,
            # coverage.py's plugin looks for the C files beside their sources
            build_dir=None if COVERAGE else str(Path("build") / "cython"),
            compiler_directives=CYTHON_DIRECTIVES,
            nthreads=min(self.parallel, len(self.extensions)),
        )
        # setuptools has annotated its own Extension objects: keep them, take the files.
        made = {e.name: e for e in done}
        for extension in self.extensions:
            extension.sources = made[extension.name].sources
            extension.depends = made[extension.name].depends

    def compiles(self, flags, source, suffix=".c", include=()) -> bool:
        """Whether the compiler accepts, and the linker too, a small program."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"probe{suffix}"
            path.write_text(source)
            with quiet():
                try:
                    objects = self.compiler.compile(
                        [str(path)],
                        output_dir=folder,
                        include_dirs=[*self.compiler.include_dirs, *map(str, include)],
                        extra_preargs=list(flags),
                    )
                    self.compiler.link_shared_object(
                        objects,
                        str(Path(folder) / "probe.so"),
                        extra_preargs=list(flags),
                    )
                except Exception:
                    return False
        return True

    def check_compiler(self):
        if not self.compiles([], "#include <Python.h>\n"):
            raise CompileError(
                "a C program that includes Python.h does not compile. cycnn needs a C "
                "and C++ compiler and Python's headers; on Debian or Ubuntu: "
                "apt-get install g++ python3-dev"
            )

    def cuda_include(self) -> Path | None:
        """The CUDA headers to build with, or None for a CPU-only build."""
        if gpu_wanted() is False:
            say("CPU-ONLY BUILD: CYCNN_BUILD_GPU=0 asks for one")
            return None
        include, rejected = find_cuda_headers()
        if not sys.platform.startswith("linux"):
            problem = "GPU support is built on Linux only"
        elif find_cuda_bindings() is None:
            problem = (
                "cuda-bindings is not installed (pip install 'cuda-bindings>=13,<14')"
            )
        elif include is None:
            problem = "no headers of CUDA 13 were found:\n  " + "\n  ".join(rejected)
        elif not self.compiles([], CUDA_PROBE, ".cpp", [include]):
            problem = f"the C++ compiler cannot use the CUDA headers in {include}"
        else:
            say(f"GPU modules: with the CUDA headers in {include}")
            return include
        if gpu_wanted():
            raise SetupError(f"CYCNN_BUILD_GPU=1, but {problem}")
        say(f"CPU-ONLY BUILD: {problem}")
        return None

    def kernel_folder(self) -> Path:
        if self.inplace:
            return ROOT / "cuda" / "cubin"
        return Path(self.build_lib) / "cycnn" / "kernels" / "cubin"

    def compile_kernels(self):
        folder = self.kernel_folder()
        # Isolated builds have the wheel with NVRTC on the module path, where
        # cuda.bindings does not look for the library: it asks the loader.
        libraries = [str(path) for path in nvrtc_folders()]
        libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
        status = subprocess.run(
            [sys.executable, ROOT / "tools" / "build_kernels.py", folder],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            },
        ).returncode
        if status == NO_NVRTC and not gpu_wanted():
            say("NO PRECOMPILED KERNELS: no NVRTC; they are compiled when first used")
            shutil.rmtree(folder, ignore_errors=True)
            return
        if status:
            raise CompileError("the CUDA kernels were not compiled, see above")
        self.kernel_files = sorted(map(str, folder.iterdir()))

    def get_outputs(self):
        return [*super().get_outputs(), *self.kernel_files]


class Build(build):
    """The build, without leftovers of an earlier one.

    build/ may hold a file that has been renamed since, and everything in it goes into
    the wheel.
    """

    def run(self):
        super().run()
        outputs = {
            os.path.realpath(path)
            for name in self.get_sub_commands()
            for path in self.get_finalized_command(name).get_outputs()
        }
        for path in Path(self.build_lib).glob("cycnn/**/*"):
            if path.is_file() and os.path.realpath(path) not in outputs:
                path.unlink()


class quiet:
    """Keeps the compiler's complaints about a probe off the screen."""

    def __enter__(self):
        sys.stdout.flush()
        sys.stderr.flush()
        self.saved = os.dup(1), os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_):
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in zip((1, 2), self.saved):
            os.dup2(saved, number)
            os.close(saved)


C_PROBE = "int nothing;\n"
OPENMP_PROBE = """
#include <omp.h>
int threads(void) { return omp_get_max_threads(); }
"""
CUDA_PROBE = """
#include <cuda.h>
#include <cuda_runtime_api.h>
CUresult status = CUDA_SUCCESS;
cudaError_t error = cudaSuccess;
"""

# Guarded: workers that Cython and the kernel build start may import this file again.
if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir=PACKAGE_DIR,
        package_data={
            "cycnn": ["*.pyi", "py.typed"],
            "cycnn.gpu": ["*.pxd"],
            "cycnn.kernels": ["*.cu", "*.cuh", "README.md", "templates/*"],
        },
        include_package_data=False,
        ext_modules=[
            *extensions("cycnn/*.pyx", "c"),
            *extensions("cycnn/ops/*.pyx", "c"),
            *extensions("cycnn/gpu/*.pyx", "c++"),
        ],
        cmdclass={"build": Build, "build_ext": BuildExt},
    )
