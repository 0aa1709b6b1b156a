"""LayerNorm on the CPU."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_reference import slope

from cycnn import Tensor, devices, nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

F32 = 2.0**-24
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("affine", [True, False])
def test_the_specification_has_the_slope_of_its_function(affine):
    x, dy = normal(2, 4, 5)
    weight, bias = normal(2, 5, seed=1) if affine else (None, None)
    forward = lambda: reference.layer_norm_forward(x, weight, bias, EPS)
    dweight, dbias = (np.empty(5), np.empty(5)) if affine else (None, None)
    dx = reference.layer_norm_backward(
        dy, x, weight, *forward()[1:], dweight, dbias, EPS
    )
    pairs = [(dx, x)]
    if affine:
        pairs += [(dweight, weight), (dbias, bias)]
    for found, array in pairs:
        expected = slope(lambda: forward()[0], array, dy)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.integers(2, 300),
    st.sampled_from([0.0, 10.0, -300.0]),
    st.booleans(),
)
def test_the_cpu_computes_what_is_specified(n, f, offset, affine):
    x, dy = (offset + normal(n, f)).astype("f"), normal(n, f, seed=1).astype("f")
    weight, bias = normal(2, f, seed=2).astype("f") if affine else (None, None)
    w, b = (None, None) if weight is None else (Tensor(weight), Tensor(bias))
    got = cpu.layer_norm_forward(Tensor(x), w, b, EPS)
    want = reference.layer_norm_forward(x, weight, bias, EPS)
    # few numbers may lie near each other, and 1 / sqrt(variance) is large then
    r = 1 / np.sqrt(want[2] + EPS).min(initial=1)
    off = 32 * F32 * (1 + abs(offset) * r)
    for found, expected in zip(got, want):
        np.testing.assert_allclose(
            found.numpy(), expected, rtol=1e-5, atol=off * (3 + abs(offset) / 50)
        )
    statistics = [tensor.numpy() for tensor in got[1:]]
    for accumulate in False, True:
        dw, db = np.full(f, 3.0), np.full(f, 3.0)
        targets = Tensor(dw), Tensor(db)
        expected = reference.layer_norm_backward(
            dy, x, weight, *statistics, dw, db, EPS, True, accumulate
        )
        dx = cpu.layer_norm_backward(
            Tensor(dy), Tensor(x), w, *got[1:], *targets, EPS, True, accumulate
        )
        np.testing.assert_allclose(dx.numpy(), expected, rtol=1e-4, atol=8 * off * r)
        for target, value in zip(targets, (dw, db)):
            np.testing.assert_allclose(
                target.numpy(), value, rtol=1e-5, atol=off * (n + 4)
            )


SHAPES = {
    "row": ((7, 33), 33),
    "image": ((5, 3, 4, 6), (3, 4, 6)),
    "pixels": ((2, 3, 4, 6), (4, 6)),
    "last": ((2, 3, 31), 31),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"elementwise_affine": False, "eps": 1e-3}],
    ids=str,
)
def test_ten_steps_against_pytorch(case, options):
    torch = pytest.importorskip("torch")
    shape, sizes = SHAPES[case]
    layer, other = nn.LayerNorm(sizes, **options), torch.nn.LayerNorm(sizes, **options)
    learns = bool(layer.parameters())
    if learns:
        optimizer = optim.SGD(layer.parameters(), lr=0.1)
        torch_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(10):
        x, dy = (1 + 2 * normal(2, *shape, seed=step)).astype("f")
        tensor = torch.tensor(x, requires_grad=True)
        expected = other(tensor)
        np.testing.assert_allclose(
            layer(x).numpy(), expected.detach().numpy(), rtol=1e-4, atol=1e-5
        )
        other.zero_grad()
        expected.backward(torch.tensor(dy))
        np.testing.assert_allclose(
            layer.backward(dy).numpy(), tensor.grad.numpy(), rtol=1e-4, atol=1e-5
        )
        if learns:
            optimizer.step(), torch_optimizer.step()
    state = other.state_dict()
    assert list(state) == list(layer.state_dict())
    for name, array in layer.state_dict().items():
        np.testing.assert_allclose(array, state[name].numpy(), rtol=1e-4, atol=1e-4)


def test_gradients_are_added_and_left_out_when_asked():
    layer = nn.LayerNorm((3, 4))
    x, dy = normal(2, 5, 3, 4).astype("f")
    layer(x)
    dx = layer.backward(dy).numpy()
    once = [p.grad.numpy().copy() for p in layer.parameters()]
    layer(x)
    np.testing.assert_array_equal(layer.backward(dy, accumulate=True).numpy(), dx)
    for parameter, gradient in zip(layer.parameters(), once):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * gradient, rtol=1e-6)
    layer(x)
    assert layer.backward(dy, input_grad=False) is None
    for parameter, gradient in zip(layer.parameters(), once):
        np.testing.assert_array_equal(parameter.grad.numpy(), gradient)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(dy)
    empty = layer(x[:0])
    assert empty.shape == (0, 3, 4) and layer.backward(empty).shape == (0, 3, 4)
    assert all((p.grad.numpy() == 0).all() for p in layer.parameters())


def test_arguments_and_names():
    assert repr(nn.LayerNorm(8)) == "LayerNorm(8, 16 parameters)"
    assert repr(nn.LayerNorm((2, 3), bias=False)) == (
        "LayerNorm((2, 3), bias=False, 6 parameters)"
    )
    assert repr(nn.LayerNorm([4], 1e-3, False)) == (
        "LayerNorm(4, eps=0.001, elementwise_affine=False)"
    )
    with pytest.raises(ValueError, match="normalized_shape must be at least 1, got 0"):
        nn.LayerNorm((3, 0))
    with pytest.raises(TypeError, match="normalized_shape must be an integer"):
        nn.LayerNorm(2.5)
    with pytest.raises(ShapeError, match="normalized_shape is empty"):
        nn.LayerNorm(())
    for shape in ((3, 4), (2, 3, 5), (4,)):
        with pytest.raises(ShapeError, match=r"expected \(N, \.\.\., 3, 4\)"):
            nn.LayerNorm((3, 4))(np.zeros(shape, "f"))
