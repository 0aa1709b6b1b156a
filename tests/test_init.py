"""Initialisers: bounds, spread, fans, and the same draw for the same seed."""

import math

import numpy as np
import pytest

import cycnn
from cycnn import devices, nn
from cycnn.nn import init


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


CONV, LINEAR = (64, 32, 5, 5), (300, 200)
UNIFORM = {  # function, shape, bound
    "uniform": (lambda s: init.uniform(s, -0.3, 0.3), CONV, 0.3),
    "xavier conv": (init.xavier_uniform, CONV, math.sqrt(6 / (800 + 1600))),
    "xavier linear": (init.xavier_uniform, LINEAR, math.sqrt(6 / 500)),
    "xavier gain": (
        lambda s: init.xavier_uniform(s, 2),
        LINEAR,
        2 * math.sqrt(6 / 500),
    ),
    "xavier fans": (
        lambda s: init.xavier_uniform(s, fan_in=9, fan_out=15),
        (5000,),
        0.5,
    ),
    "he conv": (init.he_uniform, CONV, math.sqrt(6 / 800)),
    "he torch": (lambda s: init.he_uniform(s, math.sqrt(5)), CONV, math.sqrt(1 / 800)),
    "he fan": (lambda s: init.he_uniform(s, fan_in=24), (5000,), 0.5),
}
NORMAL = {
    "xavier": (init.xavier_normal, CONV, math.sqrt(2 / 2400)),
    "xavier gain": (lambda s: init.xavier_normal(s, 3), LINEAR, 3 * math.sqrt(2 / 500)),
    "he": (init.he_normal, LINEAR, math.sqrt(2 / 200)),
    "he leaky": (lambda s: init.he_normal(s, 2), LINEAR, math.sqrt(2 / 1000)),
}


@pytest.mark.parametrize("case", UNIFORM)
def test_uniform_draws_fill_their_interval(case):
    function, shape, bound = UNIFORM[case]
    cycnn.manual_seed(1)
    drawn = function(shape)
    assert drawn.shape == shape and drawn.dtype == np.float32
    assert np.abs(drawn).max() <= bound * (1 + 1e-6)
    assert drawn.max() > 0.99 * bound and drawn.min() < -0.99 * bound
    assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(drawn.mean()) < 5 * bound / math.sqrt(3 * drawn.size)


@pytest.mark.parametrize("case", NORMAL)
def test_normal_draws_have_their_spread(case):
    function, shape, deviation = NORMAL[case]
    cycnn.manual_seed(1)
    drawn = function(shape)
    assert drawn.shape == shape and drawn.dtype == np.float32
    assert drawn.std() == pytest.approx(deviation, rel=0.03)
    assert abs(drawn.mean()) < 5 * deviation / math.sqrt(drawn.size)
    # a normal's, not a uniform's: about 4.6% lie beyond two deviations
    assert 0.04 < (np.abs(drawn) > 2 * deviation).mean() < 0.05


def test_constant():
    made = init.constant((2, 3), 0.25)
    assert made.dtype == np.float32 and made.tolist() == [[0.25] * 3] * 2


def test_fans():
    assert init.fans(LINEAR) == (200, 300)
    assert init.fans(CONV) == (800, 1600)
    assert init.fans((8, 1, 3, 3)) == (9, 72)
    for function in (init.xavier_uniform, init.he_normal):
        with pytest.raises(ValueError, match="no fan-in"):
            function((10,))


def test_the_seed_decides():
    def draw(seed):
        cycnn.manual_seed(seed)
        return nn.reference_network().state_dict()

    first, again, other = draw(7), draw(7), draw(8)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert (array != other[name]).all()
    # successive draws differ, too
    assert (first["11.bias"] != first["9.bias"][:10]).all()


@pytest.mark.parametrize(
    "make, fan_in",
    [
        (lambda: nn.Conv2d(8, 64, 5, groups=2), 100),
        (lambda: nn.Linear(200, 300), 200),
    ],
)
def test_layers_start_as_in_torch(make, fan_in):
    cycnn.manual_seed(2)
    bound = 1 / math.sqrt(fan_in)
    for parameter in make().parameters():
        values = parameter.data.numpy()
        assert 0.9 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_reference_network_with_image_xavier():
    cycnn.manual_seed(3)
    state = nn.reference_network(init="image_xavier").state_dict()
    bounds = {
        "0": math.sqrt(6 / (1 * 28 * 28 + 32 * 24 * 24)),
        "3": math.sqrt(6 / (32 * 12 * 12 + 64 * 8 * 8)),
        "6": math.sqrt(6 / (64 * 4 * 4 + 128 * 2 * 2)),
        "9": math.sqrt(6 / (512 + 128)),
        "11": math.sqrt(6 / (128 + 10)),
    }
    assert bounds["0"] == pytest.approx(0.0177, abs=1e-4)
    for name, values in state.items():
        bound = bounds[name.split(".")[0]]
        assert 0.7 * bound < np.abs(values).max() <= bound * (1 + 1e-6), name
    with pytest.raises(ValueError, match="init must be"):
        nn.reference_network(init="xavier")
