"""That each tool of ``make sanitize`` sees a fault, and none in a sound kernel."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

import cycnn

# a sanitizer cannot run under a sanitizer
pytestmark = [pytest.mark.gpu, pytest.mark.no_sanitizer]

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "gpu_record", ROOT / "tools" / "gpu_record.py"
)
gpu_record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_record)

# One block of 64 threads; out has room for 64 numbers, in has them, not yet written.
KERNEL = 'extern "C" __global__ void kernel(int* out, const int* in) {{ {} }}'
SOUND = (
    "__shared__ int s[64]; s[threadIdx.x] = 1; __syncthreads(); "
    "out[threadIdx.x] = s[63 - threadIdx.x];"
)
PLANTED = {
    "memcheck": "out[threadIdx.x + 1] = 1;",
    "racecheck": SOUND.replace("__syncthreads(); ", ""),
    "initcheck": "out[threadIdx.x] = in[threadIdx.x];",
    "synccheck": "if (threadIdx.x < 33) __syncthreads(); out[threadIdx.x] = 1;",
}
PROGRAM = """
import sys
import numpy as np
from cuda.bindings import driver
from cycnn.gpu import compile, device

def call(result):
    status, *values = result
    assert status == 0, status
    return values[0] if len(values) == 1 else None

gpu = device.get(0)
cubin = compile.compile_source(sys.argv[1], "planted.cu", gpu.arch, ())
module = call(driver.cuModuleLoadData(cubin))
kernel = call(driver.cuModuleGetFunction(module, b"kernel"))
out, source = call(driver.cuMemAlloc(256)), call(driver.cuMemAlloc(256))
pointers = np.array([int(out), int(source)], np.uint64)
places = np.array([pointers.ctypes.data, pointers.ctypes.data + 8], np.uint64)
call(driver.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, 0, places.ctypes.data, 0))
driver.cuCtxSynchronize()
"""


def judge(tool, body, folder):
    script = folder / "program.py"
    script.write_text(PROGRAM)
    command = gpu_record.sanitizer_command(gpu_record.find_sanitizer(), tool)
    path = [
        str(Path(cycnn.__file__).resolve().parents[1]),
        os.environ.get("PYTHONPATH"),
    ]
    status, output = gpu_record.run(
        [*command, sys.executable, script, KERNEL.format(body)],
        PYTHONPATH=os.pathsep.join(filter(None, path)),
    )
    gpu_record.judge_sanitizer(tool, status, output)


@pytest.mark.parametrize("tool", PLANTED)
def test_a_planted_fault_is_found(tool, tmp_path):
    judge(tool, SOUND, tmp_path)
    with pytest.raises(
        gpu_record.Failed, match=rf"{tool}: .*[1-9]\d* (errors?|hazards?)"
    ):
        judge(tool, PLANTED[tool], tmp_path)
