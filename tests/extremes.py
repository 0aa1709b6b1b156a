"""NaN, infinity, numbers below the normal ones and large scores, on every device.

A check takes the operations of a device and a function that places an array there.
"""

import numpy as np
from any_shape import ROUNDOFF, Draw, class_losses, equal, softmax
from rounded import F32

from cycnn.ops import reference

LEAST = 2.0**-149  # the smallest float32


def same_where_infinite(got, want, bound):
    """NaN and infinities where ``want`` has them, and within ``bound`` elsewhere."""
    got = got.numpy()
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite].astype(np.float32))
    error = np.abs(got[finite].astype(np.float64) - want[finite])
    assert (error <= np.broadcast_to(bound, want.shape)[finite]).all()


# x, weight, options. Without padding: 0 times infinity is nobody's sum.
CONVOLUTIONS = {
    "3x3": ((4, 5, 9, 7), (6, 5, 3, 3), {}),
    "1x1": ((4, 9, 5, 5), (7, 9, 1, 1), {}),
    "groups": ((4, 6, 7, 6), (4, 3, 2, 3), {"groups": 2, "stride": (2, 1)}),
    "depthwise": ((4, 5, 9, 9), (5, 1, 3, 3), {"groups": 5}),
}
SPOTS = (1, np.nan), (2, np.inf), (3, -np.inf)  # image, what is put into it


def conv2d(ops, on, case, precision="fp32"):
    """What is not finite reaches all that is computed of it, and nothing else."""
    x_shape, w_shape, options = CONVOLUTIONS[case]
    draw = Draw(5)
    x, weight, bias = (
        draw.normal(*x_shape),
        draw.normal(*w_shape),
        draw.normal(w_shape[0]),
    )
    y = reference.conv2d_forward(x, weight, bias, **options)
    dy = draw.normal(*y.shape)
    products = max(w_shape[0] * w_shape[2] * w_shape[3], y[:, 0].size, weight[0].size)
    unit = 2 * ROUNDOFF[precision] + 2 * (products + 2) * F32

    def backward(module, put, dy, x, weight):
        dweight, dbias = put(np.zeros_like(weight)), put(np.zeros_like(bias))
        dx = module.conv2d_backward(
            put(dy), put(x), put(weight), dweight, dbias, **options
        )
        return dx, dweight, dbias

    def double(array):
        return array.astype(np.float64)

    sums = backward(reference, double, *map(np.abs, (dy, x, weight)))
    largest = np.abs(
        reference.conv2d_forward(*map(np.abs, (x, weight, bias)), **options)
    )
    spoilt = x.copy(), dy.copy()
    for array in spoilt:
        for image, value in SPOTS:
            array[image, image, 1, 2] = value
    with np.errstate(invalid="ignore"):
        want = reference.conv2d_forward(spoilt[0], weight, bias, **options)
        assert not np.isfinite(want).all() and np.isfinite(want).any()
        got = ops.conv2d_forward(on(spoilt[0]), on(weight), on(bias), **options)
        same_where_infinite(got, want, unit * largest)
        for given in (dy, spoilt[0], weight), (spoilt[1], x, weight):
            found = backward(ops, on, *given)
            wanted = backward(reference, double, *given)
            for got, want, absolute in zip(found, wanted, sums):
                same_where_infinite(got, want, unit * absolute)


def linear(ops, on, precision="fp32"):
    draw = Draw(6)
    x, weight, dy = draw.normal(9, 40), draw.normal(7, 40), draw.normal(9, 7)
    unit = 2 * ROUNDOFF[precision] + 2 * 42 * F32

    def backward(module, put, dy, x, weight):
        dweight, dbias = put(np.zeros_like(weight)), put(np.zeros_like(weight[:, 0]))
        dx = module.linear_backward(put(dy), put(x), put(weight), dweight, dbias)
        return dx, dweight, dbias

    def double(array):
        return array.astype(np.float64)

    sums = backward(reference, double, *map(np.abs, (dy, x, weight)))
    spoilt = x.copy(), dy.copy()
    for array in spoilt:
        for row, value in SPOTS:
            array[row, 2 * row - 1] = value
    for given in (dy, spoilt[0], weight), (spoilt[1], x, weight):
        found = backward(ops, on, *given)
        with np.errstate(invalid="ignore"):
            wanted = backward(reference, double, *given)
        for got, want, absolute in zip(found, wanted, sums):
            same_where_infinite(got, want, unit * absolute)


def denormal(draw, *shape):
    """Below the normal numbers, of either sign, with some zeros."""
    return (draw.rng.integers(-4000, 4000, shape) * LEAST).astype(np.float32)


def denormals(ops, on):
    """They are numbers as others are: what is exact for others is for them."""
    draw = Draw(7)
    x, y = denormal(draw, 3, 2, 10, 12), denormal(draw, 3, 2, 10, 12)
    out = on(np.zeros_like(x))
    ops.add(on(x), on(y), out)
    equal(out, x + y)
    ops.add_relu(on(x), on(y), out)
    equal(out, np.maximum(x + y, 0))
    seen = ops.relu_forward(on(x))
    equal(seen, np.maximum(x, 0))
    equal(ops.relu_backward(on(y), seen), np.where(x > 0, y, 0))
    slope = ops.leaky_relu_forward(on(x), 0.5).numpy()
    assert (np.abs(slope - np.where(x > 0, x, 0.5 * x.astype(float))) <= LEAST).all()
    how = (2, 3), (2, 3), (0, 0)
    pooled, at = ops.maxpool2d_forward(on(x), *how)
    want, want_at = reference.maxpool2d_forward(x, *how)
    equal(pooled, want)
    equal(at, want_at)
    dy = denormal(draw, *want.shape)
    want = reference.maxpool2d_backward(dy, want_at, x.shape, *how)
    equal(ops.maxpool2d_backward(on(dy), at, x.shape, *how), want)
    for found, want in (
        (ops.avgpool2d_forward(on(x), *how), reference.avgpool2d_forward(x, *how)),
        (
            ops.avgpool2d_backward(on(dy), x.shape, *how),
            reference.avgpool2d_backward(dy, x.shape, *how),
        ),
        (ops.global_avgpool2d_forward(on(x)), reference.global_avgpool2d_forward(x)),
    ):
        # sums are exact, a division is rounded
        assert (np.abs(found.numpy() - want) <= LEAST).all()


def denormal_products(ops, on):
    """In float32, of factors that are normal and products that are not."""
    draw = Draw(8)
    x, weight = draw.normal(9, 33), draw.normal(5, 33)
    x, weight = x * np.float32(1e-20), weight * np.float32(1e-20)
    want = reference.linear_forward(x, weight, None)
    assert 100 * LEAST < np.abs(want).max() < 2.0**-126
    got = ops.linear_forward(on(x), on(weight), None).numpy()
    assert (np.abs(got - want) <= 35 * LEAST).all()


def large_scores(ops, on, seed):
    """Log-softmax, its losses and their gradients of scores of 10,000 and -10,000."""
    draw = Draw(seed)
    shape = draw.size(1, 40), draw.choice(2, 10, 257, 2100)
    x = draw.rng.integers(-1, 2, shape) * np.float32(1e4) + draw.normal(*shape)
    x = x.astype(np.float32)
    softmax(ops, on, draw, x)
    class_losses(ops, on, draw, x)
