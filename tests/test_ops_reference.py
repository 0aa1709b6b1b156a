"""The specification against finite differences, and against values worked by hand."""

import warnings

import numpy as np
import pytest

from cycnn.errors import DataError, ShapeError
from cycnn.ops import reference as ops

CONVOLUTIONS = {
    # name: x, weight, stride, padding, dilation, groups
    "plain": ((2, 3, 5, 6), (4, 3, 3, 2), (1, 1), (0, 0), (1, 1), 1),
    "batch of one": ((1, 1, 4, 4), (2, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "empty batch": ((0, 2, 4, 4), (3, 2, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one by one": ((2, 3, 3, 3), (2, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "stride > filter": ((2, 2, 8, 7), (3, 2, 2, 2), (3, 4), (0, 0), (1, 1), 1),
    "padding": ((2, 2, 3, 4), (3, 2, 3, 3), (1, 2), (2, 1), (1, 1), 1),
    "dilation": ((2, 2, 7, 8), (3, 2, 3, 2), (1, 1), (0, 1), (2, 3), 1),
    "groups": ((2, 4, 5, 5), (6, 2, 3, 3), (2, 1), (1, 1), (1, 1), 2),
    "depth-wise": ((2, 3, 5, 5), (6, 1, 3, 3), (1, 1), (1, 1), (2, 1), 3),
}
POOLS = {
    # name: x, kernel_size, stride, padding
    "two by two": ((2, 3, 6, 6), (2, 2), (2, 2), (0, 0)),
    "odd sizes": ((2, 1, 5, 7), (2, 2), (2, 2), (0, 0)),
    "overlap": ((1, 2, 6, 7), (3, 3), (1, 2), (0, 0)),
    "padding": ((2, 2, 5, 6), (3, 2), (2, 1), (1, 1)),
    "stride > window": ((2, 2, 8, 8), (2, 3), (3, 4), (0, 0)),
    "empty batch": ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0)),
    "at the end": ((2, 2, 5, 6), (2, 3), (2, 2), (0, 0, 1, 2)),
    "much padding": ((1, 2, 3, 4), (3, 3), (1, 2), (2, 1, 2, 0)),
}


def slope(function, x, dy, step=1e-5):
    """dL/dx for L = sum(function() * dy), by central differences."""
    found = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        here = x[at]
        x[at] = here + step
        above = (function() * dy).sum()
        x[at] = here - step
        below = (function() * dy).sum()
        x[at] = here
        found[at] = (above - below) / (2 * step)
    return found


def close(found, expected):
    # error of a central difference at this step: curvature 1e-10, rounding 1e-11
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def spread(*shape):
    """Numbers at least 0.01 apart and off zero, so that no maximum is near a tie."""
    values = np.random.default_rng(0).permutation(np.prod(shape, dtype=int))
    return (values * 0.01 - values.size * 0.005 + 0.003).reshape(shape)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_linear_gradients(n):
    x, w, b, dy = normal(n, 4), normal(5, 4), normal(5), normal(n, 5, seed=1)
    dw, db = np.empty_like(w), np.empty_like(b)
    dx = ops.linear_backward(dy, x, w, dw, db)
    for found, array in (dx, x), (dw, w), (db, b):
        close(found, slope(lambda: ops.linear_forward(x, w, b), array, dy))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_gradients(case):
    x_shape, w_shape, *how = CONVOLUTIONS[case]
    x, w, b = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    dy = normal(*ops.conv2d_forward(x, w, b, *how).shape, seed=1)
    dw, db = np.empty_like(w), np.empty_like(b)
    dx = ops.conv2d_backward(dy, x, w, dw, db, *how)
    for found, array in (dx, x), (dw, w), (db, b):
        close(found, slope(lambda: ops.conv2d_forward(x, w, b, *how), array, dy))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_is_the_sum_that_it_says(case):
    x_shape, w_shape, stride, padding, dilation, groups = CONVOLUTIONS[case]
    x, w, b = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    y = ops.conv2d_forward(x, w, b, stride, padding, dilation, groups)
    k_group, c_group = w_shape[0] // groups, w_shape[1]
    expected = np.empty_like(y)
    for n, k, p, q in np.ndindex(*y.shape):
        expected[n, k, p, q] = b[k]
        for c, r, s in np.ndindex(*w_shape[1:]):
            h = p * stride[0] - padding[0] + r * dilation[0]
            v = q * stride[1] - padding[1] + s * dilation[1]
            if 0 <= h < x_shape[2] and 0 <= v < x_shape[3]:
                seen = x[n, k // k_group * c_group + c, h, v]
                expected[n, k, p, q] += w[k, c, r, s] * seen
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_gradients_are_added_when_asked(op):
    if op == "linear":
        x, w, dy = normal(3, 4), normal(5, 4), normal(3, 5, seed=1)
        backward = ops.linear_backward
    else:
        x, w, dy = normal(2, 3, 4, 4), normal(5, 3, 3, 3), normal(2, 5, 2, 2, seed=1)
        backward = ops.conv2d_backward
    once, bias_once = np.full(w.shape, 7.0), np.full(5, 7.0)
    assert backward(dy, x, w, once, bias_once, need_dx=False) is None
    twice, bias_twice = once.copy(), bias_once.copy()
    backward(dy, x, w, twice, bias_twice, accumulate=True)
    np.testing.assert_allclose(twice, 2 * once)
    np.testing.assert_allclose(bias_twice, 2 * bias_once)
    without_bias = np.empty_like(w)
    backward(dy, x, w, without_bias, None)
    np.testing.assert_array_equal(without_bias, once)


@pytest.mark.parametrize("case", POOLS)
def test_maxpool2d_gradient(case):
    x_shape, *how = POOLS[case]
    x = spread(*x_shape)
    y, positions = ops.maxpool2d_forward(x, *how)
    dy = normal(*y.shape)
    dx = ops.maxpool2d_backward(dy, positions, x_shape, *how)
    close(dx, slope(lambda: ops.maxpool2d_forward(x, *how)[0], x, dy))


@pytest.mark.parametrize("case", POOLS)
def test_maxpool2d_rounded_up_is_that_with_more_padding(case):
    x_shape, window, stride, padding = POOLS[case]
    x = spread(*x_shape)
    y, positions = ops.maxpool2d_forward(x, window, stride, padding, True)
    # a step less 1: with more there would be one more window in any case
    ends = zip(padding[:2], padding[-2:], stride)
    frame = [(0, 0), (0, 0), *((a, b + step - 1) for a, b, step in ends)]
    wanted, _ = ops.maxpool2d_forward(
        np.pad(x, frame, constant_values=-np.inf), window, stride
    )
    np.testing.assert_array_equal(y, wanted[:, :, : y.shape[2], : y.shape[3]])
    assert (wanted > -np.inf).sum() == y.size  # windows left out would see no number
    dy = normal(*y.shape)
    dx = ops.maxpool2d_backward(dy, positions, x_shape, window, stride, padding, True)
    forward = lambda: ops.maxpool2d_forward(x, window, stride, padding, True)[0]
    close(dx, slope(forward, x, dy))


@pytest.mark.parametrize("case", POOLS)
def test_maxpool2d_positions_hold_the_maxima(case):
    x_shape, *how = POOLS[case]
    x = spread(*x_shape)
    y, positions = ops.maxpool2d_forward(x, *how)
    n, c, h, w = x_shape
    p, q = y.shape[2:]
    planes = x.reshape(n, c, h * w)
    taken = np.take_along_axis(planes, positions.reshape(n, c, p * q), axis=2)
    np.testing.assert_array_equal(taken.reshape(y.shape), y)
    assert positions.dtype == np.int32


@pytest.mark.parametrize(
    "window, at",
    [
        ([1, 3, 3, 2], 1),
        ([0, 0, 0, 0], 0),
        ([5, np.nan, 9, np.nan], 1),
        ([-np.inf] * 4, 0),
        ([-np.inf, -np.inf, np.inf, np.inf], 2),
    ],
)
def test_maxpool2d_takes_the_first_maximum_and_nan(window, at):
    y, positions = ops.maxpool2d_forward(
        np.reshape(window, (1, 1, 2, 2)), (2, 2), (2, 2)
    )
    np.testing.assert_array_equal(y.ravel(), window[at])
    assert positions.ravel() == at


def test_maxpool2d_never_chooses_padding():
    x = np.full((1, 1, 3, 3), -np.inf)
    y, positions = ops.maxpool2d_forward(x, (3, 3), (2, 2), (1, 1))
    assert (y == -np.inf).all()
    np.testing.assert_array_equal(positions[0, 0], [[0, 1], [3, 4]])


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5)])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "log_softmax"])
def test_elementwise_and_softmax_gradients(name, shape):
    forward, backward = getattr(ops, name + "_forward"), getattr(
        ops, name + "_backward"
    )
    x, dy = spread(*shape), normal(*shape)
    close(backward(dy, forward(x)), slope(lambda: forward(x), x, dy))


def test_relu_at_the_edges():
    y = ops.relu_forward(np.array([-np.inf, -1, -0.0, 0.0, 2, np.inf, np.nan]))
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 2, np.inf, np.nan])
    assert not np.signbit(y[:4]).any()


def test_sigmoid_and_log_softmax_far_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            ops.sigmoid_forward(np.array([-1e4, 0, 1e4])), [0, 0.5, 1]
        )
        y = ops.log_softmax_forward(np.array([[1e4, 0.0], [-1e4, -1e4]]))
    np.testing.assert_allclose(y, [[0, -1e4], [-np.log(2), -np.log(2)]])


LABELS = np.array([2, 0, 4], np.int32)


def test_nll_loss_gradient():
    log_probs = normal(3, 5)
    expected = slope(
        lambda: ops.nll_loss_forward(log_probs, LABELS), log_probs, np.array(1.0)
    )
    close(ops.nll_loss_backward(log_probs, LABELS), expected)


def test_cross_entropy_gradient():
    logits = normal(3, 5)
    loss, log_probs = ops.cross_entropy_forward(logits, LABELS)
    assert loss == ops.nll_loss_forward(ops.log_softmax_forward(logits), LABELS)
    expected = slope(
        lambda: ops.cross_entropy_forward(logits, LABELS)[0], logits, np.array(1.0)
    )
    close(ops.cross_entropy_backward(log_probs, LABELS), expected)


def test_losses_of_an_empty_batch():
    scores, labels = np.empty((0, 5)), np.empty(0, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ops.nll_loss_forward(scores, labels))
        loss, log_probs = ops.cross_entropy_forward(scores, labels)
        assert np.isnan(loss)
        assert ops.nll_loss_backward(scores, labels).shape == (0, 5)
        assert ops.cross_entropy_backward(log_probs, labels).shape == (0, 5)


@pytest.mark.parametrize(
    "name",
    [
        "nll_loss_forward",
        "nll_loss_backward",
        "cross_entropy_forward",
        "cross_entropy_backward",
    ],
)
@pytest.mark.parametrize("bad", [-1, 5])
def test_labels_out_of_range(name, bad):
    labels = np.array([0, bad, 9], np.int32)
    with pytest.raises(DataError, match=f"label {bad} at index 1 .* 0 to 4"):
        getattr(ops, name)(normal(3, 5), labels)


def test_argmax_and_tally():
    scores = np.array([[1.0, 3, 3], [2, 1, 0], [0, np.nan, 9]])
    np.testing.assert_array_equal(ops.argmax(scores), [1, 0, 1])
    labels = np.array([1, 2, 1], np.int32)
    hits, loss_sum = np.array(10, np.int32), np.array(0.5)
    ops.tally(np.array([1.0, 2, 6]), scores, labels, loss_sum, hits)
    assert (hits, loss_sum) == (12, 3.5)
    ops.tally(np.array(4.0), scores, labels, loss_sum, hits)
    assert (hits, loss_sum) == (14, 7.5)
    ops.tally(np.array(0.0), scores, np.array([1, -100, 255], np.int32), loss_sum, hits)
    assert (hits, loss_sum) == (15, 7.5)
    with pytest.raises(ShapeError, match=r"losses have shape \(2,\)"):
        ops.tally(np.zeros(2), scores, labels, loss_sum, hits)


def test_rmsprop_by_hand():
    param, square, buffer = np.array([1.0, -2]), np.array([0.0, 4]), np.array([0.0, 1])
    ops.rmsprop_step(
        param, np.array([1.0, 0]), square, buffer, 0.1, 0.9, 1e-2, 0.5, 0.5
    )
    g = np.array([1.5, -1.0])
    v = np.array([0.1 * 2.25, 0.9 * 4 + 0.1])
    b = np.array([0, 0.5]) + g / (np.sqrt(v) + 1e-2)
    np.testing.assert_allclose(square, v)
    np.testing.assert_allclose(buffer, b)
    np.testing.assert_allclose(param, [1, -2] - 0.1 * b)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    param, buffer = np.array([1.0]), np.array([0.0])
    for _ in range(2):
        ops.sgd_step(param, np.array([2.0]), buffer, 0.1, 0.5, 0.0, nesterov)
    # b is 2, then 0.5 * 2 + 2 = 3; nesterov goes by 2 + b / 2
    moved = (3 + 3.5) if nesterov else (2 + 3)
    np.testing.assert_allclose(param, 1 - 0.1 * moved)
    np.testing.assert_allclose(buffer, 3)


def test_momentum_needs_its_buffer():
    with pytest.raises(ValueError, match="needs a momentum_buffer"):
        ops.sgd_step(np.ones(2), np.ones(2), None, 0.1, 0.9, 0.0, False)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 16, 17, 1000, 60000])
def test_permutation_is_one(count):
    order = ops.permutation(count, 1, 0, None)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def scalar_permutation(count, seed, epoch):
    """The definition in Python integers, one element at a time."""
    full = 0xFFFFFFFF

    def mix32(x):
        x ^= x >> 16
        x = x * 0x85EBCA6B & full
        x ^= x >> 13
        x = x * 0xC2B2AE35 & full
        return x ^ x >> 16

    low, high = seed & full, seed >> 32 & full
    bits = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << bits) - 1
    order = []
    for x in range(count):
        while True:
            left, right = x >> bits, x & mask
            for i in range(6):
                key = mix32(low + 0x9E3779B9 * (i + 1) & full) ^ mix32(
                    high + 0x7F4A7C15 * (epoch + 1) + i & full
                )
                left, right = right, left ^ mix32(right + key & full) & mask
            x = left << bits | right
            if x < count:
                break
        order.append(x)
    return order


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 3, 2**32 - 1])
def test_permutation_is_the_one_defined(seed, epoch):
    found = ops.permutation(300, seed, epoch, None)
    assert found.tolist() == scalar_permutation(300, seed, epoch)


def test_permutation_depends_on_seed_and_epoch():
    orders = {
        ops.permutation(100, seed, epoch, None).tobytes()
        for seed in (1, 2, 1 << 32)
        for epoch in (0, 1)
    }
    assert len(orders) == 6


def test_gather():
    images = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
    index = np.array([3, 0, 3], np.int32)
    found = ops.gather_images(images, index, 0.5, -1.0)
    np.testing.assert_array_equal(found, images[[3, 0, 3]] * 0.5 - 1)
    labels = np.array([5, 6, 7, 8], np.int32)
    np.testing.assert_array_equal(ops.gather_labels(labels, index), [8, 5, 8])


@pytest.mark.parametrize("bad", [-1, 4])
def test_gather_out_of_range(bad):
    index = np.array([0, bad], np.int32)
    with pytest.raises(DataError, match=rf"index\[1\] is {bad}: .* 0 to 3"):
        ops.gather_labels(np.zeros(4, np.int32), index)


def test_fill_and_add_write_in_place():
    x = np.zeros(3)
    ops.fill(x, 2)
    ops.add(x, np.ones(3), x)
    np.testing.assert_array_equal(x, [3, 3, 3])
    with pytest.raises(ShapeError):
        ops.add(x, np.ones(1), x)
