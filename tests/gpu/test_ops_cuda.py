"""Every operation on the GPU against its specification in float64.

Tolerances are bounds, not experience. A sum of L products in float32 is off by at most
about L units of roundoff of the sum of the absolute products, whatever the order; half
of a unit more comes from each rounded operand. The sum of absolute products is the
reference operation itself on absolute values.
"""

import numpy as np
import pytest
from any_shape import check_steps

import cycnn
from cycnn import Tensor
from cycnn.ops import Feed, reference

ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
F32 = ROUNDOFF["fp32"]


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


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


def product_bound(precision, length, absolute):
    """Of a sum of ``length`` products whose absolute values sum to ``absolute``."""
    # tensor cores truncate where they add: a whole unit instead of a half
    return (2.0 * ROUNDOFF[precision] + 2.0 * (length + 2) * F32) * absolute


def assert_same_bits(a, b):
    np.testing.assert_array_equal(
        a.numpy().view(np.uint32), b.numpy().view(np.uint32), strict=True
    )


# ---------------------------------------------------------------- elementwise

SIZES = (0, 1, 31, 33, 257, 4099)
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 100.0, -100.0, 1e-30, -1e-30, 88.0, -88.0],
    np.float32,
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "unaligned"))
def test_elementwise(ops, rng, size, offset):
    x, y = normal(rng, size + offset), normal(rng, size + offset)
    x[offset : offset + len(SPECIAL)] = SPECIAL[: size]
    a, b = on_gpu(x)[offset:], on_gpu(y)[offset:]
    x, y = x[offset:], y[offset:]
    with np.errstate(invalid="ignore"):
        out = on_gpu(np.zeros(size, np.float32))
        ops.add(a, b, out)
        assert_close(out, x.astype(np.float64) + y, F32 * (np.abs(x) + np.abs(y)))
    relu = ops.relu_forward(a)
    assert_close(relu, reference.relu_forward(x), 0.0)
    assert not np.signbit(relu.numpy()[x == 0]).any()
    want = reference.relu_backward(y, relu.numpy())
    assert_close(ops.relu_backward(b, relu), want, 0.0)
    sigmoid = ops.sigmoid_forward(a)
    assert_close(sigmoid, reference.sigmoid_forward(x), 1e-6)
    s = sigmoid.numpy()
    assert_close(
        ops.sigmoid_backward(b, sigmoid),
        reference.sigmoid_backward(y, s),
        4 * F32 * np.abs(y),
    )


def test_sigmoid_keeps_its_relative_precision_far_from_zero(ops):
    x = np.array([-80.0, -40.0, -10.0, 10.0, 40.0], np.float32)
    want = reference.sigmoid_forward(x)
    assert_close(ops.sigmoid_forward(on_gpu(x)), want, 16 * F32 * want)


def test_add_in_place(ops, rng):
    x, y = normal(rng, 257), normal(rng, 257)
    a, b = on_gpu(x), on_gpu(y)
    ops.add(a, b, a)
    np.testing.assert_array_equal(a.numpy(), x + y)


@pytest.mark.parametrize("dtype", ("float32", "int32", "uint8"))
@pytest.mark.parametrize("size", SIZES)
def test_fill(ops, dtype, size):
    whole = Tensor(np.zeros(size + 2, dtype), "cuda")
    ops.fill(whole[1 : size + 1], 7)
    want = np.zeros(size + 2, dtype)
    want[1 : size + 1] = 7
    np.testing.assert_array_equal(whole.numpy(), want)


# ---------------------------------------------------------------- matrix products

# (N, I, O): odd sizes, one tile, several, a long sum that is split, tall and wide
LINEAR = (
    (0, 3, 2),
    (1, 1, 1),
    (3, 31, 33),
    (33, 257, 10),
    (128, 512, 128),
    (257, 33, 65),
    (2, 1030, 3),
    (3, 2, 1030),
)


@pytest.mark.parametrize("shape", LINEAR, ids=str)
@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
def test_linear(ops, rng, precision, shape, accumulate):
    n, i, o = shape
    x, weight, bias = normal(rng, n, i), normal(rng, o, i), normal(rng, o)
    dy, dweight, dbias = normal(rng, n, o), normal(rng, o, i), normal(rng, o)
    check_product(
        ops,
        precision,
        "linear",
        (x, weight, bias, dy, dweight, dbias),
        {},
        accumulate,
        lengths=(i, o, n, n),
    )


# x, weight, stride, padding, dilation, groups
CONV = (
    ((0, 3, 5, 5), (2, 3, 3, 3), {}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((3, 1, 31, 33), (5, 1, 5, 5), {}),
    ((3, 33, 4, 4), (31, 33, 3, 3), {}),
    ((2, 4, 9, 8), (6, 4, 3, 2), {"stride": (2, 3), "padding": (1, 2)}),
    ((2, 3, 9, 9), (3, 3, 2, 2), {"stride": (4, 3)}),
    ((1, 2, 11, 12), (4, 2, 3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
    ((3, 6, 7, 5), (4, 3, 3, 3), {"groups": 2, "padding": (1, 1)}),
    ((3, 5, 6, 6), (10, 1, 3, 3), {"groups": 5}),
    ((3, 17, 7, 5), (33, 17, 1, 1), {}),
    ((3, 8, 4, 4), (6, 4, 1, 1), {"groups": 2}),
    ((2, 4, 5, 5), (3, 4, 1, 1), {"stride": (2, 2)}),
    ((2, 3, 4, 4), (2, 3, 1, 1), {"padding": (1, 0)}),
    ((12, 8, 13, 13), (96, 8, 5, 5), {}),
)


@pytest.mark.parametrize("case", CONV, ids=str)
@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
def test_conv2d(ops, rng, precision, case, accumulate):
    check_conv2d(ops, rng, precision, case, accumulate)


def check_conv2d(ops, rng, precision, case, accumulate):
    x_shape, w_shape, options = case
    x, weight = normal(rng, *x_shape), normal(rng, *w_shape)
    bias = normal(rng, w_shape[0])
    dy = normal(rng, *reference.conv2d_forward(x, weight, bias, **options).shape)
    dweight, dbias = normal(rng, *w_shape), normal(rng, w_shape[0])
    k, c_group, r, s = w_shape
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    check_product(
        ops,
        precision,
        "conv2d",
        (x, weight, bias, dy, dweight, dbias),
        options,
        accumulate,
        lengths=(c_group * r * s, k * r * s, pixels, pixels),
    )


def check_product(ops, precision, name, arrays, options, accumulate, lengths):
    """Forward, backward, their bounds, and that a second run gives equal bits."""
    forward, backward = f"{name}_forward", f"{name}_backward"
    x, weight, bias, dy, dweight, dbias = arrays
    absolute = [np.abs(array) for array in arrays]
    ax, aweight, abias, ady, adweight, adbias = absolute
    for_y, for_dx, for_dweight, for_dbias = lengths

    run = getattr(ops, forward)
    y = run(on_gpu(x), on_gpu(weight), on_gpu(bias), **options)
    want = getattr(reference, forward)
    bound = product_bound(precision, for_y, want(ax, aweight, abias, **options))
    assert_close(y, want(x, weight, bias, **options), bound)
    assert_same_bits(y, run(on_gpu(x), on_gpu(weight), on_gpu(bias), **options))
    assert_close(
        run(on_gpu(x), on_gpu(weight), None, **options),
        want(x, weight, None, **options),
        bound,
    )

    def run_backward():
        dw, db = on_gpu(dweight), on_gpu(dbias)
        dx = getattr(ops, backward)(
            on_gpu(dy), on_gpu(x), on_gpu(weight), dw, db, **options,
            accumulate=accumulate,
        )  # fmt: skip
        return dx, dw, db

    def want_backward(dy, x, weight, dweight, dbias):
        dw, db = dweight.astype(np.float64), dbias.astype(np.float64)
        dx = getattr(reference, backward)(
            dy, x, weight, dw, db, **options, accumulate=accumulate
        )
        return dx, dw, db

    got, again = run_backward(), run_backward()
    wants = want_backward(dy, x, weight, dweight, dbias)
    sums = want_backward(ady, ax, aweight, adweight, adbias)
    modes = (precision, precision, "fp32")
    for tensor, second, expected, absolute_sum, length, mode in zip(
        got, again, wants, sums, (for_dx, for_dweight, for_dbias), modes
    ):
        assert_close(tensor, expected, product_bound(mode, length, absolute_sum))
        assert_same_bits(tensor, second)

    # without what is optional: no dx, no dbias, and dweight as before
    dw = on_gpu(dweight)
    nothing = getattr(ops, backward)(
        on_gpu(dy), on_gpu(x), on_gpu(weight), dw, None, **options, need_dx=False,
        accumulate=accumulate,
    )  # fmt: skip
    assert nothing is None
    assert_same_bits(dw, got[1])


def magnitude(rng):
    """A power of two, so that scaling by it rounds nothing."""
    return np.float32(2.0 ** rng.integers(-20, 20))


@pytest.mark.parametrize("seed", range(40))
def test_conv2d_of_any_shape(ops, precision, seed):
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return int(rng.integers(low, high + 1))

    groups = draw(1, 3)
    filter_size = draw(1, 5), draw(1, 5)
    options = {
        "stride": (draw(1, 6), draw(1, 6)),
        "padding": (draw(0, 3), draw(0, 3)),
        "dilation": (draw(1, 3), draw(1, 3)),
        "groups": groups,
    }
    geometry = zip(filter_size, options["dilation"], options["padding"])
    size = [max(1, d * (f - 1) + 1 - 2 * p) + draw(0, 20) for f, d, p in geometry]
    x_shape = draw(0, 9), groups * draw(1, 40), *size
    w_shape = groups * draw(1, 40), x_shape[1] // groups, *filter_size
    x, weight = normal(rng, *x_shape), normal(rng, *w_shape)
    bias, dweight, dbias = (
        normal(rng, *s) for s in (w_shape[:1], w_shape, w_shape[:1])
    )
    y = reference.conv2d_forward(x, weight, bias, **options)
    pixels = y[:, 0].size
    taps = filter_size[0] * filter_size[1]
    arrays = [x, weight, bias, normal(rng, *y.shape), dweight, dbias]
    check_product(
        ops,
        precision,
        "conv2d",
        [array * magnitude(rng) for array in arrays],
        options,
        bool(draw(0, 1)),
        lengths=(w_shape[1] * taps, w_shape[0] * taps, pixels, pixels),
    )


@pytest.mark.parametrize("seed", range(40))
def test_linear_of_any_shape(ops, precision, seed):
    rng = np.random.default_rng(seed)
    n, i, o = (int(2 ** rng.uniform(0, limit)) for limit in (8, 11, 8))
    shapes = (n, i), (o, i), (o,), (n, o), (o, i), (o,)
    arrays = [normal(rng, *shape) * magnitude(rng) for shape in shapes]
    accumulate = bool(rng.integers(2))
    check_product(
        ops, precision, "linear", arrays, {}, accumulate, lengths=(i, o, n, n)
    )


@pytest.fixture
def fresh_plans(ops):
    """Nothing planned before the test is used in it, nothing of it after."""

    def clear():
        for value in vars(ops).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
def test_conv2d_in_parts_of_the_batch(ops, rng, monkeypatch, fresh_plans, accumulate):
    # room for the column matrix of 2 of the 5 images
    monkeypatch.setattr(ops, "_COLUMN_BYTES", 2 * 4 * 27 * 42)
    case = ((5, 3, 6, 7), (4, 3, 3, 3), {"padding": (1, 1)})
    check_conv2d(ops, rng, "fp32", case, accumulate)


@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
def test_products_in_parts_too_large_to_number(
    ops, rng, monkeypatch, fresh_plans, accumulate
):
    monkeypatch.setattr(ops, "_INT32_MAX", 2000)
    n, i, o = 9, 300, 500
    arrays = (
        normal(rng, n, i), normal(rng, o, i), normal(rng, o), normal(rng, n, o),
        normal(rng, o, i), normal(rng, o),
    )  # fmt: skip
    check_product(ops, "fp32", "linear", arrays, {}, accumulate, lengths=(i, o, n, n))
    pointwise = ((7, 4, 10, 10), (8, 4, 1, 1), {})
    check_conv2d(ops, rng, "fp32", pointwise, accumulate)
    with pytest.raises(cycnn.ShapeError, match="2100 elements is too large"):
        ops.linear_forward(
            on_gpu(normal(rng, 1, 2100)), on_gpu(normal(rng, 1, 2100)), None
        )


def test_precision_is_read_at_each_call(ops, rng):
    x, weight = on_gpu(normal(rng, 64, 64)), on_gpu(normal(rng, 64, 64))
    results = {}
    try:
        for mode in ROUNDOFF:
            cycnn.set_precision(mode)
            results[mode] = ops.linear_forward(x, weight, None).numpy()
    finally:
        cycnn.set_precision("fp32")
    exact = reference.linear_forward(x.numpy(), weight.numpy(), None)
    error = {mode: np.abs(result - exact).max() for mode, result in results.items()}
    if (results["fp32"] == results["tf32"]).all():  # before compute capability 8.0
        assert (results["fp32"] == results["bf16"]).all()
    else:
        assert error["fp32"] < error["tf32"] / 50 < error["bf16"] / 50


def test_nan_and_infinity_pass_through_products(ops, precision):
    x = np.ones((4, 40), np.float32)
    x[1, 3], x[2, 5], x[3, 7] = np.nan, np.inf, -np.inf
    weight = np.full((3, 40), 2.0, np.float32)
    y = ops.linear_forward(on_gpu(x), on_gpu(weight), None)
    assert_close(y, reference.linear_forward(x, weight, None), 0.0)


def test_long_batches_sum_their_bias_gradient_in_two_stages(ops, rng):
    dy = normal(rng, 3000, 3)
    x, weight = normal(rng, 3000, 1), normal(rng, 3, 1)
    dbias = on_gpu(np.ones(3, np.float32))
    dweight = on_gpu(np.zeros((3, 1), np.float32))
    ops.linear_backward(
        on_gpu(dy), on_gpu(x), on_gpu(weight), dweight, dbias, False, True
    )
    want = 1 + dy.astype(np.float64).sum(axis=0)
    assert_close(dbias, want, 3000 * F32 * np.abs(dy).sum(axis=0))


# ---------------------------------------------------------------- pooling

POOL = (
    ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0)),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((3, 2, 31, 33), (2, 2), (2, 2), (0, 0)),
    ((2, 3, 9, 7), (3, 2), (1, 1), (1, 1)),
    ((2, 3, 9, 11), (2, 3), (4, 5), (0, 1)),
    ((1, 5, 8, 8), (5, 4), (2, 3), (2, 2)),
    ((2, 3, 8, 7), (3, 3), (2, 2), (0, 0), True),
    ((2, 3, 5, 7), (2, 2), (2, 2), (0, 0), True),
    ((2, 3, 3, 5), (4, 7), (4, 3), (0, 0), True),
    ((3, 2, 8, 9), (2, 3), (2, 2), (0, 0, 1, 2)),
    ((2, 5, 9, 7), (3, 4), (3, 2), (2, 0, 1, 3), True),
)


@pytest.mark.parametrize("case", POOL, ids=str)
def test_maxpool2d(ops, rng, case):
    shape, *window = case
    # few different values, so that windows have ties
    x = rng.integers(-3, 3, shape).astype(np.float32)
    x[rng.random(shape) < 0.02] = np.nan
    x[rng.random(shape) < 0.02] = -np.inf
    y, positions = ops.maxpool2d_forward(on_gpu(x), *window)
    want_y, want_positions = reference.maxpool2d_forward(x, *window)
    assert_close(y, want_y, 0.0)
    np.testing.assert_array_equal(positions.numpy(), want_positions, strict=True)
    dy = normal(rng, *want_y.shape)
    dx = ops.maxpool2d_backward(on_gpu(dy), positions, shape, *window)
    want = reference.maxpool2d_backward(dy, want_positions, shape, *window)
    windows = window[0][0] * window[0][1]
    total = reference.maxpool2d_backward(np.abs(dy), want_positions, shape, *window)
    assert_close(dx, want, windows * F32 * total)
    again = ops.maxpool2d_backward(on_gpu(dy), positions, shape, *window)
    assert_same_bits(dx, again)


# from seed 40 on with padding of its own on each side, every other one rounded up
@pytest.mark.parametrize("seed", range(60))
def test_maxpool2d_of_any_shape(ops, seed):
    rng = np.random.default_rng(seed)
    window = tuple(map(int, rng.integers(1, 6, 2)))
    stride = tuple(map(int, rng.integers(1, 7, 2)))
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in window)
    size = [k + int(rng.integers(0, 30)) for k in window]
    # rounded, so that there are ties
    x = np.round(
        2 * normal(rng, int(rng.integers(0, 5)), int(rng.integers(1, 9)), *size)
    )
    how = window, stride, padding
    if seed >= 40:
        padding = tuple(int(rng.integers(0, k)) for k in (*window, *window))
        how = window, stride, padding, seed % 2 == 1
    y, positions = ops.maxpool2d_forward(on_gpu(x), *how)
    want, at = reference.maxpool2d_forward(x, *how)
    np.testing.assert_array_equal(y.numpy(), want)
    np.testing.assert_array_equal(positions.numpy(), at)
    dy = np.round(8 * normal(rng, *want.shape))  # whole numbers, whose sums are exact
    dx = ops.maxpool2d_backward(on_gpu(dy), positions, x.shape, *how)
    np.testing.assert_array_equal(
        dx.numpy(), reference.maxpool2d_backward(dy, at, x.shape, *how)
    )


# ---------------------------------------------------------------- softmax, losses


@pytest.mark.parametrize("n", (0, 1, 3, 33))
@pytest.mark.parametrize("f", (1, 10, 31, 33, 257, 2050))
def test_softmax_and_losses(ops, rng, n, f):
    x = 5 * normal(rng, n, f)
    labels = rng.integers(0, f, n).astype(np.int32)
    on_labels = on_gpu(labels)
    y = ops.log_softmax_forward(on_gpu(x))
    want = reference.log_softmax_forward(x)
    # of exp and log, and of the sum of f numbers below 1
    assert_close(y, want, 4 * F32 * (np.abs(want) + np.abs(x).max(initial=1)) + f * F32)
    y_host = y.numpy()
    dy = normal(rng, n, f)
    assert_close(
        ops.log_softmax_backward(on_gpu(dy), y),
        reference.log_softmax_backward(dy, y_host),
        F32 * (np.abs(dy) + (f + 8) * np.abs(dy).sum(axis=1, keepdims=True)),
    )
    loss = ops.nll_loss_forward(y, on_labels)
    want = reference.nll_loss_forward(y_host, labels)
    assert_close(loss, want, (n + 2) * F32 * np.abs(want))
    assert_same_bits(loss, ops.nll_loss_forward(y, on_labels))
    assert_close(
        ops.nll_loss_backward(y, on_labels),
        reference.nll_loss_backward(y_host, labels),
        F32 / max(n, 1),
    )
    fused, log_probs = ops.cross_entropy_forward(on_gpu(x), on_labels)
    assert_same_bits(log_probs, y)
    assert_same_bits(fused, loss)
    assert_close(
        ops.cross_entropy_backward(y, on_labels),
        reference.cross_entropy_backward(y_host, labels),
        8 * F32 / max(n, 1),
    )


@pytest.mark.parametrize("f", (10, 2050))
def test_log_softmax_of_extreme_rows(ops, f):
    x = np.zeros((4, f), np.float32)
    x[0] = 3e38
    x[1] = -3e38
    x[2, 1:] = -np.inf
    x[3, 5] = np.nan
    want = reference.log_softmax_forward(x)
    assert_close(ops.log_softmax_forward(on_gpu(x)), want, f * F32)


@pytest.mark.parametrize("label", (-1, 10, 2**31 - 1, -(2**31)))
def test_a_label_out_of_range_makes_the_loss_nan(ops, rng, label):
    log_probs = on_gpu(normal(rng, 3, 10))
    labels = on_gpu(np.array([1, label, 2], np.int32))
    assert np.isnan(float(ops.nll_loss_forward(log_probs, labels)))
    gradient = ops.nll_loss_backward(log_probs, labels).numpy()
    assert not gradient[1].any()


def test_labels_must_be_int32(ops, rng):
    scores = on_gpu(normal(rng, 3, 10))
    labels = on_gpu(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="labels has dtype float32: expected int32"):
        ops.nll_loss_forward(scores, labels)


@pytest.mark.parametrize("n", (0, 1, 3, 33, 1500))
@pytest.mark.parametrize("f", (1, 10, 31, 33, 257))
def test_argmax_and_tally(ops, rng, n, f):
    x = rng.integers(-2, 2, (n, f)).astype(np.float32)
    x[rng.random((n, f)) < 0.01] = np.nan
    want = reference.argmax(x)
    np.testing.assert_array_equal(ops.argmax(on_gpu(x)).numpy(), want, strict=True)
    labels = want.copy()
    labels[: n // 3] = (labels[: n // 3] + 1) % f
    for given in (rng.random(n, dtype=np.float32), np.float32(0.75)):
        hits, loss_sum = on_gpu(np.array(5, np.int32)), on_gpu(np.float32(2))
        expected = np.array(5, np.int32), np.array(2.0)
        for _ in range(2):
            ops.tally(on_gpu(given), on_gpu(x), on_gpu(labels), loss_sum, hits)
            reference.tally(given, x, labels, *expected[::-1])
        assert int(hits) == int(expected[0])
        np.testing.assert_allclose(float(loss_sum), expected[1], rtol=1e-5)


@pytest.mark.parametrize("n, f", ((1, 10), (128, 10), (1100, 3), (300, 300)))
@pytest.mark.parametrize("rates", (None, np.arange(9.0, dtype=np.float32)))
def test_end_step(ops, rng, n, f, rates):
    images = 2 * n + n // 2
    order = rng.permutation(images).astype(np.int32)
    classes = rng.integers(0, f, images, dtype=np.int32)
    position, room = np.array([0, 7], np.int32), np.zeros(n, np.int32)
    arrays = order, position, classes, room, room.copy(), rates, np.array(0.5)
    feed = Feed(*(x if x is None else on_gpu(x) for x in arrays))
    expected = Feed(*arrays)
    sums = np.array(0.0), np.array(0, np.int32)
    loss_sum, hits = map(on_gpu, (np.float32(0), sums[1]))
    ops.begin_step(feed)
    reference.begin_step(expected)
    for count in (n, n, n // 2):
        for found, wanted in zip(feed[1:5] + feed[6:], expected[1:5] + expected[6:]):
            np.testing.assert_array_equal(found.numpy(), wanted)
        if not count:
            break
        losses = rng.random(count, dtype=np.float32)
        scores = rng.standard_normal((count, f), dtype=np.float32)
        given = losses, scores
        alone = on_gpu(np.float32(loss_sum)), on_gpu(np.int32(hits))
        ops.tally(*map(on_gpu, given), feed.labels[:count], *alone)
        ops.end_step(*map(on_gpu, given), feed.labels[:count], loss_sum, hits, feed)
        assert [float(x) for x in alone] == [float(loss_sum), float(hits)]
        reference.end_step(*given, expected.labels[:count], *sums, expected)
    assert int(hits) == sums[1]
    np.testing.assert_allclose(float(loss_sum), sums[0], rtol=1e-5)


# ---------------------------------------------------------------- optimizer steps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_rmsprop_step(ops, rng, size, momentum):
    check_step(
        ops,
        rng,
        size,
        "rmsprop_step",
        ("param", "grad", "square_avg", "momentum_buffer"),
        {"alpha": 0.99, "eps": 1e-8, "weight_decay": 1e-2, "momentum": momentum},
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("nesterov", (False, True))
def test_sgd_step(ops, rng, size, momentum, nesterov):
    check_step(
        ops,
        rng,
        size,
        "sgd_step",
        ("param", "grad", "momentum_buffer"),
        {"momentum": momentum, "weight_decay": 1e-2, "nesterov": nesterov},
    )


def check_step(ops, rng, size, name, slabs, options):
    """Slabs and options in the order of the operation's arguments."""
    arrays = [np.abs(normal(rng, size)) + np.float32(0.1) for _ in slabs]
    if not options["momentum"]:
        arrays[slabs.index("momentum_buffer")] = None
    check_steps(ops, on_gpu, name, arrays, tuple(options.values()))


def test_momentum_needs_its_buffer(ops, rng):
    x = on_gpu(normal(rng, 3))
    lr = on_gpu(np.array(0.1, np.float32))
    with pytest.raises(ValueError, match="needs a momentum_buffer"):
        ops.sgd_step(x, x, None, lr, 0.9, 0.0, False)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("count", (0, 1, 2, 4, 5, 31, 257, 4097))
@pytest.mark.parametrize(
    "seed, epoch", ((0, 0), (2**64 - 1, 2**32 - 1), (12345678901234, 7))
)
def test_permutation(ops, count, seed, epoch):
    got = ops.permutation(count, seed, epoch, "cuda").numpy()
    want = reference.permutation(count, seed, epoch, None)
    np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize("dtype", (np.uint8, np.float32))
@pytest.mark.parametrize("shape", ((1, 1), (257, 3, 5, 7), (31, 784)))
@pytest.mark.parametrize("n", (0, 1, 33))
def test_gather(ops, rng, dtype, shape, n):
    images = rng.integers(0, 256, shape).astype(dtype)
    index = rng.integers(0, shape[0], n).astype(np.int32)
    got = ops.gather_images(on_gpu(images), on_gpu(index), 1 / 255, -0.5)
    want = reference.gather_images(images, index, np.float32(1 / 255), -0.5)
    assert_close(got, want, 4 * F32)
    labels = rng.integers(0, 10, shape[0]).astype(np.int32)
    got = ops.gather_labels(on_gpu(labels), on_gpu(index))
    np.testing.assert_array_equal(got.numpy(), labels[index], strict=True)


def test_gather_never_reads_outside(ops):
    images = on_gpu(np.ones((3, 4), np.float32))
    labels = on_gpu(np.array([7, 8, 9], np.int32))
    index = on_gpu(np.array([2, 3, -1, 0], np.int32))
    rows = ops.gather_images(images, index, 1.0, 0.0).numpy()
    assert np.isnan(rows[1:3]).all()
    np.testing.assert_array_equal(rows[[0, 3]], np.ones((2, 4), np.float32))
    got = ops.gather_labels(labels, index)
    np.testing.assert_array_equal(got.numpy(), [9, -1, -1, 7])
