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
