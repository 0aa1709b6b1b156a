"""Operations on shapes that nobody chose, for the tests of every device.

A check takes the operations of a device, a function that places an array there, a
generator of random numbers and the precision of products. Bounds are those of
rounded.py: twice what rounding can do, since a device may take another, equally long
way to the same result.
"""

import numpy as np
import rounded
from cycnn.tensor import Tensor
from rounded import F32, Rounded

from cycnn.ops import cpu, reference

ROUNDOFF = {"fp32": F32, "tf32": 2.0**-11, "bf16": 2.0**-8}
EPS = 1e-5


class Draw:
    """Random sizes and arrays."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def size(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def sizes(self, low, high, count=2):
        return tuple(self.size(low, high) for _ in range(count))

    def choice(self, *among):
        return among[self.size(0, len(among) - 1)]

    def magnitude(self, limit=20):
        """A power of two, so that scaling by it rounds nothing."""
        return np.float32(2.0 ** self.size(-limit, limit))

    def normal(self, *shape):
        return self.rng.standard_normal(shape, dtype=np.float32)

    def positive(self, *shape):
        return self.rng.random(shape, dtype=np.float32) + np.float32(0.05)

    def length(self):
        """Of a vector: mostly short, at times of several blocks."""
        return self.choice(self.size(0, 40), self.size(0, 700), self.size(0, 9000))


def close(got, want, bound):
    got, want = got.numpy(), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got.astype(np.float64) - want)
    bound = np.broadcast_to(bound, want.shape)
    # NaN is never within
    assert (error <= bound).all(), f"off by up to {(error / bound).max():.3g} bounds"


def within(got, want, formula):
    """``got`` is ``want`` but for rounding; ``formula`` says the same as ``want``."""
    doubt = np.abs(formula.value - want)
    assert (doubt <= 1e-3 * formula.error + 1e-290).all(), "the formula is another"
    close(got, want, 2 * formula.error)


def equal(got, want):
    np.testing.assert_array_equal(got.numpy(), want)


def placed(on, array, offset):
    """A vector that begins ``offset`` numbers behind the start of an allocation."""
    return on(np.concatenate([np.ones(offset, array.dtype), array]))[offset:]


# convolutions


def _products(ops, on, name, arrays, settings, lengths, precision, accumulate):
    """y and the gradients of a bilinear operation, by the sums of absolute products."""
    forward, backward = f"{name}_forward", f"{name}_backward"

    def run(module, put, arrays):
        x, weight, bias, dy, dweight, dbias = arrays
        y = getattr(module, forward)(put(x), put(weight), put(bias), *settings)
        dw, db = put(dweight), put(dbias)
        dx = getattr(module, backward)(
            put(dy), put(x), put(weight), dw, db, *settings, True, accumulate
        )
        return y, dx, dw, db

    double = [array.astype(np.float64) for array in arrays]
    found = run(ops, on, arrays)
    wanted = run(reference, np.copy, double)
    absolute = run(reference, np.copy, [np.abs(array) for array in double])
    modes = precision, precision, precision, "fp32"
    for got, want, sums, length, mode in zip(found, wanted, absolute, lengths, modes):
        # tensor cores truncate where they add: a whole unit instead of a half
        close(got, want, (2 * ROUNDOFF[mode] + 2 * (length + 2) * F32) * sums)


def conv_transpose(ops, on, draw, precision="fp32"):
    groups, (r, s) = draw.size(1, 3), draw.sizes(1, 4)
    stride, dilation = draw.sizes(1, 3), draw.sizes(1, 2)
    extra = tuple(draw.size(0, step - 1) for step in stride)
    x_shape = draw.size(0, 5), groups * draw.size(1, 20), *draw.sizes(1, 12)
    w_shape = x_shape[1], draw.size(1, 20), r, s
    # so much padding that a pixel is left
    padding = tuple(
        draw.size(0, min(2, ((size - 1) * step + d * (k - 1) + more) // 2))
        for size, step, d, k, more in zip(x_shape[2:], stride, dilation, (r, s), extra)
    )
    settings = stride, padding, extra, dilation, groups
    x, weight = draw.normal(*x_shape), draw.normal(*w_shape)
    bias = draw.normal(w_shape[1] * groups)
    y = reference.conv_transpose2d_forward(x, weight, bias, *settings)
    arrays = [x, weight, bias, draw.normal(*y.shape), draw.normal(*w_shape), bias + 1]
    lengths = (
        x_shape[1] // groups * r * s, w_shape[1] * r * s, x[:, 0].size, y[:, 0].size,
    )  # fmt: skip
    _products(
        ops, on, "conv_transpose2d", [a * draw.magnitude() for a in arrays], settings,
        lengths, precision, bool(draw.size(0, 1)),
    )  # fmt: skip


def depthwise(ops, on, draw):
    """In float32 whatever the precision."""
    c, each = draw.size(2, 20), draw.size(1, 3)
    if draw.size(0, 1):  # those with kernels of their own
        size, stride = (draw.choice(3, 5),) * 2, (draw.size(1, 2),) * 2
        dilation = 1, 1
    else:
        size, stride, dilation = draw.sizes(1, 4), draw.sizes(1, 3), draw.sizes(1, 2)
    padding = draw.sizes(0, 3)
    image = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw.size(0, 14)
        for k, d, p in zip(size, dilation, padding)
    ]
    settings = stride, padding, dilation, c
    x, weight = draw.normal(draw.size(0, 5), c, *image), draw.normal(c * each, 1, *size)
    bias = draw.normal(c * each)
    y = reference.conv2d_forward(x, weight, bias, *settings)
    arrays = [x, weight, bias, draw.normal(*y.shape), weight + 1, bias + 1]
    taps, pixels = size[0] * size[1], y[:, 0].size
    _products(
        ops, on, "conv2d", [a * draw.magnitude() for a in arrays], settings,
        (taps, each * taps, pixels, pixels), "fp32", bool(draw.size(0, 1)),
    )  # fmt: skip


# pooling


def average_pool(ops, on, draw):
    window, stride = draw.sizes(1, 5), draw.sizes(1, 5)
    padding = tuple(draw.size(0, k // 2) for k in window)
    size = [k + draw.size(0, 20) for k in window]
    how = window, stride, padding, bool(draw.size(0, 1))
    x = draw.normal(draw.size(0, 4), draw.size(1, 9), *size) * draw.magnitude()
    want = reference.avgpool2d_forward(x, *how)
    # a sum, and a division by the number of its terms
    unit = 2 * (window[0] * window[1] + 2) * F32
    bound = unit * reference.avgpool2d_forward(np.abs(x), *how)
    close(ops.avgpool2d_forward(on(x), *how), want, bound)
    dy = draw.normal(*want.shape) * draw.magnitude()
    want = reference.avgpool2d_backward(dy, x.shape, *how)
    bound = unit * reference.avgpool2d_backward(np.abs(dy), x.shape, *how)
    close(ops.avgpool2d_backward(on(dy), x.shape, *how), want, bound)


def plane_means(ops, on, draw):
    size = draw.choice(draw.sizes(1, 9), draw.sizes(1, 40), draw.sizes(30, 70))
    x = draw.normal(draw.size(0, 4), draw.size(1, 9), *size) * draw.magnitude()
    want = reference.global_avgpool2d_forward(x)
    within(
        ops.global_avgpool2d_forward(on(x)), want,
        Rounded(x).sum(axis=(2, 3), keepdims=True) / (size[0] * size[1]),
    )  # fmt: skip
    dy = draw.normal(*want.shape) * draw.magnitude()
    want = reference.global_avgpool2d_backward(dy, x.shape)
    close(ops.global_avgpool2d_backward(on(dy), x.shape), want, 2 * F32 * np.abs(want))


# normalisation


def _statistics(x, axes, parts=1):
    """Mean and variance by two passes, and of what a rounded mean leaves.

    Squares about ``near``, which is off by e, have the mean variance + e^2, and the
    latter is taken out: hence e is in no product with the deviations. Where sums are of
    parts, these are joined by their means.
    """
    x = x.astype(np.float64)
    length = x.size // max(x.mean(axis=axes).size, 1)
    mean, variance = x.mean(axis=axes), x.var(axis=axes)
    e = (length + 2) * F32 * np.abs(x).mean(axis=axes)
    size = np.abs(mean) * parts + (length + 4) * np.sqrt(variance + e**2)
    of_mean = 2 * F32 * size
    of_variance = (4 * length + 16) * F32 * (variance + e**2)
    if parts > 1:
        of_variance += 8 * of_mean * np.sqrt(variance) + of_mean**2
    return Rounded(mean, of_mean), Rounded(variance, of_variance)


def _optional(draw, array):
    return array if draw.size(0, 3) else None


def batch_norm(ops, on, draw):
    n, c, (h, w) = draw.size(1, 9), draw.size(1, 40), draw.sizes(1, 24)
    n += n * h * w < 2
    count, axes = n * h * w, (0, 2, 3)
    offset = np.float32(draw.choice(0, 0, 30, -100))
    x = (draw.normal(n, c, h, w) + offset) * draw.magnitude(6)
    weight, bias = _optional(draw, draw.normal(c)), _optional(draw, draw.normal(c))
    running, batches = (draw.normal(c), draw.positive(c)), np.int32(draw.size(0, 5))
    momentum = draw.choice(0.1, 0.25, None)

    def put(array):
        return None if array is None else on(array)

    tensors = [on(array) for array in (*running, np.array(batches))]
    found = ops.batch_norm2d_forward(
        on(x), put(weight), put(bias), *tensors, momentum, EPS
    )
    exact = [array.astype(np.float64) for array in running]
    wants = reference.batch_norm2d_forward(
        x, weight, bias, *exact, np.array(batches), momentum, EPS
    )
    # a part has 4096 numbers
    mean, variance = _statistics(x, axes, 4 * (1 + count // 4096))
    wide = (slice(None), None, None)
    y = x - mean[wide]
    y = y * (1 / rounded.sqrt(variance + EPS))[wide]
    y = y if weight is None else y * weight[wide]
    y = y if bias is None else y + bias[wide]
    for got, want, formula in zip(found, wants, (y, mean, variance)):
        within(got, want, formula)
    f = 1 / (int(batches) + 1) if momentum is None else momentum
    for tensor, want, before, now in zip(
        tensors, exact, running, (mean, variance * count / (count - 1))
    ):
        within(tensor, want, (rounded.of(1) - f) * before + f * now)
    assert int(tensors[2]) == batches + 1

    # the gradients, of statistics as they would be kept
    mean, variance = (np.float32(want) for want in wants[1:])
    dy, before = draw.normal(*x.shape) * draw.magnitude(6), draw.normal(2, c)
    accumulate, of_batch = bool(draw.size(0, 1)), bool(draw.size(0, 2))
    dw, db = on(before[0]), on(before[1])
    dx = ops.batch_norm2d_backward(
        on(dy), on(x), put(weight), on(mean), on(variance), dw, db, EPS, of_batch,
        True, accumulate,
    )  # fmt: skip
    gradients = before.astype(np.float64)
    want = reference.batch_norm2d_backward(
        dy, x, weight, mean, variance, *gradients, EPS, of_batch, True, accumulate
    )
    r = 1 / rounded.sqrt(Rounded(variance) + EPS)
    far = Rounded(x) - mean[wide]
    sums = Rounded(dy).sum(axis=axes), (far * dy).sum(axis=axes) * r
    for tensor, wanted, formula, first in zip((dw, db), gradients, sums[::-1], before):
        within(tensor, wanted, formula + first if accumulate else formula)
    g = Rounded(dy)
    if of_batch:
        g = g - sums[0][wide] / count - far * r[wide] * (sums[1][wide] / count)
    g = g * r[wide]
    within(dx, want, g if weight is None else g * weight[wide])


def layer_norm(ops, on, draw):
    n = draw.choice(draw.size(1, 9), draw.size(1, 300))
    f = draw.choice(draw.size(2, 40), draw.size(2, 300), draw.size(2, 2500))
    n = min(n, 20000 // f + 1)
    x = (draw.normal(n, f) + np.float32(draw.choice(0, 0, 30))) * draw.magnitude(6)
    weight, bias = _optional(draw, draw.normal(f)), _optional(draw, draw.normal(f))

    def put(array):
        return None if array is None else on(array)

    found = ops.layer_norm_forward(on(x), put(weight), put(bias), EPS)
    wants = reference.layer_norm_forward(x, weight, bias, EPS)
    mean, variance = _statistics(x, 1)
    y = (x - mean[:, None]) * (1 / rounded.sqrt(variance + EPS))[:, None]
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    for got, want, formula in zip(found, wants, (y, mean, variance)):
        within(got, want, formula)

    mean, variance = (np.float32(want) for want in wants[1:])
    dy, before = draw.normal(n, f) * draw.magnitude(6), draw.normal(2, f)
    accumulate = bool(draw.size(0, 1))
    dw, db = on(before[0]), on(before[1])
    dx = ops.layer_norm_backward(
        on(dy), on(x), put(weight), on(mean), on(variance), dw, db, EPS, True,
        accumulate,
    )  # fmt: skip
    gradients = before.astype(np.float64)
    want = reference.layer_norm_backward(
        dy, x, weight, mean, variance, *gradients, EPS, True, accumulate
    )
    r = (1 / rounded.sqrt(Rounded(variance) + EPS))[:, None]
    u = (Rounded(x) - mean[:, None]) * r
    for tensor, wanted, formula, first in zip(
        (dw, db), gradients, ((u * dy).sum(axis=0), Rounded(dy).sum(axis=0)), before
    ):
        within(tensor, wanted, formula + first if accumulate else formula)
    g = Rounded(dy) if weight is None else Rounded(dy) * weight
    means = [part.sum(axis=1, keepdims=True) / f for part in (g, g * u)]
    within(dx, want, r * (g - means[0] - u * means[1]))


# rows of scores


def _rows(draw):
    n = draw.choice(draw.size(1, 9), draw.size(1, 200))
    f = draw.choice(draw.size(1, 40), draw.size(1, 300), draw.size(1, 2500))
    return min(n, 20000 // f + 1), f


def softmax(ops, on, draw, x=None):
    if x is None:
        x = draw.normal(*_rows(draw)) * np.float32(draw.choice(0.1, 1, 5, 30))
    far = Rounded(x) - x.max(axis=1, keepdims=True)
    e = rounded.exp(far)
    sums = e.sum(axis=1, keepdims=True)
    y = ops.softmax_forward(on(x))
    within(y, reference.softmax_forward(x), e / sums)
    dy, seen = draw.normal(*x.shape), y.numpy()
    total = (Rounded(seen) * dy).sum(axis=1, keepdims=True)
    want = reference.softmax_backward(dy, seen)
    within(ops.softmax_backward(on(dy), y), want, (dy - total) * seen)

    y = ops.log_softmax_forward(on(x))
    within(y, reference.log_softmax_forward(x), far - rounded.log(sums))
    seen = y.numpy()
    want = reference.log_softmax_backward(dy, seen)
    total = Rounded(dy).sum(axis=1, keepdims=True)
    formula = dy - rounded.exp(Rounded(seen)) * total
    within(ops.log_softmax_backward(on(dy), y), want, formula)


def class_losses(ops, on, draw, x=None):
    if x is None:
        x = draw.normal(*_rows(draw)) * np.float32(draw.choice(0.1, 1, 5))
    n, f = x.shape
    labels = draw.rng.integers(0, f, n).astype(np.int32)
    far = Rounded(x) - x.max(axis=1, keepdims=True)
    log_probs = far - rounded.log(rounded.exp(far).sum(axis=1, keepdims=True))
    rows = np.arange(n)
    _plain_class_losses(ops, on, x, labels, log_probs, rows)

    one_of_several = int(labels[0]) if (labels != labels[0]).any() else -1
    ignored = draw.choice(None, -100, one_of_several)
    if ignored == -100:
        labels[1::3] = -100
    smoothing, mean = draw.choice(0.0, 0.1, 0.3), bool(draw.size(0, 1))
    weight = draw.positive(f) if draw.size(0, 1) else None
    w = np.ones(f, np.float32) if weight is None else weight
    counted = rows if ignored is None else np.flatnonzero(labels != ignored)
    hit = np.zeros((n, f), bool)
    hit[counted, labels[counted]] = True
    q = rounded.where(hit, 1 - rounded.of(smoothing), 0)
    q = (q + rounded.of(smoothing) / f) * w
    total = Rounded(w[labels[counted]]).sum() if mean else Rounded(1)

    def loss(scores):
        # -sum of q log p: of the label, and of all
        own = (1 - rounded.of(smoothing)) * w[labels[counted]]
        terms = own * -scores[counted, labels[counted]]
        if smoothing:
            even = (scores[counted] * w).sum(axis=1)
            terms = terms + rounded.of(smoothing) / f * -even
        return terms.sum() / total

    given = on(labels), None if weight is None else on(weight), smoothing, ignored
    host = labels, weight, smoothing, ignored
    want = reference.weighted_nll_loss_forward(x, *host, mean)
    found = ops.weighted_nll_loss_forward(on(x), *given, mean)
    for got, wanted, formula in zip(found, want, (loss(Rounded(x)), total)):
        within(got, wanted, formula)
    want = reference.weighted_cross_entropy_forward(x, *host, mean)
    found = ops.weighted_cross_entropy_forward(on(x), *given, mean)
    for got, wanted, formula in zip(found, want, (loss(log_probs), total, log_probs)):
        within(got, wanted, formula)
    seen, divisor = np.float32(want[2]), np.float32(want[1])
    counts = np.isin(rows, counted)[:, None]
    formula = rounded.where(counts, -q / divisor, 0)
    want = reference.weighted_nll_loss_backward(seen, *host, divisor)
    given = *given, on(np.array(divisor))
    within(ops.weighted_nll_loss_backward(on(seen), *given), want, formula)
    formula = rounded.exp(Rounded(seen)) * q.sum(axis=1, keepdims=True) - q
    formula = rounded.where(counts, formula / divisor, 0)
    want = reference.weighted_cross_entropy_backward(seen, *host, divisor)
    within(ops.weighted_cross_entropy_backward(on(seen), *given), want, formula)


def _plain_class_losses(ops, on, x, labels, log_probs, rows):
    n, on_labels = len(x), on(labels)
    loss, y = ops.cross_entropy_forward(on(x), on_labels)
    want, want_y = reference.cross_entropy_forward(x, labels)
    within(y, want_y, log_probs)
    within(loss, want, -log_probs[rows, labels].sum() / n)
    seen = y.numpy()
    want = reference.nll_loss_forward(seen, labels)
    formula = -Rounded(seen)[rows, labels].sum() / n
    within(ops.nll_loss_forward(y, on_labels), want, formula)
    hit = (np.arange(x.shape[1]) == labels[:, None]).astype(np.float32)
    want = reference.nll_loss_backward(seen, labels)
    within(ops.nll_loss_backward(y, on_labels), want, -Rounded(hit) / n)
    want = reference.cross_entropy_backward(seen, labels)
    formula = (rounded.exp(Rounded(seen)) - hit) / n
    within(ops.cross_entropy_backward(y, on_labels), want, formula)


def element_formulas(name, x, target, *more):
    """The terms of a loss and their slopes."""
    d = Rounded(x) - target
    if name == "mse_loss":
        return d * d, 2 * d
    if name == "smooth_l1_loss":
        (beta,) = more
        size = rounded.absolute(d)
        inner = size.value < beta
        half = d * d / (2 * beta) if beta else d
        value = rounded.where(inner, half, size - 0.5 * beta)
        return value, rounded.where(inner, d / beta if beta else d, np.sign(d.value))
    (pos_weight,) = more
    e = rounded.exp(Rounded(-np.abs(x)))
    cost = rounded.maximum(-x, 0) + rounded.log1p(e)
    factor = Rounded(np.ones(x.shape))
    if pos_weight is not None:
        factor = 1 + (Rounded(np.resize(pos_weight, x.shape)) - 1) * target
    rest = rounded.where(x >= 0, e, 1) / (1 + e)
    missed = 1 - Rounded(target)
    return missed * x + factor * cost, missed - factor * rest


def element_losses(ops, on, draw):
    shape = draw.choice((draw.length(),), draw.sizes(1, 60), draw.sizes(1, 12, 4))
    x, target = 3 * draw.normal(*shape), draw.rng.random(shape, dtype=np.float32)
    mean = bool(draw.size(0, 1))
    period = shape[-1] if draw.size(0, 1) and x.size else 1
    pos_weight = 3 * draw.positive(period) if draw.size(0, 1) else None
    divisor = max(x.size, 1) if mean else 1
    for name, more in (
        ("mse_loss", ()),
        ("smooth_l1_loss", (draw.choice(0.0, 0.3, 2.0),)),
        ("bce_with_logits", (pos_weight,)),
    ):
        value, slope = element_formulas(name, x, target, *more)
        given = [on(a) if isinstance(a, np.ndarray) else a for a in more]
        if x.size or not mean:
            want = getattr(reference, f"{name}_forward")(x, target, *more, mean)
            loss = getattr(ops, f"{name}_forward")(on(x), on(target), *given, mean)
            within(loss, want, value.sum() / divisor)
        want = getattr(reference, f"{name}_backward")(x, target, *more, mean)
        dx = getattr(ops, f"{name}_backward")(on(x), on(target), *given, mean)
        within(dx, want, slope / divisor)


# element for element


def activations(ops, on, draw):
    size, offset = draw.length(), draw.size(0, 3)
    x, dy = 3 * draw.normal(size), draw.normal(size) * draw.magnitude()
    slope = draw.choice(0.1, -0.5, 0.01)
    given, on_dy = placed(on, x, offset), placed(on, dy, offset)
    for name, more, of_output in (
        ("relu", (), True),
        ("sigmoid", (), True),
        ("tanh", (), True),
        ("leaky_relu", (slope,), False),
        ("gelu", (draw.choice("none", "tanh"),), False),
        ("silu", (), False),
    ):
        want = getattr(reference, f"{name}_forward")(x, *more)
        y = getattr(ops, f"{name}_forward")(given, *more)
        # the argument of an exponential is off by its roundoff, and the functions fall
        # off faster than that grows
        close(y, want, 32 * F32 * (1 + np.abs(want)))
        seen = y if of_output else given
        want = getattr(reference, f"{name}_backward")(dy, seen.numpy(), *more)
        # no derivative is larger than 1.2
        dx = getattr(ops, f"{name}_backward")(on_dy, seen, *more)
        close(dx, want, 64 * F32 * np.abs(dy) + 2.0**-126)


def sums(ops, on, draw):
    size, offset = draw.length(), draw.size(0, 3)
    x, y = draw.normal(size) * draw.magnitude(3), draw.normal(size)
    a, b = placed(on, x, offset), placed(on, y, draw.size(0, 1) * offset)
    out = placed(on, np.full_like(x, np.nan), offset)
    ops.add(a, b, out)
    equal(out, x + y)
    ops.add_relu(a, b, out)
    equal(out, np.maximum(x + y, 0))


def dropout(ops, on, draw):
    """The bits of the CPU, whose numbers are those of the specification."""
    size, offset, p = draw.length(), draw.size(0, 3), draw.choice(0.0, 0.1, 0.5, 0.97)
    x, dy = draw.normal(size), draw.normal(size)
    words = draw.rng.integers(0, 2**32, 3, dtype=np.uint32)
    state = np.append(words, np.uint32(0)).view(np.int32)
    held, on_cpu = on(state), Tensor(state, "cpu")
    y, used = ops.dropout_forward(placed(on, x, offset), held, p)
    want, used_on_cpu = cpu.dropout_forward(Tensor(x, "cpu"), on_cpu, p)
    equal(y, want.numpy())
    equal(held, on_cpu.numpy())
    exact, _ = reference.dropout_forward(x, state.copy(), p)
    close(y, exact, 4 * F32 * np.abs(exact))
    if size:
        dx = ops.dropout_backward(placed(on, dy, offset), used, p)
        want = cpu.dropout_backward(Tensor(dy, "cpu"), used_on_cpu, p)
        equal(dx, want.numpy())


# numbers that only change their place


def zero_pad(ops, on, draw):
    x = draw.normal(draw.size(0, 5), draw.size(1, 9), *draw.sizes(1, 30))
    padding = draw.sizes(0, 5, 4)
    want = reference.zero_pad2d_forward(x, padding)
    equal(ops.zero_pad2d_forward(on(x), padding), want)
    dy = draw.normal(*want.shape)
    want = reference.zero_pad2d_backward(dy, padding)
    equal(ops.zero_pad2d_backward(on(dy), padding), want)


def concat(ops, on, draw):
    n, rest = draw.size(0, 5), draw.sizes(1, 12, draw.choice(0, 2))
    parts = [draw.normal(n, draw.size(1, 30), *rest) for _ in range(draw.size(1, 5))]
    want = np.concatenate(parts, axis=1)
    equal(ops.concat_forward([on(part) for part in parts]), want)
    made = ops.concat_backward(on(want), [part.shape[1] for part in parts])
    for got, part in zip(made, parts):
        equal(got, part)


# optimizers: some steps of one formula


class Slabs:
    """Vectors on a device, as they are specified, and with bounds."""

    def __init__(self, on, arrays, offset=0):
        self.tensors = [None if a is None else placed(on, a, offset) for a in arrays]
        self.wanted = [None if a is None else a.astype(np.float64) for a in arrays]
        self.bounds = [None if a is None else Rounded(a) for a in arrays]

    def check(self):
        for tensor, want, bound in zip(self.tensors, self.wanted, self.bounds):
            if tensor is not None:
                within(tensor, want, bound)


def _vectors(draw, *present):
    """param, grad, and what may be means of squares or not."""
    size = draw.length()
    made = [draw.normal(size), draw.normal(size) * draw.magnitude(3)]
    made += [draw.positive(size) if kind else draw.normal(size) for kind in present]
    return made, draw.size(0, 3)


def rmsprop_formula(slabs, lr, alpha, eps, weight_decay, momentum):
    p, grad, v, b = slabs
    g = grad + weight_decay * p
    v = alpha * v + (1 - rounded.of(alpha)) * g * g
    u = g / (rounded.sqrt(v) + eps)
    b = None if b is None else momentum * b + u
    return [p - lr * (u if b is None else b), grad, v, b]


def centered_rmsprop_formula(slabs, lr, alpha, eps, weight_decay, momentum):
    p, grad, v, a, b = slabs
    g = grad + weight_decay * p
    v, a = alpha * v + (1 - alpha) * g * g, alpha * a + (1 - alpha) * g
    u = g / (rounded.sqrt(rounded.maximum(v - a * a, 0)) + eps)
    b = None if b is None else momentum * b + u
    return [p - lr * (u if b is None else b), grad, v, a, b]


def sgd_formula(slabs, lr, momentum, weight_decay, nesterov):
    p, grad, b = slabs
    g = grad + weight_decay * p
    if b is not None:
        b = momentum * b + g
        g = g + momentum * b if nesterov else b
    return [p - lr * g, grad, b]


# those that count steps are told how many are done


def damped_sgd_formula(slabs, done, lr, momentum, dampening, weight_decay, nesterov):
    p, grad, b = slabs
    g = grad + weight_decay * p
    b = momentum * b + (1 - dampening if done else 1) * g
    return [p - lr * (g + momentum * b if nesterov else b), grad, b]


def adagrad_formula(slabs, done, lr, lr_decay, eps, weight_decay):
    p, grad, s = slabs
    g = grad + weight_decay * p
    s = s + g * g
    rate = Rounded(lr) / (1 + done * rounded.of(lr_decay))
    return [p - rate * g / (rounded.sqrt(s) + eps), grad, s]


def adam_formula(slabs, done, lr, beta1, beta2, eps, weight_decay, decoupled):
    def correction(beta):
        if not beta:
            return Rounded(1)
        return -rounded.expm1((done + 1) * rounded.of(float(np.log(beta))))

    p, grad, m, v, most = slabs
    if decoupled:
        p, g = (1 - Rounded(lr) * weight_decay) * p, grad
    else:
        g = grad + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    most = None if most is None else rounded.maximum(most, v)
    root = rounded.sqrt(v if most is None else most)
    root = root / rounded.sqrt(correction(beta2))
    rate = Rounded(lr) / correction(beta1)
    return [p - rate * m / (root + eps), grad, m, v, most]


FORMULAS = {
    "rmsprop_step": rmsprop_formula,
    "centered_rmsprop_step": centered_rmsprop_formula,
    "sgd_step": sgd_formula,
    "damped_sgd_step": damped_sgd_formula,
    "adagrad_step": adagrad_formula,
    "adam_step": adam_formula,
}


def check_steps(ops, on, name, arrays, numbers, offset=0, steps=3):
    """Steps without a count."""
    lr, slabs = np.array(0.01, np.float32), Slabs(on, arrays, offset)
    for _ in range(steps):
        getattr(ops, name)(*slabs.tensors, on(lr), *numbers)
        getattr(reference, name)(*slabs.wanted, lr.astype(np.float64), *numbers)
        slabs.bounds = FORMULAS[name](slabs.bounds, lr, *numbers)
    slabs.check()


def check_counted_steps(ops, on, name, arrays, numbers, advances, offset=0):
    """Steps that are counted where ``advances`` says so."""
    lr, slabs = np.array(0.01, np.float32), Slabs(on, arrays, offset)
    # what is done, and the blocks that are counted: none, between steps
    step, held = np.zeros(2, np.int32), on(np.zeros(2, np.int32))
    for advance in advances:
        done, exact = int(step[0]), lr.astype(np.float64)
        getattr(ops, name)(*slabs.tensors, held, advance, on(lr), *numbers)
        getattr(reference, name)(*slabs.wanted, step, advance, exact, *numbers)
        slabs.bounds = FORMULAS[name](slabs.bounds, done, lr, *numbers)
        equal(held, step)
    slabs.check()


def rmsprop(ops, on, draw):
    arrays, offset = _vectors(draw, True, False)
    if draw.size(0, 1):
        arrays[3] = None
    numbers = draw.choice(0.99, 0.9), draw.choice(1e-8, 1e-3), 0.01
    numbers = *numbers, 0.0 if arrays[3] is None else 0.9
    check_steps(ops, on, "rmsprop_step", arrays, numbers, offset)


def centered_rmsprop(ops, on, draw):
    arrays, offset = _vectors(draw, True, False, False)
    arrays[2] += arrays[3] ** 2  # a mean of squares is not below the squared mean
    if draw.size(0, 1):
        arrays[4] = None
    numbers = 0.9, 1e-2, 0.01, 0.0 if arrays[4] is None else 0.5
    check_steps(ops, on, "centered_rmsprop_step", arrays, numbers, offset, 2)


def sgd(ops, on, draw):
    arrays, offset = _vectors(draw, False)
    momentum, nesterov = draw.choice(0.0, 0.9), bool(draw.size(0, 1))
    if not momentum:
        arrays[2] = None
    check_steps(ops, on, "sgd_step", arrays, (momentum, 0.01, nesterov), offset)


ADVANCES = False, True, True


def damped_sgd(ops, on, draw):
    arrays, offset = _vectors(draw, False)
    numbers = 0.9, draw.choice(0.2, 0.9), 0.1, bool(draw.size(0, 1))
    check_counted_steps(ops, on, "damped_sgd_step", arrays, numbers, ADVANCES, offset)


def adagrad(ops, on, draw):
    arrays, offset = _vectors(draw, True)
    numbers = 0.1, 1e-8, 0.1
    check_counted_steps(ops, on, "adagrad_step", arrays, numbers, ADVANCES, offset)


def adam(ops, on, draw):
    arrays, offset = _vectors(draw, False, True, True)
    if draw.size(0, 1):
        arrays[4] = None
    betas = draw.choice((0.9, 0.999), (0.5, 0.9), (0.0, 0.0))
    numbers = *betas, draw.choice(1e-8, 1e-3), 0.1, bool(draw.size(0, 1))
    check_counted_steps(ops, on, "adam_step", arrays, numbers, ADVANCES, offset)


def averages(ops, on, draw):
    (x, y), offset = _vectors(draw)
    decay, average, want = draw.choice(0.9, 0.999), placed(on, x, offset), x * 1.0
    want, bound = want.astype(np.float64), Rounded(x)
    for _ in range(3):
        ops.ema_step(average, placed(on, y, offset), decay)
        reference.ema_step(want, y, decay)
        bound = bound + (1 - decay) * (y - bound)
    within(average, want, bound)
    a, b = placed(on, x, offset), placed(on, y, 0)
    ops.swap(a, b)
    equal(a, y)
    equal(b, x)


def clipping(ops, on, draw):
    (x, _), offset = _vectors(draw)
    if not x.size:
        return
    parts = draw.choice(1, draw.size(2, 40), draw.size(2, 700))
    found, sums = on(np.full(parts, np.nan, np.float32)), np.empty(parts)
    ops.square_sums(placed(on, x, offset), found)
    reference.square_sums(x, sums)
    # every part is a sum of as many squares, none of them negative
    length = -(-x.size // parts)
    close(found, sums, 2 * (length + 1) * F32 * sums)
    sums, limit = np.float32(sums), draw.choice(0.5, 1e9, 1e-20)
    length = rounded.sqrt(Rounded(sums).sum())
    clipped, norm = placed(on, x, offset), on(np.array(np.nan, np.float32))
    want, want_norm = x.astype(np.float64), np.zeros(())
    ops.clip_by_norm(clipped, on(sums), limit, norm)
    reference.clip_by_norm(want, sums, limit, want_norm)
    within(norm, want_norm, length)
    if limit == 1e9:
        equal(clipped, x)
    else:
        within(clipped, want, Rounded(x) * (limit / (length + 1e-6)))


# all but conv_transpose, which takes a precision
CHECKS = {
    check.__name__.replace("_", " "): check
    for check in (
        depthwise, average_pool, plane_means, batch_norm, layer_norm, softmax,
        class_losses, element_losses, activations, sums, dropout, zero_pad, concat,
        rmsprop, centered_rmsprop, sgd, damped_sgd, adagrad, adam, averages, clipping,
    )
}  # fmt: skip
