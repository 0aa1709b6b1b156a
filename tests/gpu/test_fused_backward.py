"""The fused backward operations against the unfused specification in float64.

A gradient is a sum of L products. Each operand is off by at most a unit of roundoff of
the precision, and the sum by at most L units of float32, of the sum of the absolute
products; that sum is the reference operation itself on absolute values.
"""

import numpy as np
import pytest
from random_blocks import draw_block

import cycnn
from cycnn import Tensor
from cycnn.errors import ShapeError
from cycnn.ops import reference

# fp32: of a product big * big + big * small + small * big are kept, each a tf32 number;
# what is left out or cut off is below 2^-20
OPERANDS = {"fp32": 2.0**-20, "tf32": 2.0**-10, "bf16": 2.0**-7}
F32 = 2.0**-24

# x (C, H, W), weight (K, R, S), stride, padding, pool, relu
CONVS = {
    "first": ((1, 28, 28), (32, 5, 5), (1, 1), (0, 0), (2, 2), True),
    "second": ((32, 12, 12), (64, 5, 5), (1, 1), (0, 0), (2, 2), True),
    "third": ((64, 4, 4), (128, 3, 3), (1, 1), (0, 0), None, True),
    "lenet": ((6, 12, 12), (16, 5, 5), (1, 1), (0, 0), (2, 2), True),
    "colours": ((3, 13, 9), (8, 3, 3), (1, 1), (1, 1), (3, 2), True),
    "padded": ((17, 20, 20), (18, 3, 3), (1, 1), (1, 1), (2, 2), False),
    "odd": ((5, 7, 6), (10, 3, 3), (1, 1), (1, 1), None, True),
    "strided": ((9, 9, 11), (7, 3, 3), (2, 2), (1, 1), None, True),
    "large filter": ((6, 14, 10), (9, 7, 7), (2, 2), (3, 3), None, True),
    "one tap": ((16, 6, 6), (8, 1, 1), (1, 1), (0, 0), None, False),
    "one tap, strided": ((12, 8, 8), (20, 1, 1), (2, 2), (0, 0), None, True),
    "oblong": ((10, 5, 7), (33, 2, 4), (1, 2), (1, 0), None, True),
    "small, padded": ((10, 4, 4), (20, 3, 3), (1, 1), (1, 1), None, True),
    "small, oblong": ((9, 4, 3), (33, 3, 2), (1, 1), (1, 0), None, False),
    "small, many filters": ((16, 3, 4), (136, 2, 3), (1, 1), (0, 1), None, True),
    "one pixel": ((8, 1, 1), (4, 1, 1), (1, 1), (0, 0), None, True),
    "rest of a pool": ((4, 11, 11), (6, 3, 3), (1, 1), (0, 0), (2, 2), True),
    "many channels": ((130, 5, 5), (70, 3, 3), (1, 1), (1, 1), None, True),
}
# As in large networks: the batch, and the same.
LARGE = {
    "256 channels": (2, (256, 8, 8), (256, 3, 3), (1, 1), (1, 1), None, True),
    "512 channels": (1, (512, 4, 4), (64, 3, 3), (1, 1), (1, 1), None, True),
    "large images": (2, (64, 64, 64), (8, 3, 3), (1, 1), (1, 1), (2, 2), True),
    "many images": (1024, (8, 8, 8), (8, 3, 3), (1, 1), (1, 1), (2, 2), True),
    "many first images": (1024, (4, 8, 8), (8, 3, 3), (1, 1), (1, 1), None, True),
    "7x7": (2, (64, 14, 14), (16, 7, 7), (1, 1), (3, 3), None, True),
    "7x7, strided": (1, (20, 32, 32), (24, 7, 7), (2, 2), (3, 3), (2, 2), True),
}


@pytest.fixture(scope="module")
def fused():
    from cycnn.ops import fused_cuda_backward

    return fused_cuda_backward


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    return Tensor(np.full(shape, np.nan, np.float32), "cuda")


def poison_pool(shape):
    """What is allocated next with this shape probably starts as NaN."""
    poisoned(*shape)


def assert_within(got, want, absolute, products, precision):
    bound = absolute * (2 * OPERANDS[precision] + (products + 8) * F32)
    error = np.abs(got.numpy().astype(np.float64) - want)
    # NaN is never within
    assert (error <= bound + 1e-30).all(), f"off by {(error / bound).max():.3g} bounds"


class Conv:
    """Input, reference and a run of one block."""

    def __init__(self, spec, batch, seed=3):
        image, (k, r, s), self.stride, self.padding, self.pool, self.relu = spec
        self.x, self.weight = normal(seed, batch, *image), normal(
            seed + 1, k, image[0], r, s
        )
        z = reference.conv2d_forward(
            self.x, self.weight, None, self.stride, self.padding
        )
        self.y, self.code = reference.relu_forward(z) if self.relu else z, None
        if self.pool is not None:
            before = self.y
            self.y, at = reference.maxpool2d_forward(before, self.pool, self.pool)
            rows, columns = np.indices(self.y.shape[2:])
            h, w = at // z.shape[3], at % z.shape[3]
            place = (
                (h - rows * self.pool[0]) * self.pool[1] + w - columns * self.pool[1]
            )
            self.code = (1 + place).astype(np.uint8)
            if self.relu:
                self.code[self.y <= 0] = 0
        self.y = self.y.astype(np.float32)
        self.dy = normal(seed + 2, *self.y.shape)
        dz = self.dy.astype(np.float64)
        if self.pool is not None:
            dz = reference.maxpool2d_backward(dz, at, z.shape, self.pool, self.pool)
        self.dz = np.where(z > 0, dz, 0.0) if self.relu else dz

    def reference(self, dz, x, weight):
        dweight, dbias = np.empty(weight.shape), np.empty(len(weight))
        dx = reference.conv2d_backward(
            dz, x, weight, dweight, dbias, self.stride, self.padding
        )
        return dx, dweight, dbias

    def run(self, fused, need_dx=True, bias=True, settled=False):
        dweight = poisoned(*self.weight.shape)
        dbias = poisoned(len(self.weight)) if bias else None
        poison_pool(self.x.shape)
        dx = fused.conv_block_backward(
            on_gpu(self.dy),
            on_gpu(self.y),
            on_gpu(self.code),
            on_gpu(self.x),
            on_gpu(self.weight),
            dweight,
            dbias,
            self.relu,
            self.pool,
            self.stride,
            self.padding,
            need_dx,
            settled,
        )
        return dx, dweight, dbias


@pytest.mark.parametrize("batch", [1, 5, 67])
@pytest.mark.parametrize("name", CONVS)
def test_conv_block(fused, precision, name, batch):
    check_conv_block(fused, precision, Conv(CONVS[name], batch))


@pytest.mark.parametrize("name", LARGE)
def test_conv_block_of_large_networks(fused, precision, name):
    batch, *spec = LARGE[name]
    check_conv_block(fused, precision, Conv(spec, batch))


@pytest.mark.parametrize("seed", range(16))
def test_conv_block_of_any_shape(fused, precision, seed):
    batch, *spec = draw_block(seed)
    check_conv_block(fused, precision, Conv(spec, batch, seed))


def check_conv_block(fused, precision, conv):
    found = conv.run(fused)
    wanted = conv.reference(conv.dz, conv.x, conv.weight)
    absolute = conv.reference(*map(np.abs, (conv.dz, conv.x, conv.weight)))
    taps = conv.weight[0, 0].size
    pixels = conv.dz[:, 0].size
    for got, want, sums, products in zip(
        found, wanted, absolute, (len(conv.weight) * taps, pixels, pixels)
    ):
        assert_within(got, want, sums, products, precision)


@pytest.mark.parametrize("name", ["second", "third", "colours", "strided"])
def test_conv_block_gives_equal_bits(fused, precision, name):
    conv = Conv(CONVS[name], 133)
    first, second = conv.run(fused), conv.run(fused, settled=True)
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("name", ["first", "third", "padded"])
def test_conv_block_does_no_more_than_asked(fused, name):
    conv = Conv(CONVS[name], 4)
    dx, dweight, dbias = conv.run(fused, need_dx=False, bias=False)
    assert dx is None and dbias is None
    _, with_bias, _ = conv.run(fused)
    assert_within(dweight, with_bias.numpy(), np.abs(with_bias.numpy()), 8, "fp32")


def test_conv_block_of_an_empty_batch(fused):
    conv = Conv(CONVS["second"], 2)
    conv.x, conv.dy, conv.y, conv.code = (
        array[:0] for array in (conv.x, conv.dy, conv.y, conv.code)
    )
    dx, dweight, dbias = conv.run(fused)
    assert dx.shape == conv.x.shape
    assert not dweight.numpy().any() and not dbias.numpy().any()


def test_conv_block_refuses_shapes_that_do_not_fit(fused):
    conv = Conv(CONVS["second"], 2)
    conv.dy = conv.dy[:, :, 1:]
    with pytest.raises(ShapeError, match="dy has shape"):
        conv.run(fused)


def test_partials_add_up(fused):
    conv = Conv(CONVS["second"], 130)
    _, dweight, dbias = conv.run(fused)
    given = map(on_gpu, (conv.dy, conv.y, conv.code, conv.x, conv.weight))
    _, parts = fused.conv_block_backward_partials(*given, conv.relu, conv.pool)
    assert parts.splits > 1
    for part, whole in zip(parts, (dweight, dbias)):
        sums = np.abs(part.numpy()).sum(0)
        error = np.abs(part.numpy().sum(0, dtype=np.float64) - whole.numpy())
        assert (error <= parts.splits * F32 * sums + 1e-30).all()


@pytest.mark.parametrize("batch", [1, 37, 300])
@pytest.mark.parametrize("inputs, outputs", [(512, 128), (33, 21), (400, 120), (7, 1)])
@pytest.mark.parametrize("relu", [True, False])
def test_linear_block(fused, precision, inputs, outputs, batch, relu):
    x, weight, y = (
        normal(1, batch, inputs),
        normal(2, outputs, inputs),
        normal(3, batch, outputs),
    )
    dy = normal(4, batch, outputs)
    dweight, dbias = poisoned(outputs, inputs), poisoned(outputs)
    poison_pool(x.shape)
    dx = fused.linear_block_backward(
        on_gpu(dy),
        on_gpu(y) if relu else None,
        on_gpu(x),
        on_gpu(weight),
        dweight,
        dbias,
        relu,
    )
    dz = np.where(y > 0, dy, 0.0) if relu else dy

    def specification(dz, x, weight):
        dw, db = np.empty(weight.shape), np.empty(len(weight))
        return reference.linear_backward(dz, x, weight, dw, db), dw, db

    wanted = specification(dz, x, weight)
    absolute = specification(*map(np.abs, (dz, x, weight)))
    for got, want, sums, products in zip(
        (dx, dweight, dbias), wanted, absolute, (outputs, batch, batch)
    ):
        assert_within(got, want, sums, products, precision)


def test_head(fused, precision):
    dlogits, x, weight = normal(1, 128, 10), normal(2, 128, 128), normal(3, 10, 128)
    dweight, dbias = poisoned(10, 128), poisoned(10)
    dx = fused.head_backward(on_gpu(dlogits), on_gpu(x), on_gpu(weight), dweight, dbias)
    double = dlogits.astype(np.float64)
    magnitude = np.abs(double)
    assert_within(dx, double @ weight, magnitude @ np.abs(weight), 10, precision)
    assert_within(dweight, double.T @ x, magnitude.T @ np.abs(x), 128, precision)
    assert_within(dbias, double.sum(0), magnitude.sum(0), 128, precision)


class TestUpdater:
    COUNTS = (800, 32, 2051, 64, 10)
    SPLITS = (33, 128, 4, 9, 1)

    def slabs(self, fused):
        entries, at, parts = [], 0, []
        for seed, (count, splits) in enumerate(zip(self.COUNTS, self.SPLITS)):
            parts.append((at, normal(seed, splits, count)))
            entries.append((at, on_gpu(parts[-1][1]), None))
            at += -(-count // 64) * 64
        updater = fused.Updater(len(entries), cycnn.device("cuda"))
        updater.plan(entries)
        updater.upload()
        self.kept = entries  # the updater has only their addresses
        return updater, parts, at

    def grad(self, parts, size):
        grad = np.zeros(size)
        for at, part in parts:
            grad[at : at + part.shape[1]] = part.sum(0, dtype=np.float64)
        return grad

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_rmsprop(self, fused, momentum):
        updater, parts, size = self.slabs(fused)
        grad = self.grad(parts, size)
        used = grad != 0
        param, square = normal(7, size), np.abs(normal(8, size))
        buffer = normal(9, size) if momentum else None
        given = [on_gpu(array) for array in (param, square, buffer)]
        grads, lr = poisoned(size), Tensor(np.float32(0.01), "cuda")
        updater.rmsprop(
            given[0], grads, given[1], given[2], lr, 0.99, 1e-8, 1e-4, momentum
        )
        reference_buffer = None if buffer is None else buffer.astype(np.float64)
        want, want_square = param.astype(np.float64), square.astype(np.float64)
        reference.rmsprop_step(
            want, grad, want_square, reference_buffer, 0.01, 0.99, 1e-8, 1e-4, momentum
        )
        np.testing.assert_allclose(
            given[0].numpy()[used], want[used], rtol=0, atol=2e-6
        )
        np.testing.assert_allclose(given[1].numpy()[used], want_square[used], rtol=1e-5)
        np.testing.assert_allclose(grads.numpy()[used], grad[used], rtol=0, atol=2e-5)
        # what belongs to no parameter is left alone
        assert np.isnan(grads.numpy()[~used]).all()

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd(self, fused, nesterov):
        updater, parts, size = self.slabs(fused)
        grad = self.grad(parts, size)
        used = grad != 0
        param, buffer = normal(7, size), normal(9, size)
        given = on_gpu(param), on_gpu(buffer)
        lr = Tensor(np.float32(0.01), "cuda")
        updater.sgd(given[0], None, given[1], lr, 0.9, 1e-4, nesterov)
        want, want_buffer = param.astype(np.float64), buffer.astype(np.float64)
        reference.sgd_step(want, grad, want_buffer, 0.01, 0.9, 1e-4, nesterov)
        np.testing.assert_allclose(
            given[0].numpy()[used], want[used], rtol=0, atol=5e-6
        )
        np.testing.assert_allclose(given[1].numpy()[used], want_buffer[used], atol=2e-5)


    @pytest.mark.parametrize("splits", [1, 5, 33])
    @pytest.mark.parametrize(
        "x_shape, w_shape, pool",
        [
            ((128, 32, 12, 12), (64, 32, 5, 5), (2, 2)),
            ((20, 40, 4, 4), (72, 40, 3, 3), None),
            ((6, 33, 7, 5), (17, 33, 2, 3), None),
        ],
    )
    def test_packs_filters(self, fused, precision, x_shape, w_shape, pool, splits):
        from cycnn.ops import fused_cuda_forward as forward

        size = int(np.prod(w_shape))
        slab = on_gpu(normal(1, -(-size // 64) * 64 + 64))
        weight = slab[:size].reshape(*w_shape)
        packed = forward.pack_filter(weight, x_shape, pool)
        before = packed.data.numpy()
        partials = on_gpu(normal(2, splits, size)), on_gpu(normal(3, 1, 10))
        updater = fused.Updater(2, slab.device)
        updater.plan([(0, partials[0], packed), (slab.size - 64, partials[1], None)])
        updater.upload()
        lr = Tensor(np.float32(0.01), "cuda")
        updater.sgd(slab, None, None, lr, 0.0, 1e-4, False)
        found = packed.data.numpy()
        assert not np.array_equal(found, before)
        packed.refresh()
        np.testing.assert_array_equal(
            found.view(np.int32), packed.data.numpy().view(np.int32)
        )


def test_supported(fused):
    supported = fused.conv_block_backward_supported
    assert supported((8, 3, 32, 32), (16, 3, 3, 3), (2, 2), (1, 1), (1, 1), 0)
    # a filter that no multiprocessor has room for
    assert not supported((1, 4, 300, 300), (4, 4, 299, 299), None, (1, 1), (0, 0), 0)
