"""The CPU operations against the specification, over shapes that catch edges."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_reference import CONVOLUTIONS, POOLS

from cycnn.errors import DataError, ShapeError
from cycnn.ops import _cpu, cpu, reference
from cycnn.tensor import Tensor, from_array

EPS = np.finfo(np.float32).eps


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32)


def on_cpu(array):
    return Tensor(array, "cpu")


def close(found, expected, length, scale=1.0):
    """``found`` is ``expected`` but for rounding.

    Each of ``length`` terms of size ``scale`` in a sum adds at most eps / 2 of the
    partial sum, which grows like sqrt(length): length * eps * scale bounds the whole
    with room for a few more roundings around the sum.
    """
    if isinstance(found, Tensor):
        found = found.numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, rtol=4 * EPS, atol=EPS * scale * (length + 4)
    )


HERE = [name for name in ("base", "avx2", "avx512") if _cpu.use_instructions(name)]
_cpu.use_instructions(None)


@pytest.fixture(params=HERE)
def instructions(request):
    """Runs the test with each set of workers that this machine can run."""
    _cpu.use_instructions(request.param)
    yield
    _cpu.use_instructions(None)


# linear


def check_linear(n, inputs, outputs, bias=True):
    x, w = normal(n, inputs), normal(outputs, inputs, seed=1)
    b, dy = normal(outputs, seed=2) if bias else None, normal(n, outputs, seed=3)
    tensors = [None if a is None else on_cpu(a) for a in (x, w, b)]
    close(cpu.linear_forward(*tensors), reference.linear_forward(x, w, b), inputs, 4)

    dw, db = np.full(w.shape, 3.0), np.full(outputs, 3.0)
    tw, tb = on_cpu(dw), on_cpu(db)
    for accumulate in False, True:
        expected = reference.linear_backward(dy, x, w, dw, db, True, accumulate)
        found = cpu.linear_backward(
            on_cpu(dy), tensors[0], tensors[1], tw, tb, True, accumulate
        )
        close(found, expected, outputs, 4)
        close(tw, dw, n, 8)
        close(tb, db, n, 8)
    assert (
        cpu.linear_backward(on_cpu(dy), tensors[0], tensors[1], tw, None, False) is None
    )


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [0, 1, 3, 33])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (31, 33), (257, 10), (600, 7)])
def test_linear(n, inputs, outputs):
    check_linear(n, inputs, outputs)


def test_linear_without_bias():
    check_linear(5, 31, 33, bias=False)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 40))
def test_linear_of_any_shape(n, inputs, outputs):
    check_linear(n, inputs, outputs)


# convolution


def check_conv2d(x_shape, w_shape, *how, bias=True):
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    b = normal(w_shape[0], seed=2) if bias else None
    expected = reference.conv2d_forward(x, w, b, *how)
    dy = normal(*expected.shape, seed=3)
    tx, tw, tdy = on_cpu(x), on_cpu(w), on_cpu(dy)
    taps = int(np.prod(w_shape[1:]))
    found = cpu.conv2d_forward(tx, tw, None if b is None else on_cpu(b), *how)
    close(found, expected, taps, 4)

    dw, db = np.full(w.shape, 3.0), np.full(w_shape[0], 3.0)
    tdw, tdb = on_cpu(dw), on_cpu(db)
    positions = int(np.prod(dy.shape)) // w_shape[0]
    for accumulate in False, True:
        expected = reference.conv2d_backward(dy, x, w, dw, db, *how, True, accumulate)
        found = cpu.conv2d_backward(tdy, tx, tw, tdw, tdb, *how, True, accumulate)
        close(found, expected, taps // w_shape[1] * w_shape[0], 4)
        close(tdw, dw, positions, 8)
        close(tdb, db, positions, 8)
    assert cpu.conv2d_backward(tdy, tx, tw, tdw, None, *how, False) is None


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case):
    check_conv2d(*CONVOLUTIONS[case])


ODD_CONVOLUTIONS = {
    "first layer": ((3, 1, 28, 28), (32, 1, 5, 5), (1, 1), (0, 0), (1, 1), 1),
    "second layer": ((3, 32, 12, 12), (64, 32, 5, 5), (1, 1), (0, 0), (1, 1), 1),
    "third layer": ((33, 64, 4, 4), (128, 64, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "one pixel": ((31, 257, 1, 1), (33, 257, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "long row": ((1, 2, 1, 257), (31, 2, 1, 33), (1, 1), (0, 0), (1, 1), 1),
    "wide padding": ((3, 3, 5, 4), (7, 3, 5, 5), (2, 3), (6, 7), (1, 1), 1),
    "deep, strided": ((2, 33, 9, 31), (13, 33, 3, 3), (2, 2), (1, 1), (1, 2), 1),
    "many groups": ((3, 12, 8, 9), (20, 3, 2, 3), (1, 2), (1, 0), (2, 1), 4),
    "wide depth-wise": ((2, 33, 31, 17), (33, 1, 3, 3), (1, 1), (1, 1), (1, 1), 33),
    "deep output": ((2, 3, 6, 6), (300, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("case", ODD_CONVOLUTIONS)
def test_conv2d_over_odd_shapes(case):
    check_conv2d(*ODD_CONVOLUTIONS[case])


def test_conv2d_without_bias():
    check_conv2d(*CONVOLUTIONS["groups"], bias=False)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_conv2d_of_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    filter_size = draw(1, 4), draw(1, 4)
    dilation, padding = (draw(1, 3), draw(1, 3)), (draw(0, 3), draw(0, 3))
    reach = [d * (f - 1) + 1 for d, f in zip(dilation, filter_size)]
    size = [max(1, r - 2 * p) + draw(0, 12) for r, p in zip(reach, padding)]
    x_shape = draw(0, 5), groups * draw(1, 5), *size
    w_shape = groups * draw(1, 20), x_shape[1] // groups, *filter_size
    check_conv2d(x_shape, w_shape, (draw(1, 5), draw(1, 5)), padding, dilation, groups)


# pooling


def check_maxpool2d(x, *how):
    y, positions = reference.maxpool2d_forward(x, *how)
    ty, tpositions = cpu.maxpool2d_forward(on_cpu(x), *how)
    np.testing.assert_array_equal(ty.numpy(), y.astype(np.float32))
    np.testing.assert_array_equal(tpositions.numpy(), positions)
    dy = normal(*y.shape)
    expected = reference.maxpool2d_backward(dy, positions, x.shape, *how)
    found = cpu.maxpool2d_backward(on_cpu(dy), tpositions, x.shape, *how)
    close(found, expected, int(np.prod(how[0])), 4)


ODD_POOLS = {
    "second layer": ((3, 64, 8, 8), (2, 2), (2, 2), (0, 0)),
    "one column": ((3, 2, 2, 2), (2, 2), (2, 2), (0, 0)),
    "31 by 33": ((3, 5, 31, 33), (2, 2), (2, 2), (0, 0)),
    "many": ((1, 33, 257, 31), (3, 3), (2, 2), (1, 1)),
    # of two by two without padding in front, and yet not all inside
    "over the lower edge": ((2, 3, 5, 6), (2, 2), (2, 2), (0, 0), True),
    "over the right edge": ((2, 3, 6, 5), (2, 2), (2, 2), (0, 0), True),
    "padding below": ((2, 3, 5, 4), (2, 2), (2, 2), (0, 0, 1, 0)),
    "padding on the right": ((2, 3, 4, 5), (2, 2), (2, 2), (0, 0, 0, 1)),
}


@pytest.mark.parametrize("kind", ["ties", "nan", "distinct"])
@pytest.mark.parametrize("case", [*POOLS, *ODD_POOLS])
def test_maxpool2d(case, kind):
    x_shape, *how = {**POOLS, **ODD_POOLS}[case]
    x = normal(*x_shape)
    if kind == "ties":
        x = np.round(x)
    elif kind == "nan":
        x[normal(*x_shape, seed=1) > 0] = np.nan
        x[normal(*x_shape, seed=2) > 1] = -np.inf
    check_maxpool2d(x, *how)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_maxpool2d_of_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    window = draw(1, 4), draw(1, 4)
    if draw(0, 1):
        padding = tuple(draw(0, k // 2) for k in window)
    else:
        padding = tuple(draw(0, k - 1) for k in (*window, *window))
    ends = zip(window, padding[:2], padding[-2:])
    size = [max(1, k - a - b) + draw(0, 9) for k, a, b in ends]
    x = np.round(2 * normal(draw(0, 3), draw(1, 3), *size))
    check_maxpool2d(x, window, (draw(1, 5), draw(1, 5)), padding, bool(draw(0, 1)))


def test_a_position_outside_is_skipped():
    dy = on_cpu(np.ones((1, 1, 1, 1)))
    for position in -1, 4, 2**31 - 1:
        positions = on_cpu(np.full((1, 1, 1, 1), position))
        dx = cpu.maxpool2d_backward(dy, positions, (1, 1, 2, 2), (2, 2), (2, 2))
        assert not dx.numpy().any()


# elementwise, softmax, losses

SHAPES = [(0, 3), (1, 1), (3, 31), (33, 33), (257, 257), (3, 60000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_relu(shape):
    x, dy = normal(*shape), normal(*shape, seed=1)
    if x.size > 9:
        x.flat[:5] = np.nan, np.inf, -np.inf, -0.0, 0.0
    y = cpu.relu_forward(on_cpu(x))
    np.testing.assert_array_equal(y.numpy(), reference.relu_forward(x))
    assert not np.signbit(y.numpy()[y.numpy() == 0]).any()
    dx = cpu.relu_backward(on_cpu(dy), y)
    np.testing.assert_array_equal(dx.numpy(), reference.relu_backward(dy, y.numpy()))


@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoid(shape):
    x, dy = 5 * normal(*shape), normal(*shape, seed=1)
    if x.size > 9:
        x.flat[:4] = 1e4, -1e4, np.inf, -np.inf
    y = cpu.sigmoid_forward(on_cpu(x))
    close(y, reference.sigmoid_forward(x), 1)
    dx = cpu.sigmoid_backward(on_cpu(dy), y)
    close(dx, reference.sigmoid_backward(dy, y.numpy()), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_in_place(shape):
    x, y = normal(*shape), normal(*shape, seed=1)
    out = on_cpu(x)
    cpu.add(out, on_cpu(y), out)
    np.testing.assert_array_equal(out.numpy(), x + y)


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_fill_of_any_dtype(dtype):
    x = on_cpu(np.zeros((2, 3), dtype))
    cpu.fill(x, 7)
    np.testing.assert_array_equal(x.numpy(), np.full((2, 3), 7, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_log_softmax(shape):
    x, dy = 10 * normal(*shape), normal(*shape, seed=1)
    y = cpu.log_softmax_forward(on_cpu(x))
    close(y, reference.log_softmax_forward(x), 4, scale=np.abs(x).max(initial=1))
    dx = cpu.log_softmax_backward(on_cpu(dy), y)
    # the sum of F gradients is rounded once, then multiplied
    total = np.abs(dy.sum(axis=1)).max(initial=1)
    close(dx, reference.log_softmax_backward(dy, y.numpy()), 4, scale=total)


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (257, 33)])
def test_losses(shape):
    scores = 5 * normal(*shape)
    labels = np.random.default_rng(0).integers(0, shape[1], shape[0]).astype(np.int32)
    ts, tl = on_cpu(scores), on_cpu(labels)
    scale = np.abs(scores).max()
    close(cpu.nll_loss_forward(ts, tl), reference.nll_loss_forward(scores, labels), 1)
    close(cpu.nll_loss_backward(ts, tl), reference.nll_loss_backward(scores, labels), 1)
    loss, log_probs = cpu.cross_entropy_forward(ts, tl)
    expected, expected_log_probs = reference.cross_entropy_forward(scores, labels)
    close(loss, expected, 4, scale)
    close(log_probs, expected_log_probs, 4, scale)
    close(
        cpu.cross_entropy_backward(log_probs, tl),
        reference.cross_entropy_backward(log_probs.numpy(), labels),
        1,
    )


def test_losses_of_an_empty_batch():
    scores, labels = on_cpu(np.empty((0, 5))), on_cpu(np.empty(0, np.int32))
    assert np.isnan(float(cpu.nll_loss_forward(scores, labels)))
    assert cpu.nll_loss_backward(scores, labels).shape == (0, 5)
    loss, log_probs = cpu.cross_entropy_forward(scores, labels)
    assert np.isnan(float(loss)) and log_probs.shape == (0, 5)
    assert cpu.cross_entropy_backward(log_probs, labels).shape == (0, 5)
    assert cpu.argmax(scores).shape == (0,)


def test_argmax_and_tally():
    scores = np.round(normal(257, 33))
    scores[3, 4] = np.nan
    expected = reference.argmax(scores)
    found = cpu.argmax(on_cpu(scores))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.numpy(), expected)
    labels = np.where(np.arange(257) % 3, expected, (expected + 1) % 33)
    losses = normal(257)
    for terms in (losses, losses[:1].reshape(())):
        hits, loss_sum = on_cpu(np.int32(5)), on_cpu(np.float32(2))
        cpu.tally(on_cpu(terms), on_cpu(scores), on_cpu(labels), loss_sum, hits)
        assert int(hits) == 5 + np.count_nonzero(np.arange(257) % 3)
        assert float(loss_sum) == pytest.approx(2 + terms.mean(dtype=float), rel=1e-6)


# optimizer steps


@pytest.mark.parametrize("n", [0, 1, 33, 70000])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_step(n, momentum):
    param, grad, square, buffer = (normal(n, seed=i) for i in range(4))
    square = np.abs(square) + 0.1
    expected = [a.astype(np.float64) for a in (param, grad, square, buffer)]
    tensors = [on_cpu(a) for a in (param, grad, square, buffer)]
    how = 0.99, 1e-8, 1e-2, momentum
    lr = np.array(0.003, np.float32)
    reference.rmsprop_step(*expected[:3], expected[3] if momentum else None, lr, *how)
    cpu.rmsprop_step(*tensors[:3], tensors[3] if momentum else None, on_cpu(lr), *how)
    for found, wanted in zip(tensors, expected):
        close(found, wanted, 8, scale=np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("n", [0, 1, 33, 70000])
@pytest.mark.parametrize("momentum, nesterov", [(0, False), (0.9, False), (0.9, True)])
def test_sgd_step(n, momentum, nesterov):
    arrays = [normal(n, seed=i) for i in range(3)]
    expected, tensors = [a.astype(np.float64) for a in arrays], [*map(on_cpu, arrays)]
    lr, how = np.array(0.1, np.float32), (momentum, 1e-2, nesterov)
    reference.sgd_step(*expected[:2], expected[2] if momentum else None, lr, *how)
    cpu.sgd_step(*tensors[:2], tensors[2] if momentum else None, on_cpu(lr), *how)
    for found, wanted in zip(tensors, expected):
        close(found, wanted, 8, scale=4)


# data


def test_permutation():
    np.testing.assert_array_equal(
        cpu.permutation(1000, 2**40, 3, "cpu").numpy(),
        reference.permutation(1000, 2**40, 3, "cpu"),
    )


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("n", [0, 1, 257])
def test_gather_images(dtype, n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (33, 1, 28, 28)).astype(dtype)
    index = rng.integers(0, 33, n).astype(np.int32)
    found = cpu.gather_images(on_cpu(images), on_cpu(index), 1 / 255, -0.5)
    close(found, reference.gather_images(images, index, 1 / 255, -0.5), 1)


def test_gather_labels():
    labels, index = np.arange(10, 20), np.array([3, 3, 9])
    found = cpu.gather_labels(on_cpu(labels), on_cpu(index))
    np.testing.assert_array_equal(found.numpy(), [13, 13, 19])


# what is refused


@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.parametrize(
    "name",
    [
        "nll_loss_forward",
        "nll_loss_backward",
        "cross_entropy_forward",
        "cross_entropy_backward",
    ],
)
def test_labels_out_of_range(name, bad):
    labels = on_cpu(np.array([0, bad, 9]))
    with pytest.raises(DataError, match=f"label {bad} at index 1 .* 0 to 4"):
        getattr(cpu, name)(on_cpu(normal(3, 5)), labels)


def test_gather_out_of_range():
    with pytest.raises(DataError, match=r"index\[0\] is 4: .* 0 to 3"):
        cpu.gather_images(
            on_cpu(np.zeros((4, 1), np.uint8)), on_cpu(np.array([4])), 1.0, 0.0
        )


def test_arguments_are_tensors_of_the_right_dtype():
    with pytest.raises(TypeError, match="x is a ndarray: expected a Tensor"):
        cpu.relu_forward(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="x is int32: expected float32"):
        cpu.relu_forward(on_cpu(np.zeros(3, np.int32)))
    with pytest.raises(TypeError, match="labels is float32: expected int32"):
        cpu.nll_loss_forward(on_cpu(normal(2, 3)), on_cpu(normal(2)))


def test_shapes_are_checked_before_anything_is_written():
    x, w, dw = on_cpu(normal(2, 5)), on_cpu(normal(3, 5)), on_cpu(normal(3, 5))
    before = dw.numpy()
    with pytest.raises(ShapeError, match="dy has shape"):
        cpu.linear_backward(on_cpu(normal(2, 4)), x, w, dw, None)
    np.testing.assert_array_equal(dw.numpy(), before)


# the same bits, whoever computes

STEP = """
import hashlib, sys
import numpy as np
from cycnn.ops import cpu
from cycnn.tensor import Tensor

rng = np.random.default_rng(0)
digest = hashlib.sha256()
def tensor(*shape):
    return Tensor(rng.standard_normal(shape), "cpu")
def note(*results):
    for result in results:
        digest.update(result.array.tobytes())
FIRST = (33, 1, 28, 28), (32, 1, 5, 5)
SECOND = (9, 32, 12, 12), (64, 32, 5, 5)
for x_shape, w_shape in FIRST, SECOND:
    x, w, b = tensor(*x_shape), tensor(*w_shape), tensor(w_shape[0])
    y = cpu.conv2d_forward(x, w, b)
    dw, db = tensor(*w_shape), tensor(w_shape[0])
    note(y, cpu.conv2d_backward(y, x, w, dw, db), dw, db)
    note(cpu.relu_forward(y), cpu.sigmoid_forward(y))
    note(*cpu.maxpool2d_forward(y, (2, 2), (2, 2)))
x, w, b = tensor(300, 512), tensor(128, 512), tensor(128)
y = cpu.linear_forward(x, w, b)
note(y, cpu.linear_backward(y, x, w, w, b), w, b, cpu.log_softmax_forward(y))
print(digest.hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads(run_python):
    digests = {run_python(STEP, OMP_NUM_THREADS=str(n)) for n in (1, 2, 3)}
    assert len(digests) == 1


@pytest.mark.parametrize("given", [None, "7"])
def test_the_environment_stays_as_it_is(given, run_python):
    # how long idle threads spin is told to OpenMP through it, while it is loaded
    code = "import os, cycnn.ops.cpu; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run_python(code, GOMP_SPINCOUNT=given).strip() == str(given)


def test_two_python_threads_at_once():
    x, w = on_cpu(normal(9, 32, 12, 12)), on_cpu(normal(64, 32, 5, 5, seed=1))
    expected = cpu.conv2d_forward(x, w, None).numpy()
    found = []

    def work():
        for _ in range(5):
            found.append(cpu.conv2d_forward(x, w, None).numpy())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    for result in found:
        np.testing.assert_array_equal(result, expected)


# memory


def test_large_arrays_use_memory_again_and_never_share_it():
    first = _cpu.empty((300, 257), np.dtype("float32"))
    address = first.ctypes.data
    assert address % 64 == 0
    other = _cpu.empty((300, 257), np.dtype("int32"))
    assert not np.may_share_memory(first, other)
    view = first[1:]
    del first
    assert _cpu.empty((300, 257), np.dtype("float32")).ctypes.data != address
    del view
    assert _cpu.empty((300, 257), np.dtype("float32")).ctypes.data == address


def test_kept_memory_is_bounded():
    arrays = [_cpu.empty((1 << 22, i), np.dtype("uint8")) for i in range(1, 12)]
    arrays += [_cpu.empty((1 << 17, i), np.dtype("uint8")) for i in range(1, 100)]
    arrays.append(_cpu.empty((1 << 28, 2), np.dtype("uint8")))
    del arrays
    blocks, size = _cpu.kept_memory()
    assert 0 < blocks <= 64
    assert 0 < size <= 1 << 28


def test_results_are_ordinary_tensors():
    y = cpu.relu_forward(on_cpu(normal(300, 300)))
    assert from_array(y.array).array is y.array
    y.array[...] = 1
    assert (y[3:5].numpy() == 1).all()
