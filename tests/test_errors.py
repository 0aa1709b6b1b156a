"""Exceptions keep what they carry, through pickle too."""

import pickle

import pytest

from cycnn import errors


def test_cuda_errors_pickle_with_their_status():
    error = errors.OutOfMemoryError("no", 2, "cudaErrorMemoryAllocation", "cudaMalloc")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.OutOfMemoryError
    assert (again.status, again.name, again.call) == (error.status, error.name, error.call)
    assert str(again) == "no"


def test_compile_errors_pickle_with_their_log():
    again = pickle.loads(pickle.dumps(errors.CompileError("no", "log", "source")))
    assert (again.log, again.source) == ("log", "source")


@pytest.mark.parametrize(
    "special, general",
    [
        (errors.OutOfMemoryError, MemoryError),
        (errors.OutOfMemoryError, errors.CudaError),
        (errors.ShapeError, ValueError),
        (errors.DataError, ValueError),
    ],
)
def test_errors_can_be_caught_by_their_builtin_kin(special, general):
    assert issubclass(special, general)


@pytest.mark.parametrize(
    "of_runtime, of_driver, advice",
    [
        ("cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS", "compute-sanitizer"),
        ("cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "restart it"),
        ("cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS", "restart it"),
        ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "smaller batch"),
        ("cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU", "jit"),
    ],
)
def test_runtime_and_driver_give_the_same_advice(of_runtime, of_driver, advice):
    check = pytest.importorskip("cycnn.gpu._check")
    told = [
        check._message("a call", name, "text").partition(f"{name} (text). ")[2]
        for name in (of_runtime, of_driver)
    ]
    assert advice in told[0] and told[0] == told[1]
    assert check._message("a call", "other", "text") == "a call failed: other (text)"


def test_advice_is_for_names_that_there_are():
    check = pytest.importorskip("cycnn.gpu._check")
    runtime = pytest.importorskip("cuda.bindings.runtime").cudaError_t
    driver = pytest.importorskip("cuda.bindings.driver").CUresult
    for name in check._ADVICE:
        assert hasattr(runtime if name.startswith("cudaError") else driver, name)
