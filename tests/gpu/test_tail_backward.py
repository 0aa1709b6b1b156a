"""The backward of linear, ReLU and head in one launch, against float64.

Bounds as in test_fused_backward.py: a gradient is a sum of products, each operand off
by at most a unit of roundoff of the precision. The gradient at the ReLU is itself such
a sum, rounded once more before it is multiplied again.
"""

import numpy as np
import pytest

from cycnn import Tensor
from cycnn.errors import ShapeError

OPERANDS = {"fp32": 2.0**-20, "tf32": 2.0**-10, "bf16": 2.0**-7}
F32 = 2.0**-24
NAMES = "dx", "dweight", "dbias", "dweight_out", "dbias_out"


@pytest.fixture(scope="module")
def fused():
    from cycnn.ops import fused_cuda_backward

    return fused_cuda_backward


@pytest.fixture(autouse=True)
def poison(fused, monkeypatch):
    """New memory is full of NaN: what a kernel does not write shows."""
    empty = fused.empty_on_gpu

    def poisoned(shape, dtype, device):
        tensor = empty(shape, dtype, device)
        if tensor.size:
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(fused, "empty_on_gpu", poisoned)


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def positive(array):
    return np.maximum(array, 0)


class Tail:
    def __init__(self, n, inputs, hidden, outputs, seed=3):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        self.dlogits, self.hidden = normal(n, outputs), positive(normal(n, hidden))
        self.x = positive(normal(n, inputs))
        self.weight, self.weight_out = normal(hidden, inputs), normal(outputs, hidden)
        self.given = self.dlogits, self.hidden, self.x, self.weight, self.weight_out

    def run(self, fused, bias=True, **options):
        """dx and the gradients, as arrays."""
        shapes = self.weight.shape, self.weight.shape[:1]
        shapes += self.weight_out.shape, self.weight_out.shape[:1]
        made = [
            on_gpu(np.full(shape, np.nan, np.float32))
            if bias or len(shape) > 1
            else None
            for shape in shapes
        ]
        dx = fused.tail_backward(*map(on_gpu, self.given), *made, **options)
        return [None if t is None else t.numpy() for t in (dx, *made)]

    @staticmethod
    def gradients(dlogits, hidden, x, weight, weight_out, passed):
        dz = np.where(passed, dlogits @ weight_out, 0)
        return (
            dz @ weight, dz.T @ x, dz.sum(0), dlogits.T @ hidden, dlogits.sum(0)
        )  # fmt: skip

    def check(self, got, precision, input_relu=False):
        n, outputs = self.dlogits.shape
        hidden = self.hidden.shape[1]
        passed = self.hidden > 0
        double = [array.astype(np.float64) for array in self.given]
        wanted = self.gradients(*double, passed)
        absolute = self.gradients(*map(np.abs, double), passed)
        lengths = hidden + outputs, n + outputs, n + outputs, n, n
        for name, found, want, sums, products in zip(
            NAMES, got, wanted, absolute, lengths
        ):
            if found is None:
                continue
            if name == "dx" and input_relu:
                want = np.where(self.x > 0, want, 0)
            bound = sums * (4 * OPERANDS[precision] + (products + 8) * F32)
            error = np.abs(found.astype(np.float64) - want)
            # NaN is never within
            assert (error <= bound + 1e-30).all(), (
                f"{name} is off by {(error / bound).max():.3g} bounds"
            )


@pytest.mark.parametrize("n", [1, 31, 33, 128, 257])
@pytest.mark.parametrize(
    "inputs, hidden, outputs",
    [(512, 128, 10), (33, 21, 7), (400, 120, 32), (7, 256, 1), (100, 1, 5)],
)
def test_against_float64(fused, precision, n, inputs, hidden, outputs):
    tail = Tail(n, inputs, hidden, outputs)
    for options in ({}, {"input_relu": True, "settled": True}):
        found = tail.run(fused, **options)
        tail.check(found, precision, bool(options))
    late = tail.run(fused, **options, x_settled=False)
    for one, other in zip(found, late):
        assert one.tobytes() == other.tobytes()


def test_equal_bits(fused, precision):
    tail = Tail(257, 200, 128, 10)
    for one, other in zip(tail.run(fused), tail.run(fused)):
        assert one.tobytes() == other.tobytes()


def test_equals_its_layers(fused, precision):
    tail = Tail(128, 512, 128, 10)
    dlogits, hidden, x, weight, weight_out = map(on_gpu, tail.given)
    made = [
        on_gpu(np.full(shape, np.nan, np.float32))
        for shape in ((128, 512), (128,), (10, 128), (10,))
    ]
    dhidden = fused.head_backward(dlogits, hidden, weight_out, *made[2:])
    dx = fused.linear_block_backward(dhidden, hidden, x, weight, *made[:2], True)
    tail.check([t.numpy() for t in (dx, *made)], precision)
    tail.check(tail.run(fused), precision)


def test_does_no_more_than_asked(fused):
    tail = Tail(33, 40, 24, 5)
    got = tail.run(fused, bias=False, need_dx=False)
    assert [name for name, array in zip(NAMES, got) if array is not None] == [
        "dweight",
        "dweight_out",
    ]
    tail.check(got, "tf32")


def test_partials_add_up(fused, precision):
    tail = Tail(700, 64, 32, 10)
    dx, parts, parts_out = fused.tail_backward_partials(*map(on_gpu, tail.given))
    assert parts.splits == parts_out.splits > 1
    sums = [
        part.numpy().sum(0, dtype=np.float64) for part in (*parts, *parts_out)
    ]  # fmt: skip
    tail.check([dx.numpy(), *sums], precision)


def test_an_empty_batch(fused):
    tail = Tail(0, 12, 8, 3)
    dx, *gradients = tail.run(fused)
    assert dx.shape == (0, 12)
    assert not any(gradient.any() for gradient in gradients)


def test_what_is_refused(fused):
    tail = Tail(4, 12, 8, 3)
    tail.given = (tail.dlogits[:, 1:], *tail.given[1:])
    with pytest.raises(ShapeError, match="dlogits"):
        tail.run(fused)
    assert fused.tail_backward_supported(256, 32, 0)
    assert not fused.tail_backward_supported(257, 10, 0)
    assert not fused.tail_backward_supported(128, 33, 0)
    with pytest.raises(NotImplementedError, match="a tail of"):
        Tail(4, 12, 8, 33).run(fused)
