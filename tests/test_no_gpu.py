"""cycnn on machines without a driver, without cuda-python, without GPU modules."""

import cycnn

# A finder that hides a module and what is in it, put before all others.
HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} or name.startswith({name!r} + "."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
# Uses the CPU like somebody who never heard of GPUs.
WORKS = """
import numpy as np
import cycnn

assert not cycnn.cuda_available()
assert cycnn.device() == "cpu"
x = cycnn.Tensor(np.arange(6.0).reshape(2, 3))
assert x.device == "cpu" and x.numpy().sum() == 15
conv = cycnn.nn.Conv2d(1, 2, 3)
assert conv(np.ones((4, 1, 5, 5), np.float32)).shape == (4, 2, 3, 3)
cycnn.synchronize()
cycnn.shutdown()
try:
    cycnn.Tensor([1.0], "cuda")
except cycnn.CudaError as error:
    print(error)
print(cycnn.cuda_unavailable_reason())
"""
# Hides every GPU from a process on a machine that has one.
NO_DEVICES = {"CUDA_VISIBLE_DEVICES": ""}


def messages(output):
    error, reason = output.splitlines()
    assert reason in error and "Use device 'cpu'" in error
    return reason


def test_no_driver_or_no_device(run_python):
    reason = messages(run_python(WORKS, **NO_DEVICES))
    here = cycnn.cuda_unavailable_reason()
    if here is not None and "NVIDIA" in here:
        assert reason == here, "no driver: then there is nothing to hide"
    else:
        assert reason == "the driver shows no GPU (CUDA_VISIBLE_DEVICES is '')"


def test_no_cuda_python(run_python):
    reason = messages(run_python(HIDE.format(name="cuda") + WORKS))
    assert reason == (
        "cuda-bindings is not installed (pip install 'cuda-bindings>=13,<14')"
    )


def test_a_build_without_gpu_modules(run_python):
    reason = messages(run_python(HIDE.format(name="cycnn.gpu.device") + WORKS))
    assert "no GPU modules" in reason


def test_a_gpu_module_that_does_not_load(run_python):
    broken = """
import importlib.abc, sys

class Break(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "cycnn.gpu.device":
            raise ImportError("libsomething.so: cannot open shared object file")

sys.meta_path.insert(0, Break())
"""
    assert "libsomething.so" in messages(run_python(broken + WORKS))


def test_the_gpu_is_looked_for_once_and_not_at_import(run_python):
    code = """
import sys
import cycnn
cycnn.Tensor([1.0], "cpu"), cycnn.nn, cycnn.optim, cycnn.data, cycnn.manual_seed(1)
print("cycnn.gpu.device" in sys.modules, "cuda" in sys.modules)

import cycnn.gpu
probe, looks = cycnn.gpu._probe, []
cycnn.gpu._probe = lambda: looks.append(1) or probe()
cycnn.cuda_available(), cycnn.cuda_unavailable_reason(), cycnn.device()
print(len(looks))
"""
    assert run_python(code).split() == ["False", "False", "1"]
