"""The CPU operations where numbers are tiny, huge or none, and within derived bounds.

A sum of L products in float32 is off by at most about L units of roundoff of the sum of
the absolute products, whatever the order; that sum is the reference itself on absolute
values. Below the smallest normal number a product is off by half of the smallest
denormal one instead.
"""

import numpy as np
import pytest
from bounds import F32, assert_close
from test_ops_cpu import instructions  # noqa: F401

import cycnn
from cycnn import Tensor, nn
from cycnn.ops import cpu, reference

DENORMAL = 2.0**-149  # the smallest


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def on_cpu(array):
    return Tensor(array, "cpu")


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def results(ops, place, name, arrays, how, accumulate):
    """y, dx, dweight and dbias."""
    x, weight, bias, dy, dweight, dbias = map(place, arrays)
    y = getattr(ops, f"{name}_forward")(x, weight, bias, *how)
    backward = getattr(ops, f"{name}_backward")
    dx = backward(dy, x, weight, dweight, dbias, *how, True, accumulate)
    return y, dx, dweight, dbias


def check_products(name, arrays, how, accumulate=False):
    """Both ways within bounds, and infinite or NaN where the reference is."""
    x, weight, _, dy, _, _ = arrays
    with np.errstate(invalid="ignore"):
        found = results(cpu, on_cpu, name, arrays, how, accumulate)
        given = [array.astype(np.float64) for array in arrays]
        wanted = results(reference, np.array, name, given, how, accumulate)
        sums = results(reference, np.abs, name, given, how, accumulate)
    # no sum has more terms than an element of the weight, an output or an input meets
    of_weight, of_x = dy.size // max(dy.shape[1], 1), x.size // max(x.shape[1], 1)
    lengths = weight.size, weight.size, max(of_weight, of_x), of_weight
    for mine, want, total, length in zip(found, wanted, sums, lengths):
        bound = 1.01 * (length + 2) * (F32 * total + DENORMAL)
        assert_close(mine, want, bound)


def draws(rng, name, x_shape, w_shape, how):
    """x, weight, bias, dy, and what lies in the gradients before."""
    x, weight = normal(rng, *x_shape), normal(rng, *w_shape)
    outputs = w_shape[0]
    if name == "conv_transpose2d":
        outputs = w_shape[1] * how[-1]
    bias = normal(rng, outputs)
    y = getattr(reference, f"{name}_forward")(x, weight, bias, *how)
    dy = normal(rng, *y.shape)
    return [x, weight, bias, dy, normal(rng, *w_shape), normal(rng, outputs)]


PRODUCTS = {
    # operation, x, weight, how
    "conv2d": ("conv2d", (3, 5, 9, 8), (7, 5, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "conv2d, no padding":
        ("conv2d", (5, 9, 6, 7), (17, 9, 3, 2), ((1, 2), (0, 0), (1, 1), 1)),
    "groups": ("conv2d", (2, 6, 7, 8), (9, 2, 3, 3), ((2, 1), (1, 0), (1, 2), 3)),
    "depth-wise 3": ("conv2d", (2, 6, 9, 9), (6, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 6)),
    "depth-wise 5": ("conv2d", (2, 3, 9, 8), (6, 1, 5, 5), ((1, 1), (2, 2), (1, 1), 3)),
    "depth-wise, strided":
        ("conv2d", (2, 3, 9, 9), (3, 1, 3, 2), ((2, 2), (1, 0), (1, 2), 3)),
    "transposed": ("conv_transpose2d", (3, 5, 4, 6), (5, 7, 3, 3),
                   ((2, 2), (1, 1), (1, 0), (1, 1), 1)),
    "transposed, groups": ("conv_transpose2d", (2, 6, 5, 4), (6, 3, 2, 3),
                           ((1, 2), (0, 1), (0, 1), (2, 1), 2)),
    "transposed, depth-wise": ("conv_transpose2d", (2, 4, 5, 4), (4, 1, 3, 3),
                               ((2, 1), (1, 1), (1, 0), (1, 1), 4)),
    "linear": ("linear", (33, 37), (19, 37), ()),
    "linear, one": ("linear", (1, 300), (10, 300), ()),
}  # fmt: skip


# numbers below the smallest normal one, about 1.2e-38


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("scales", [(1e-40, 1), (1, 1e-40), (1e-20, 1e-20)])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_of_denormals(case, scales, rng):
    name, *shapes, how = PRODUCTS[case]
    arrays = draws(rng, name, *shapes, how)
    of_x, of_weight = scales
    # dy is scaled as x is: then dx is as small as y
    for array, scale in zip(arrays, (of_x, of_weight, 1e-40, of_x, 1e-40, 1e-40)):
        array *= np.float32(scale)
    check_products(name, arrays, how)
    check_products(name, arrays, how, accumulate=True)
    y = results(cpu, on_cpu, name, arrays, how, False)[0].numpy()
    assert (np.abs(y[y != 0]) < 1e-37).all() and np.count_nonzero(y) > y.size / 2


def close_to(found, wanted, ulps=4):
    """Some roundings off, of denormals some of the smallest."""
    assert_close(found, wanted, ulps * (2 * F32 * np.abs(wanted) + DENORMAL))


def tiny(rng, *shape):
    return (1e-40 * normal(rng, *shape)).astype(np.float32)


def test_elements_and_pooling_of_denormals(rng):
    x, dy = tiny(rng, 3, 4, 8, 8), tiny(rng, 3, 4, 8, 8)
    tx, tdy, out = on_cpu(x), on_cpu(dy), on_cpu(x)
    cpu.add(tx, tdy, out)
    np.testing.assert_array_equal(out.numpy(), x + dy)
    np.testing.assert_array_equal(out.numpy(), x.astype(float) + dy)
    y = cpu.relu_forward(tx)
    np.testing.assert_array_equal(y.numpy(), reference.relu_forward(x))
    assert np.count_nonzero(y.numpy()) > 300
    found = cpu.relu_backward(tdy, y)
    np.testing.assert_array_equal(found.numpy(), reference.relu_backward(dy, x))
    for name in ("sigmoid", "tanh", "silu"):
        seen = on_cpu(x)
        y = getattr(cpu, f"{name}_forward")(tx)
        close_to(y, getattr(reference, f"{name}_forward")(x))
        seen, given = (tx, x) if name == "silu" else (y, y.numpy())
        found = getattr(cpu, f"{name}_backward")(tdy, seen)
        close_to(found, getattr(reference, f"{name}_backward")(dy, given))
    for slope in 0.5, -3.0:
        found = cpu.leaky_relu_forward(tx, slope)
        close_to(found, reference.leaky_relu_forward(x, slope))
    for kind in ("none", "tanh"):
        close_to(cpu.gelu_forward(tx, kind), reference.gelu_forward(x, kind))
        found = cpu.gelu_backward(tdy, tx, kind)
        close_to(found, reference.gelu_backward(dy, x, kind))

    for how in (((2, 2), (2, 2)), ((3, 3), (2, 1), (1, 1))):
        y, positions = cpu.maxpool2d_forward(tx, *how)
        wanted, at = reference.maxpool2d_forward(x, *how)
        np.testing.assert_array_equal(y.numpy(), wanted)
        np.testing.assert_array_equal(positions.numpy(), at)
        given = tiny(rng, *y.shape)
        found = cpu.maxpool2d_backward(on_cpu(given), positions, x.shape, *how)
        close_to(found, reference.maxpool2d_backward(given, at, x.shape, *how))
        found = cpu.avgpool2d_forward(tx, *how)
        close_to(found, reference.avgpool2d_forward(x, *how), 16)
        found = cpu.avgpool2d_backward(on_cpu(given), x.shape, *how)
        close_to(found, reference.avgpool2d_backward(given, x.shape, *how), 16)
    found = cpu.global_avgpool2d_forward(tx)
    close_to(found, reference.global_avgpool2d_forward(x), 99)


def test_scores_that_leave_denormal_probabilities(rng):
    # exp(-92) is 1.1e-40; the other classes have none or nearly all of the sum
    x = np.array([[0, -92, -100, -103, -110, -92], [5, 0, 5, -87.5, -88, -98]], "f")
    wanted = reference.softmax_forward(x)
    found = cpu.softmax_forward(on_cpu(x))
    close_to(found, wanted)
    assert 1.0e-40 < found.numpy()[0, 1] < 1.2e-40
    dy = normal(rng, *x.shape)
    # of equal gradients hardly anything is left
    close_to(
        cpu.softmax_backward(on_cpu(dy), found),
        reference.softmax_backward(dy, found.numpy()),
        16,
    )
    labels = np.array([0, 2], "i")
    value, log_probs = cpu.cross_entropy_forward(on_cpu(x), on_cpu(labels))
    close_to(log_probs, reference.log_softmax_forward(x))
    found = cpu.cross_entropy_backward(log_probs, on_cpu(labels)).numpy()
    wanted = reference.cross_entropy_backward(log_probs.numpy(), labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2 * DENORMAL)
    assert 5e-41 < found[0, 1] < 6e-41


def test_losses_of_denormals(rng):
    for name, how, scale in (
        ("mse_loss", (), 1e-20), ("mse_loss", (), 1e-40),
        ("smooth_l1_loss", (1.0,), 1e-20), ("smooth_l1_loss", (0.0,), 1e-40),
    ):  # fmt: skip
        x, target = ((scale * normal(rng, 3, 5)).astype("f") for _ in range(2))
        for mean in False, True:
            given = on_cpu(x), on_cpu(target), *how, mean
            wanted = getattr(reference, f"{name}_forward")(x, target, *how, mean)
            close_to(getattr(cpu, f"{name}_forward")(*given), wanted, 32)
            wanted = getattr(reference, f"{name}_backward")(x, target, *how, mean)
            close_to(getattr(cpu, f"{name}_backward")(*given), wanted)
    # a sure and right answer costs exp(-92)
    x, target = np.array([92, -92, 0.5], "f"), np.array([1, 0, 1], "f")
    for each in range(3):
        given = x[each : each + 1], target[each : each + 1], None, True
        found = [*map(on_cpu, given[:2]), *given[2:]]
        wanted = reference.bce_with_logits_forward(*given)
        close_to(cpu.bce_with_logits_forward(*found), wanted, 8)
        wanted = reference.bce_with_logits_backward(*given)
        close_to(cpu.bce_with_logits_backward(*found), wanted, 8)
    log_probs, labels = -np.abs(tiny(rng, 4, 3)), np.array([0, 2, 1, 1], "i")
    found = cpu.nll_loss_forward(on_cpu(log_probs), on_cpu(labels))
    close_to(found, reference.nll_loss_forward(log_probs, labels))
    assert 0 < float(found) < 1e-38


# infinity and NaN


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("which", ["x", "weight", "bias", "dy", "all"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_infinity_and_nan_go_where_the_reference_has_them(case, which, rng):
    name, *shapes, how = PRODUCTS[case]
    for value in np.inf, -np.inf, np.nan:
        arrays = draws(rng, name, *shapes, how)
        for part, array in zip(("x", "weight", "bias", "dy"), arrays):
            if which in (part, "all"):
                array.flat[rng.integers(array.size)] = value
        if which == "all":
            # two of both signs may meet
            arrays[0].flat[rng.integers(arrays[0].size)] = -value
        check_products(name, arrays, how)
        check_products(name, arrays, how, accumulate=True)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_layers_pass_infinity_and_nan_on(value, rng):
    x = normal(rng, 4, 3, 8, 8)
    x[2, 1, 4, 4] = value
    for layer in (
        nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 3, groups=3),
        nn.ConvTranspose2d(3, 2, 3, stride=2), nn.Linear(8, 5),
    ):  # fmt: skip
        layer.to("cpu")
        given = x.reshape(-1, 8) if isinstance(layer, nn.Linear) else x
        y = layer(given).numpy()
        touched = ~np.isfinite(y)
        assert touched.any() and not touched.all()
        layer.backward(np.ones_like(y))
        assert not np.isfinite(layer.weight.grad.numpy()).all()
        assert np.isfinite(layer.bias.grad.numpy()).all()


# large logits


def large_logits():
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [1e4, 9999, 9990], [-1e4] * 3]
    return np.array([*rows, [-1e4, 1e4, -1e4]], "f"), np.array([1, 0, 2, 1, 1], "i")


def test_large_logits_have_finite_and_right_losses_and_gradients():
    x, labels = large_logits()
    tx, tlabels = on_cpu(x), on_cpu(labels)
    log_probs = cpu.log_softmax_forward(tx)
    wanted = reference.log_softmax_forward(x)
    assert np.isfinite(log_probs.numpy()).all()
    close_to(log_probs, wanted)
    np.testing.assert_allclose(
        log_probs.numpy()[1], [-20000 - np.log(2), -np.log(2), -np.log(2)], rtol=1e-7
    )
    dy = np.linspace(-1, 1, x.size, dtype="f").reshape(x.shape)
    found = cpu.log_softmax_backward(on_cpu(dy), log_probs)
    np.testing.assert_allclose(
        found.numpy(), reference.log_softmax_backward(dy, wanted), atol=1e-6
    )

    # (20000 + 20000.693 + 10.313 + 1.0986 + 0) / 5
    for value in (
        cpu.nll_loss_forward(log_probs, tlabels),
        cpu.cross_entropy_forward(tx, tlabels)[0],
        nn.NLLLoss()(nn.LogSoftmax()(tx), tlabels),
        nn.CrossEntropyLoss()(tx, tlabels),
    ):
        close_to(value, reference.cross_entropy_forward(x, labels)[0])
        assert float(value) == pytest.approx(8002.4210, rel=1e-6)

    softmax = reference.softmax_forward(x)
    wanted = (softmax - np.eye(3)[labels]) / 5
    loss, layer = nn.NLLLoss(), nn.LogSoftmax()
    loss(layer(tx), tlabels)
    entropy = nn.CrossEntropyLoss()
    entropy(tx, tlabels)
    for gradient in (
        cpu.cross_entropy_backward(log_probs, tlabels),
        layer.backward(loss.backward()),
        entropy.backward(),
    ):
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-5, atol=1e-8)
    assert not wanted[4].any(), "sure and right"
    close_to(cpu.softmax_forward(tx), softmax, 16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0]])
def test_large_logits_with_weights_and_smoothing(weight, smoothing):
    x, labels = large_logits()
    loss = nn.CrossEntropyLoss(weight, reduction="sum", label_smoothing=smoothing)
    found = loss(on_cpu(x), on_cpu(labels))
    given = labels, weight and np.array(weight), smoothing, None
    value, total, log_probs = reference.weighted_cross_entropy_forward(x, *given, False)
    close_to(found, value, 16)
    wanted = reference.weighted_cross_entropy_backward(log_probs, *given, total)
    np.testing.assert_allclose(loss.backward().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_large_logits_of_yes_or_no():
    x = np.array([1e4, -1e4, 1e4, -1e4, 0], "f")
    target = np.array([1, 0, 0, 1, 0.5], "f")
    loss = nn.BCEWithLogitsLoss()
    value = loss(on_cpu(x), on_cpu(target))
    assert float(value) == pytest.approx((2e4 + np.log(2)) / 5, rel=1e-6)
    np.testing.assert_allclose(loss.backward().numpy(), [0, 0, 0.2, -0.2, 0], rtol=1e-6)


def test_a_network_of_large_numbers_learns(rng):
    # as after a learning rate that was too large: the loss is high, and finite
    cycnn.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax()).to("cpu")
    model[0].weight.data.copy_(4000 * normal(rng, 3, 4))
    loss, x = nn.NLLLoss(), normal(rng, 50, 4)
    value = loss(model(x), rng.integers(0, 3, 50))
    assert 1e3 < float(value) < 1e5
    model.backward(loss.backward())
    assert np.isfinite(model[0].weight.grad.numpy()).all()
