"""NaN, infinity, denormals and large scores on a GPU, in fused operations too."""

import extremes
import numpy as np
import pytest
from bounds import F32, on_gpu
from extremes import SPOTS

from cycnn.ops import reference

# of a product, as in test_fused_forward.py and test_fused_backward.py
OPERANDS = {"fp32": 2.0**-20, "tf32": 2.0**-10, "bf16": 2.0**-7}


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


@pytest.fixture(scope="module")
def forward():
    from cycnn.ops import fused_cuda_forward

    return fused_cuda_forward


@pytest.fixture(scope="module")
def backward():
    from cycnn.ops import fused_cuda_backward

    return fused_cuda_backward


@pytest.mark.parametrize("case", extremes.CONVOLUTIONS)
def test_nan_and_infinity_pass_through_convolutions(ops, precision, case):
    mode = "fp32" if case == "depthwise" else precision
    extremes.conv2d(ops, on_gpu, case, mode)


def test_nan_and_infinity_pass_through_the_backward_of_linear(ops, precision):
    extremes.linear(ops, on_gpu, precision)


def test_denormals_are_numbers(ops):
    extremes.denormals(ops, on_gpu)


def test_products_may_be_denormal(ops):
    """In fp32: what tensor cores do with factors below the normal is not promised."""
    extremes.denormal_products(ops, on_gpu)


@pytest.mark.parametrize("seed", range(4))
def test_large_scores(ops, seed):
    extremes.large_scores(ops, on_gpu, seed)


# x, filters, pool
BLOCKS = {
    "first": ((4, 1, 13, 14), (8, 5, 5), (2, 2)),
    "several channels": ((4, 12, 10, 8), (20, 3, 3), (2, 2)),
    "no pool": ((4, 16, 9, 7), (8, 3, 3), None),
    "small": ((4, 16, 4, 4), (24, 3, 3), None),
    "one tap": ((4, 16, 6, 6), (8, 1, 1), None),
}


def block_of(case):
    x_shape, (k, r, s), pool = BLOCKS[case]
    rng = np.random.default_rng(9)
    x = rng.standard_normal(x_shape, dtype=np.float32)
    weight = rng.standard_normal((k, x_shape[1], r, s), dtype=np.float32)
    return x, weight, rng.standard_normal(k, dtype=np.float32), pool, rng


def windows(z, pool):
    """(N, K, P', Q', positions) of (N, K, P, Q)."""
    n, k, p, q = z.shape
    high, wide = pool or (1, 1)
    z = z[:, :, : p // high * high, : q // wide * wide]
    z = z.reshape(n, k, p // high, high, q // wide, wide).transpose(0, 1, 2, 4, 3, 5)
    return z.reshape(*z.shape[:4], high * wide)


@pytest.mark.parametrize("case", BLOCKS)
def test_nan_and_infinity_pass_through_a_block(forward, precision, case):
    x, weight, bias, pool, _ = block_of(case)
    largest = reference.conv2d_forward(*map(np.abs, (x, weight, bias)))
    unit = 2 * OPERANDS[precision] + 2 * (weight[0].size + 4) * F32
    for image, value in SPOTS:
        x[image, 0, 1, 2] = value
    y, _ = forward.conv_block_forward(*map(on_gpu, (x, weight, bias)), True, pool)
    y = y.numpy()
    with np.errstate(invalid="ignore"):
        candidates = windows(reference.conv2d_forward(x, weight, bias), pool)
        want = candidates.max(-1)
    want = np.where(want <= 0, 0.0, want)
    bound = unit * windows(largest, pool).max(-1)
    finite = np.isfinite(candidates).all(-1)
    assert finite.any() and not finite.all()
    assert (np.abs(y[finite] - want[finite]) <= bound[finite]).all()
    got, want, bound = y[~finite], want[~finite], bound[~finite]
    numbers = np.isfinite(want)  # beside minus infinity
    with np.errstate(invalid="ignore"):
        right = np.where(numbers, np.abs(got - want) <= bound, got == want)
    right |= np.isnan(got) & np.isnan(want)
    if precision == "fp32" or x.shape[1] <= 4:
        # Of the two parts of a weight one may be negative, or 0: an infinite number
        # times both is NaN then. Kernels of few channels have weights of 0 behind the
        # last tap, which meet the number at the first.
        right |= np.isnan(got)
    assert right.all()


def gradients(dz, x, weight):
    dweight, dbias = np.zeros(weight.shape), np.zeros(len(weight))
    return reference.conv2d_backward(dz, x, weight, dweight, dbias), dweight, dbias


@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("case", BLOCKS)
def test_nan_and_infinity_in_the_backward_of_a_block(backward, precision, case, where):
    """They are not lost. Other images, channels and filters know nothing of them."""
    x, weight, bias, pool, rng = block_of(case)
    z = reference.conv2d_forward(x, weight, bias)
    candidates = windows(z, pool)
    y, at = candidates.max(-1), candidates.argmax(-1)
    y = np.maximum(y, 0).astype(np.float32)
    code = None if pool is None else np.where(y > 0, at + 1, 0).astype(np.uint8)
    dy = rng.standard_normal(y.shape, dtype=np.float32)
    spoilt = x if where == "x" else dy
    before = spoilt.copy()
    for image, value in SPOTS:
        if where == "dy" and np.isnan(value):
            value = np.uint32(0x7FFFFFFF).view(np.float32)  # as a GPU has it
        # into one channel, at a place that is let through
        places = np.argwhere((y if where == "dy" else np.abs(x))[image, 0] > 0)
        spoilt[(image, 0, *places[len(places) // 2])] = value
    absolute = np.abs(before)

    def unpooled(dy):
        # dy at the first largest place of its window, where relu let it through
        high, wide = pool or (1, 1)
        n, k, p, q = dy.shape
        dz = np.zeros((n, k, p, q, high * wide))
        np.put_along_axis(dz, at[..., None], np.where(y > 0, dy, 0)[..., None], -1)
        dz = dz.reshape(n, k, p, q, high, wide).transpose(0, 1, 2, 4, 3, 5)
        whole = np.zeros(z.shape)
        whole[:, :, : p * high, : q * wide] = dz.reshape(n, k, p * high, q * wide)
        return whole

    with np.errstate(invalid="ignore"):
        wants = gradients(unpooled(dy), x, weight)
    clean = (absolute, dy) if where == "x" else (x, absolute)
    sums = gradients(np.abs(unpooled(clean[1])), np.abs(clean[0]), np.abs(weight))
    made = [on_gpu(np.full(a.shape, np.nan, np.float32)) for a in (weight, bias)]
    dx = backward.conv_block_backward(
        *map(on_gpu, (dy, y, code, x, weight)), *made, True, pool
    )
    lengths = weight[:, 0].size, z[:, 0].size, z[:, 0].size
    dx, dweight, dbias = (tensor.numpy() for tensor in (dx, *made))
    for got, want in zip((dx, dweight, dbias), wants):
        assert not np.isfinite(got[~np.isfinite(want)]).any()
    if where == "x":  # of which only dweight of channel 0 is made
        apart = np.s_[:], np.s_[:, 1:], np.s_[:]
    else:  # images without any; filters but the first
        apart = np.s_[:1], np.s_[1:], np.s_[1:]
    for got, want, total, length, part in zip(
        (dx, dweight, dbias), wants, sums, lengths, apart
    ):
        bound = total * (2 * OPERANDS[precision] + (length + 8) * F32) + 1e-30
        assert (np.abs(got[part] - want[part]) <= bound[part]).all()


def exact_scores(rng, n, inputs, classes):
    """x, weight, bias and the scores that they make, up to 18,192 and whole numbers.

    A row of x is 1 at one place, so that no precision rounds anything.
    """
    x = np.zeros((n, inputs), np.float32)
    x[np.arange(n), rng.integers(0, inputs, n)] = 1
    weight = rng.choice(np.float32([-8192, 0, 4096, 8192]), (classes, inputs))
    bias = rng.choice(np.float32([-1e4, 0, 1e4]), classes)
    return x, weight, bias, x.astype(np.float64) @ weight.T + bias


def labels_of(scores):
    """The least likely class and the likeliest, in turn."""
    odd = np.arange(len(scores)) % 2 == 1
    return np.where(odd, scores.argmax(1), scores.argmin(1)).astype(np.int32)


def check_scores(log_probs, losses, dlogits, scores, labels):
    n = len(scores)
    want = reference.log_softmax_forward(scores)
    # scores are whole numbers: rounded is the logarithm, and when it is taken off
    bound = 4 * F32 * (4 + np.abs(want))
    assert (np.abs(log_probs - want) <= bound).all()
    terms = -want[np.arange(n), labels]
    assert terms.max() > 1e4
    size = 8 * F32 * (4 + np.abs(terms))
    if losses.shape:
        assert (np.abs(losses - terms) <= size).all()
    else:
        # and their sum, of n terms
        assert np.abs(losses - terms.mean()) <= size.mean() + n * F32 * terms.mean()
    gradient = reference.cross_entropy_backward(want, labels)
    # exp() of numbers near 0, or of such that give 0
    assert (np.abs(dlogits - gradient) <= 32 * F32 / n).all()


@pytest.mark.parametrize("n, inputs, classes", [(33, 40, 10), (5, 8, 100)])
def test_a_head_of_large_scores(forward, precision, n, inputs, classes):
    rng = np.random.default_rng(10)
    x, weight, bias, scores = exact_scores(rng, n, inputs, classes)
    labels = labels_of(scores)
    got = forward.head_forward(*map(on_gpu, (x, weight, bias, labels)))
    check_scores(*(tensor.numpy() for tensor in got), scores, labels)


@pytest.mark.parametrize("n, inputs, hidden, classes", [(33, 40, 64, 10), (5, 8, 8, 3)])
def test_a_tail_of_large_scores(forward, precision, n, inputs, hidden, classes):
    if not forward.tail_supported(inputs, hidden, classes, 0):
        return
    rng = np.random.default_rng(11)
    x, weight_out, bias_out, scores = exact_scores(rng, n, hidden, classes)
    # the hidden layer passes on what it is given
    weight, bias = (
        np.eye(hidden, inputs, dtype=np.float32),
        np.zeros(hidden, np.float32),
    )
    x = x[:, :inputs]
    scores = x @ weight_out[:, :inputs].T.astype(np.float64) + bias_out
    labels = labels_of(scores)
    given = [on_gpu(array) for array in (x, weight, bias)]
    given += [True, *map(on_gpu, (weight_out, bias_out, labels))]
    y, *got = (tensor.numpy() for tensor in forward.tail_forward(*given))
    np.testing.assert_array_equal(y, x @ weight.T)
    check_scores(*got, scores, labels)
