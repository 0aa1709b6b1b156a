"""Transposed and depth-wise convolution: operations, layer, PyTorch beside them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cycnn.tensor import Tensor
from test_ops_reference import normal, slope
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

TRANSPOSED = {
    # name: x, weight, stride, padding, output_padding, dilation, groups
    "plain": ((2, 3, 4, 5), (3, 4, 3, 2), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "twice as large": ((2, 3, 4, 4), (3, 2, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "one more": ((1, 2, 3, 4), (2, 2, 3, 3), (2, 3), (1, 0), (1, 2), (1, 1), 1),
    "pointwise": ((2, 3, 4, 3), (3, 4, 1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "dilated groups": ((2, 4, 4, 3), (4, 3, 2, 3), (2, 1), (1, 2), (1, 0), (2, 2), 2),
    "pointwise groups": ((2, 4, 3, 3), (4, 3, 1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 2),
    "one pixel": ((3, 5, 1, 1), (5, 2, 4, 3), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "depth-wise": ((2, 6, 5, 4), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 3),
    "empty batch": ((0, 2, 3, 3), (2, 3, 3, 3), (1, 1), (0, 0), (0, 0), (1, 1), 1),
}
DEPTHWISE = {
    # name: x, filters a channel, filter, stride, padding, dilation
    "3x3": ((2, 3, 9, 8), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of stride 2": ((3, 2, 10, 7), 2, (3, 3), (2, 2), (0, 1), (1, 1)),
    "5x5": ((1, 3, 31, 33), 1, (5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5 of stride 2": ((2, 4, 13, 11), 3, (5, 5), (2, 2), (2, 2), (1, 1)),
    "much padding": ((1, 2, 6, 6), 2, (3, 3), (1, 1), (4, 3), (1, 1)),
    "uneven": ((1, 4, 7, 9), 3, (3, 2), (2, 1), (0, 1), (1, 2)),
    "one by one": ((33, 5, 3, 3), 2, (1, 1), (1, 1), (0, 0), (1, 1)),
    "whole image": ((2, 7, 3, 3), 1, (3, 3), (1, 1), (0, 0), (1, 1)),
    "large": ((4, 16, 32, 32), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "empty batch": ((0, 3, 5, 5), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def floats(*shape, seed=0):
    return normal(*shape, seed=seed).astype(np.float32)


def on_cpu(array):
    return None if array is None else Tensor(array, "cpu")


def run(ops, place, forward, backward, arrays, settings, accumulate=False):
    """y, dx, dweight, dbias of a pair of operations; gradients begin with 1."""
    x, weight, bias, dy = arrays
    y = forward(place(x), place(weight), place(bias), *settings)
    dweight, dbias = place(np.ones_like(weight)), place(np.ones_like(bias))
    dx = backward(
        place(dy), place(x), place(weight), dweight, dbias, *settings, True, accumulate
    )
    return y, dx, dweight, dbias


def compare(ops, place, case_arrays, settings, transposed):
    """Operations of a device with the specification."""
    name = "conv_transpose2d" if transposed else "conv2d"
    for accumulate in False, True:
        found, want = (
            run(
                module,
                put,
                getattr(module, f"{name}_forward"),
                getattr(module, f"{name}_backward"),
                case_arrays,
                settings,
                accumulate,
            )
            for module, put in ((ops, place), (reference, np.array))
        )
        for what, mine, theirs in zip(("y", "dx", "dweight", "dbias"), found, want):
            mine = mine.numpy()
            assert mine.shape == theirs.shape
            scale = np.abs(theirs).max(initial=1)
            np.testing.assert_allclose(
                mine, theirs, rtol=0, atol=2e-6 * scale, err_msg=what
            )
    x, weight, _, dy = case_arrays
    dweight = place(np.full_like(weight, np.nan))
    backward = getattr(ops, f"{name}_backward")
    given = place(dy), place(x), place(weight), dweight, None
    assert backward(*given, *settings, need_dx=False) is None
    assert np.isfinite(dweight.numpy()).all()


def transposed_arrays(case):
    x_shape, w_shape, *settings = TRANSPOSED[case]
    bias = floats(w_shape[1] * settings[-1], seed=2)
    x, weight = floats(*x_shape), floats(*w_shape, seed=1)
    y = reference.conv_transpose2d_forward(x, weight, bias, *settings)
    return (x, weight, bias, floats(*y.shape, seed=3)), settings


def depthwise_arrays(case):
    x_shape, each, size, *settings = DEPTHWISE[case]
    c = x_shape[1]
    settings = *settings, c
    weight, bias = floats(c * each, 1, *size, seed=1), floats(c * each, seed=2)
    x = floats(*x_shape)
    y = reference.conv2d_forward(x, weight, bias, *settings)
    return (x, weight, bias, floats(*y.shape, seed=3)), settings


@pytest.mark.parametrize("case", TRANSPOSED)
def test_the_specification_has_the_right_gradients(case):
    x_shape, w_shape, *settings = TRANSPOSED[case]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    b = normal(w_shape[1] * settings[-1], seed=2)
    y = reference.conv_transpose2d_forward(x, w, b, *settings)
    dy = normal(*y.shape, seed=3)
    dw, db = np.empty_like(w), np.empty_like(b)
    dx = reference.conv_transpose2d_backward(dy, x, w, dw, db, *settings)
    for found, array in (dx, x), (dw, w), (db, b):
        want = slope(
            lambda: reference.conv_transpose2d_forward(x, w, b, *settings), array, dy
        )
        np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-7)


def test_each_number_adds_a_scaled_filter():
    x = np.array([[[[2.0, 3.0]]]])
    w = np.array([[[[1.0, 10.0, 100.0]]]])
    y = reference.conv_transpose2d_forward(x, w, np.array([0.5]), (1, 2), (0, 1))
    # 2 20 200+3 30 300, without the first and the last, and half
    np.testing.assert_array_equal(y, [[[[20.5, 203.5, 30.5]]]])


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed(case):
    compare(cpu, on_cpu, *transposed_arrays(case), transposed=True)


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise(case):
    compare(cpu, on_cpu, *depthwise_arrays(case), transposed=False)


def test_refused():
    x, w = on_cpu(floats(1, 3, 4, 4)), on_cpu(floats(2, 3, 3, 3))
    with pytest.raises(ShapeError, match="x has 3 channels.*expects 2"):
        cpu.conv_transpose2d_forward(x, w, None)
    w = on_cpu(floats(3, 2, 3, 3))
    with pytest.raises(ShapeError, match="less than the stride"):
        cpu.conv_transpose2d_forward(x, w, None, output_padding=(1, 0))
    with pytest.raises(ShapeError, match="make the padding"):
        cpu.conv_transpose2d_forward(x, w, None, padding=(3, 3))
    with pytest.raises(ShapeError, match="groups is 2"):
        cpu.conv_transpose2d_forward(x, w, None, groups=2)
    with pytest.raises(ShapeError, match="dy has shape"):
        cpu.conv_transpose2d_backward(x, x, w, w, None)
    with pytest.raises(ShapeError, match="output_padding=.*smaller than"):
        nn.ConvTranspose2d(3, 2, 3, output_padding=1)
    with pytest.raises(ValueError, match="groups=2 does not divide in_channels=3"):
        nn.ConvTranspose2d(3, 2, 3, groups=2)
    layer = nn.ConvTranspose2d(2, 3, 3).to("cpu")
    with pytest.raises(ShapeError, match=r"ConvTranspose2d\(2, 3.*3 channels"):
        layer(x)


def test_text_and_defaults():
    layer = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 1)
    assert repr(layer) == (
        "ConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), "
        "output_padding=(1, 1), groups=2, bias=False, 108 parameters)"
    )
    assert layer.weight.shape == (4, 3, 3, 3)
    bound = 1 / np.sqrt(27)
    weight = layer.weight.data.numpy()
    assert 0.9 * bound < np.abs(weight).max() <= bound


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 49, CLASSES),
        nn.LogSoftmax(),
    )


def trained(device, capture, fuse):
    cycnn.manual_seed(4)
    model = autoencoder().to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture, fuse=fuse)
    history = trainer.fit(patterns(70), epochs=2, batch_size=16, seed=1)
    return trainer, digest(trainer), figures(history)


def test_a_recorded_step_trains_as_an_eager_one(tmp_path):
    trainer, *eager = trained("cpu", False, False)
    assert trained("cpu", True, True)[1:] == tuple(eager)
    trainer.model.save(tmp_path / "m.safetensors")
    other = autoencoder().to("cpu")
    other.load(tmp_path / "m.safetensors")
    x = floats(2, 1, 6, 6)
    want = trainer.model(x).numpy()
    np.testing.assert_array_equal(other(x).numpy(), want)
    np.testing.assert_array_equal(other.predict(x), want)


THREADS = """
import hashlib
import numpy as np
from test_conv_transpose import DEPTHWISE, cpu, depthwise_arrays, on_cpu, run
arrays, settings = depthwise_arrays("large")
made = run(cpu, on_cpu, cpu.conv2d_forward, cpu.conv2d_backward, arrays, settings)
print(hashlib.sha256(b"".join(m.numpy().tobytes() for m in made)).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(Path(cycnn.__file__).parent.parent), str(here)])
    found = set()
    for threads in "1", "2", "3":
        done = subprocess.run(
            [sys.executable, "-c", THREADS],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
            # not in the checkout, whose sources would come first
            cwd=here,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


# beside PyTorch


@pytest.mark.parametrize("seed", range(8))
def test_transposed_beside_torch(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 4))
    c, k = (groups * int(rng.integers(1, 4)) for _ in range(2))
    kernel, stride, dilation = (
        tuple(map(int, rng.integers(1, high, 2))) for high in (5, 4, 3)
    )
    padding = tuple(int(rng.integers(0, (n + 1) // 2 + 1)) for n in kernel)
    more = tuple(int(rng.integers(0, n)) for n in stride)
    bias = bool(rng.integers(2))
    settings = (c, k, kernel, stride, padding, more, groups, bias, dilation)
    theirs = torch.nn.ConvTranspose2d(*settings)
    ours = nn.ConvTranspose2d(*settings).to("cpu")
    ours.load_state_dict({n: p.detach().numpy() for n, p in theirs.named_parameters()})
    x = floats(2, c, 5, 6, seed=seed)
    x_theirs = torch.from_numpy(x).requires_grad_()
    y_theirs = theirs(x_theirs)
    y = ours(x)
    np.testing.assert_allclose(y.numpy(), y_theirs.detach().numpy(), atol=1e-5)
    dy = floats(*y.shape, seed=1)
    y_theirs.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(
        ours.backward(dy).numpy(), x_theirs.grad.numpy(), atol=1e-5
    )
    for (_, mine), parameter in zip(ours.named_parameters(), theirs.parameters()):
        np.testing.assert_allclose(
            mine.grad.numpy(), parameter.grad.numpy(), rtol=1e-5, atol=1e-4
        )
