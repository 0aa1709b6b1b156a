"""Tensors on the CPU: conversion at the edge, views, copies, exchange."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cycnn
from cycnn import tensor
from cycnn.errors import ShapeError


@pytest.mark.parametrize(
    "data, dtype",
    [
        (np.arange(6.0), "float32"),
        (np.arange(6, dtype=np.float16), "float32"),
        (np.arange(6), "int32"),
        (np.arange(6, dtype=np.uint8), "uint8"),
        (np.array([True, False]), "int32"),
        ([[1, 2], [3, 4]], "int32"),
        (2.5, "float32"),
    ],
)
def test_input_is_converted_once(data, dtype):
    made = cycnn.Tensor(data, "cpu")
    assert made.dtype == dtype
    assert made.shape == np.shape(data)
    np.testing.assert_array_equal(made.numpy(), np.asarray(data))


@pytest.mark.parametrize("data", [np.ones(2, complex), np.array(["a"]), [object()]])
def test_other_dtypes_are_refused(data):
    with pytest.raises(TypeError, match="expected real numbers"):
        cycnn.Tensor(data, "cpu")


def test_integers_beyond_int32_are_refused():
    with pytest.raises(TypeError, match="4294967296"):
        cycnn.Tensor(np.array([0, 2**32]), "cpu")
    assert cycnn.Tensor(np.array([2**31 - 1]), "cpu").item() == 2**31 - 1


def test_a_tensor_does_not_share_its_input():
    array = np.zeros(3, np.float32)
    made = cycnn.Tensor(array, "cpu")
    array[:] = 1
    assert made.numpy().tolist() == [0, 0, 0]
    copy = cycnn.Tensor(made)
    copy.array[:] = 2
    assert made.numpy().tolist() == [0, 0, 0]


def test_non_contiguous_input_is_copied_in_order():
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(cycnn.Tensor(array, "cpu").numpy(), array)


def test_from_array_shares_and_refuses_strides():
    array = np.zeros((2, 3), np.float32)
    tensor.from_array(array).array[0, 0] = 7
    assert array[0, 0] == 7
    with pytest.raises(TypeError, match="C-contiguous"):
        tensor.from_array(array.T)


def test_views_share_memory():
    made = cycnn.zeros((4, 3), device="cpu")
    made[1:3].array[...] = 1
    made[-1].array[...] = 2
    made.reshape(12).array[0] = 5
    expected = [[5, 0, 0], [1, 1, 1], [1, 1, 1], [2, 2, 2]]
    assert made.numpy().tolist() == expected
    assert made.reshape(2, -1).shape == (2, 6)
    assert made[4:].shape == (0, 3)
    assert len(list(made)) == 4


@pytest.mark.parametrize("shape", [(5,), (-1, 5), (-1, -1), (3, -4)])
def test_reshape_to_another_size_is_refused(shape):
    with pytest.raises(ShapeError, match="12 elements"):
        cycnn.zeros((3, 4), device="cpu").reshape(*shape)


@pytest.mark.parametrize("key", [slice(None, None, 2), 3, -4, (0, 0), 1.0])
def test_indices_that_cannot_be_views_are_refused(key):
    with pytest.raises((IndexError, TypeError)):
        cycnn.zeros((3, 4), device="cpu")[key]


def test_copy_checks_before_it_writes():
    made = cycnn.zeros((2, 2), device="cpu")
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        made.copy_(np.ones(4, np.float32))
    with pytest.raises(TypeError, match="int32"):
        made.copy_(np.ones((2, 2), int))
    assert made.numpy().sum() == 0
    assert made.copy_(np.ones((2, 2))) is made
    assert made.numpy().sum() == 4


def test_empty_tensors_are_legal():
    made = cycnn.empty((0, 3), device="cpu")
    assert made.size == made.nbytes == 0
    assert made.numpy().shape == (0, 3)
    assert made.copy_(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(-1,), (2, -3)])
def test_negative_sizes_are_refused(shape):
    with pytest.raises(ShapeError):
        cycnn.empty(shape, device="cpu")


def test_unsupported_dtype_is_named():
    with pytest.raises(TypeError, match="float64"):
        cycnn.empty(3, "float64", "cpu")


def test_scalars():
    assert float(cycnn.Tensor(2.5, "cpu")) == 2.5
    assert int(cycnn.Tensor([3], "cpu")) == 3
    with pytest.raises(TypeError, match=r"\(2,\)"):
        float(cycnn.zeros(2, device="cpu"))
    with pytest.raises(TypeError, match="no length"):
        len(cycnn.Tensor(1.0, "cpu"))


def test_numpy_sees_the_values():
    made = cycnn.Tensor([[1.0, 2.0]], "cpu")
    assert np.asarray(made).tolist() == [[1, 2]]
    assert np.asarray(made, dtype=np.float64).dtype == np.float64
    assert (np.asarray(made) * 2).tolist() == [[2, 4]]


def test_dlpack_round_trip_shares_memory():
    made = cycnn.Tensor(np.arange(6.0).reshape(2, 3), "cpu")
    array = np.from_dlpack(made)
    array[0, 0] = 9
    assert made.numpy()[0, 0] == 9
    back = cycnn.from_dlpack(array)
    back.array[0, 1] = 8
    assert made.numpy()[0, 1] == 8
    assert back.device == "cpu"


def test_dlpack_refuses_what_a_tensor_cannot_be():
    with pytest.raises(TypeError, match="contiguous"):
        cycnn.from_dlpack(np.zeros((2, 3), np.float32).T)
    with pytest.raises(TypeError, match="float64"):
        cycnn.from_dlpack(np.zeros(3))
    with pytest.raises(TypeError, match="DLPack"):
        cycnn.from_dlpack([1, 2])


def test_no_cuda_array_interface_on_the_cpu():
    assert not hasattr(cycnn.zeros(2, device="cpu"), "__cuda_array_interface__")


@pytest.mark.parametrize("spec", ["gpu", "cuda:", "cpu:1", "cuda:-1", ""])
def test_unknown_devices_are_named(spec):
    with pytest.raises(ValueError, match="expected 'cpu'"):
        cycnn.device(spec)


def test_devices_compare_by_value():
    assert cycnn.device("cpu") == cycnn.device("cpu:0") == "cpu"
    assert cycnn.device("cpu") != "cuda"
    assert len({cycnn.device("cpu"), cycnn.device("cpu")}) == 1
    with pytest.raises(TypeError, match="string"):
        cycnn.device(3)


def test_precision_modes():
    assert cycnn.get_precision() == "fp32"
    try:
        cycnn.set_precision("tf32")
        assert cycnn.get_precision() == "tf32"
        with pytest.raises(ValueError, match="'fp16'"):
            cycnn.set_precision("fp16")
        assert cycnn.get_precision() == "tf32"
    finally:
        cycnn.set_precision("fp32")


def test_manual_seed_repeats():
    from cycnn import random

    cycnn.manual_seed(7)
    first = random.generator().random(4), random.draw_seed()
    cycnn.manual_seed(7)
    again = random.generator().random(4), random.draw_seed()
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    with pytest.raises(ValueError, match="-1"):
        cycnn.manual_seed(-1)


def test_a_seed_for_a_while_leaves_the_other_numbers_as_they_are():
    from cycnn import random

    cycnn.manual_seed(7)
    expected = [random.draw_seed() for _ in range(3)]
    cycnn.manual_seed(8)
    of_eight = [random.draw_seed() for _ in range(2)]

    cycnn.manual_seed(7)
    found = [random.draw_seed()]
    with random.seeded(8):
        assert random.draw_seed() == of_eight[0]
        with ThreadPoolExecutor(1) as other:
            found.append(other.submit(random.draw_seed).result())
        assert random.draw_seed() == of_eight[1]
        cycnn.manual_seed(8)
        assert random.draw_seed() == of_eight[0]
    with pytest.raises(ValueError, match="-1"), random.seeded(-1):
        pass
    found.append(random.draw_seed())
    assert found == expected
