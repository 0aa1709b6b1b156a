"""NaN, infinity, denormals and large scores on the CPU; tests/gpu has the GPU's."""

import extremes
import pytest
from cycnn.tensor import Tensor

from cycnn.ops import cpu


def on_cpu(array):
    return Tensor(array, "cpu")


@pytest.mark.parametrize("case", extremes.CONVOLUTIONS)
def test_nan_and_infinity_pass_through_convolutions(case):
    extremes.conv2d(cpu, on_cpu, case)


def test_nan_and_infinity_pass_through_the_backward_of_linear():
    extremes.linear(cpu, on_cpu)


def test_denormals_are_numbers():
    extremes.denormals(cpu, on_cpu)


def test_products_may_be_denormal():
    extremes.denormal_products(cpu, on_cpu)


@pytest.mark.parametrize("seed", range(4))
def test_large_scores(seed):
    extremes.large_scores(cpu, on_cpu, seed)
