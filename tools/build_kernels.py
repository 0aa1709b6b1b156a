"""Compile cuda/*.cu with NVRTC for every architecture that is shipped; needs no GPU.

    python tools/build_kernels.py OUTPUT_FOLDER [JOBS]

The build runs this as a process of its own: NVRTC's library is found through
LD_LIBRARY_PATH, which a process reads only when it starts. Exit status 3: NVRTC cannot
be used here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_NVRTC = 3


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from cycnn.errors import CompileError, CudaError
    from cycnn.gpu import compile as kernels

    folder = Path(arguments[0])
    jobs = int(arguments[1]) if len(arguments) > 1 else os.cpu_count() or 1
    try:
        version = kernels.nvrtc_version()
    except CudaError as error:
        print(error, file=sys.stderr)
        return NO_NVRTC
    try:
        made = kernels.build_all(ROOT / "cuda", folder, jobs)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in made)
    print(
        f"cycnn: kernels compiled with NVRTC {version[0]}.{version[1]}: "
        f"{len(made)} files, {size / 1e6:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
