"""Operations on shapes that nobody chose, on a GPU, within bounds of their roundings."""

import pytest
from any_shape import CHECKS, Draw, conv_transpose
from bounds import on_gpu, poison


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("name", CHECKS)
def test_any_shape(ops, name, seed):
    CHECKS[name](ops, on_gpu, Draw(seed))


@pytest.mark.parametrize("seed", range(16))
def test_conv_transpose_of_any_shape(ops, precision, seed):
    conv_transpose(ops, on_gpu, Draw(seed), precision)
