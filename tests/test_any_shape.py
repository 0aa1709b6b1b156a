"""Operations on shapes that nobody chose, on the CPU; tests/gpu has them for a GPU."""

import numpy as np
import pytest
import rounded
from any_shape import CHECKS, Draw, conv_transpose
from cycnn.tensor import Tensor
from rounded import Rounded

from cycnn.ops import cpu


def on_cpu(array):
    return Tensor(array, "cpu")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", CHECKS)
def test_any_shape(name, seed):
    CHECKS[name](cpu, on_cpu, Draw(seed))


@pytest.mark.parametrize("seed", range(12))
def test_conv_transpose_of_any_shape(seed):
    conv_transpose(cpu, on_cpu, Draw(seed))


# the bounds themselves

FORMULAS = {
    "a line": lambda x, y: 0.3 * x + y,
    "a quotient": lambda x, y: (x - y) / (y + 3),
    "of an int": lambda x, y: 1 / (2 + y) - x,
    "cancelled": lambda x, y: (x + y) - x,
    "a power": lambda x, y: x * x * x * y,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_arithmetic_in_float32_stays_within(name):
    x, y = np.random.default_rng(0).random((2, 5000), dtype=np.float32)
    bounded = FORMULAS[name](Rounded(x), Rounded(y))
    exact = FORMULAS[name](x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(bounded.value, exact, rtol=1e-12, atol=1e-15)
    error = np.abs(FORMULAS[name](x, y).astype(np.float64) - exact)
    assert (error <= bounded.error).all()
    # and not by far: some of so many come near
    assert (error >= bounded.error / 20).any()


@pytest.mark.parametrize("function", ["sqrt", "exp", "log", "log1p", "expm1"])
def test_functions_in_float32_stay_within(function):
    x = np.random.default_rng(1).random(5000, dtype=np.float32) + np.float32(0.1)
    squared = Rounded(x) * x
    found = getattr(np, function)(x * x)
    error = np.abs(found - getattr(np, function)(x.astype(np.float64) ** 2))
    assert (error <= getattr(rounded, function)(squared).error).all()


def test_sums_in_any_order_stay_within():
    x = np.random.default_rng(2).standard_normal((7, 999), dtype=np.float32)
    total = Rounded(x).sum(axis=1)
    for order in (x, x[:, ::-1], np.sort(x, axis=1)):
        one_by_one = np.cumsum(order, axis=1, dtype=np.float32)[:, -1]
        assert (np.abs(one_by_one - total.value) <= total.error).all()


def test_a_divisor_that_may_be_zero_bounds_nothing():
    assert np.isinf((1 / Rounded(1.0, 2.0)).error)
