"""What the GPU tests share."""

import pytest

import cycnn


@pytest.fixture(params=["fp32", "tf32", "bf16"])
def precision(request):
    """Each precision in turn; the one before is set again afterwards."""
    before = cycnn.get_precision()
    cycnn.set_precision(request.param)
    yield request.param
    cycnn.set_precision(before)
