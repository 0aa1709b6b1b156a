"""What the tests of operations on a GPU share: transfers, and comparisons."""

import numpy as np

from cycnn import Tensor, tensor

F32 = 2.0**-24  # roundoff
SIZES = (0, 1, 31, 33, 257, 4099)


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def assert_close(got, want, bound):
    """|got - want| <= bound, where both are NaN or infinite the same."""
    got = got.numpy()
    want = np.asarray(want)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite].astype(got.dtype))
    error = np.abs(got[finite].astype(np.float64) - want[finite])
    bound = np.broadcast_to(bound, want.shape)[finite]
    assert (error <= bound).all(), f"off by up to {(error / bound).max():.3g} bounds"


def assert_same_bits(a, b):
    np.testing.assert_array_equal(
        a.numpy().view(np.uint32), b.numpy().view(np.uint32), strict=True
    )


def poison(monkeypatch):
    """Have operations find NaN in new memory, so that what they leave out shows."""
    from cycnn.ops import (
        cuda_activation,
        cuda_batch_norm,
        cuda_common,
        cuda_dropout,
        cuda_layer_norm,
        cuda_pooling,
    )

    def poisoned(shape, dtype, device):
        made = tensor.empty_on_gpu(shape, dtype, device)
        return made.fill_(np.nan if dtype == np.float32 else -1)

    for module in (
        cuda_activation,
        cuda_batch_norm,
        cuda_common,
        cuda_dropout,
        cuda_layer_norm,
        cuda_pooling,
    ):
        monkeypatch.setattr(module, "empty_on_gpu", poisoned)
