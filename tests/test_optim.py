"""Optimizers against their formulas in float64; runs of memory; saved state."""

import copy
import pickle

import numpy as np
import pytest

from cycnn import devices, nn, optim
from cycnn.errors import ShapeError

STEPS = 12


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def make_parameters():
    """Five parameters in two slabs: a model of four, of which one is left out."""
    rng = np.random.default_rng(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 70))
    alone = nn.Linear(3, 2, bias=False)
    for parameter in model.parameters() + alone.parameters():
        parameter.data.copy_(rng.standard_normal(parameter.shape))
    first, _, third, fourth = model.parameters()
    return [first, third, fourth, alone.weight]


def gradients(parameters, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(p.shape) for p in parameters]


def rmsprop(parameters, all_gradients, lr, alpha=0.99, eps=1e-8, weight_decay=0,
            momentum=0, initial_accumulator=0):  # fmt: skip
    parameters = [p.copy() for p in parameters]
    squares = [np.full(p.shape, float(initial_accumulator)) for p in parameters]
    kept = [np.zeros(p.shape) for p in parameters]
    for step_gradients in all_gradients:
        for i, g in enumerate(step_gradients):
            g = g + weight_decay * parameters[i]
            squares[i] = alpha * squares[i] + (1 - alpha) * g**2
            kept[i] = momentum * kept[i] + g / (np.sqrt(squares[i]) + eps)
            parameters[i] -= lr * kept[i]
    return parameters


def sgd(parameters, all_gradients, lr, momentum=0, weight_decay=0, nesterov=False):
    parameters = [p.copy() for p in parameters]
    kept = [np.zeros(p.shape) for p in parameters]
    for step_gradients in all_gradients:
        for i, g in enumerate(step_gradients):
            g = g + weight_decay * parameters[i]
            kept[i] = momentum * kept[i] + g
            parameters[i] -= lr * (g + momentum * kept[i] if nesterov else kept[i])
    return parameters


def centered(parameters, all_gradients, lr, alpha=0.99, eps=1e-8, weight_decay=0,
             momentum=0, initial_accumulator=0, centered=True):  # fmt: skip
    parameters = [p.copy() for p in parameters]
    squares = [np.full(p.shape, float(initial_accumulator)) for p in parameters]
    means, kept = ([np.zeros(p.shape) for p in parameters] for _ in range(2))
    for step_gradients in all_gradients:
        for i, g in enumerate(step_gradients):
            g = g + weight_decay * parameters[i]
            squares[i] = alpha * squares[i] + (1 - alpha) * g**2
            means[i] = alpha * means[i] + (1 - alpha) * g
            deviation = np.sqrt(squares[i] - means[i] ** 2)
            kept[i] = momentum * kept[i] + g / (deviation + eps)
            parameters[i] -= lr * kept[i]
    return parameters


def adagrad(parameters, all_gradients, lr, lr_decay=0, weight_decay=0,
            initial_accumulator_value=0, eps=1e-10):  # fmt: skip
    parameters = [p.copy() for p in parameters]
    sums = [np.full(p.shape, float(initial_accumulator_value)) for p in parameters]
    for t, step_gradients in enumerate(all_gradients):
        for i, g in enumerate(step_gradients):
            g = g + weight_decay * parameters[i]
            sums[i] = sums[i] + g**2
            parameters[i] -= lr / (1 + t * lr_decay) * g / (np.sqrt(sums[i]) + eps)
    return parameters


def adam(parameters, all_gradients, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0,
         decoupled=False):  # fmt: skip
    parameters = [p.copy() for p in parameters]
    means, squares = ([np.zeros(p.shape) for p in parameters] for _ in range(2))
    for t, step_gradients in enumerate(all_gradients, 1):
        for i, g in enumerate(step_gradients):
            if decoupled:
                parameters[i] *= 1 - lr * weight_decay
            else:
                g = g + weight_decay * parameters[i]
            means[i] = betas[0] * means[i] + (1 - betas[0]) * g
            squares[i] = betas[1] * squares[i] + (1 - betas[1]) * g**2
            mean = means[i] / (1 - betas[0] ** t)
            root = np.sqrt(squares[i] / (1 - betas[1] ** t))
            parameters[i] -= lr * mean / (root + eps)
    return parameters


def adamw(parameters, all_gradients, **options):
    return adam(parameters, all_gradients, decoupled=True, **options)


def uphill(formula):
    def climbed(parameters, all_gradients, maximize, **options):
        negated = [[-g for g in step_gradients] for step_gradients in all_gradients]
        return formula(parameters, negated, **options)

    return climbed


CASES = [
    (optim.RMSprop, rmsprop, dict(lr=0.01)),
    (optim.RMSprop, rmsprop, dict(lr=0.003, alpha=0.9, eps=1e-3, weight_decay=0.1)),
    (optim.RMSprop, rmsprop, dict(lr=0.003, momentum=0.9)),
    (
        optim.RMSprop,
        rmsprop,
        dict(lr=0.003, weight_decay=1e-4, eps=1e-10, initial_accumulator=1e-3),
    ),
    (optim.RMSprop, rmsprop, dict(lr=0.01, alpha=0.5, momentum=0.5, weight_decay=0.2)),
    (optim.SGD, sgd, dict(lr=0.1)),
    (optim.SGD, sgd, dict(lr=0.1, momentum=0.9)),
    (optim.SGD, sgd, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    (optim.SGD, sgd, dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)),
    # eps hides what rounding makes of a small variance
    (optim.RMSprop, centered, dict(lr=0.01, alpha=0.9, eps=0.1, centered=True)),
    (
        optim.RMSprop,
        centered,
        dict(lr=0.01, eps=0.1, momentum=0.5, initial_accumulator=1.0, centered=True),
    ),
    (optim.Adagrad, adagrad, dict(lr=0.1)),
    (
        optim.Adagrad,
        adagrad,
        dict(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5),
    ),
    (optim.Adam, adam, dict(lr=0.01)),
    (optim.Adam, adam, dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.1)),
    (optim.AdamW, adamw, dict(lr=0.01, weight_decay=0.5)),
]
CASES += [
    (kind, uphill(formula), {**options, "maximize": True})
    for kind, formula, options in CASES
    if "weight_decay" in options
]
IDS = [f"{kind.__name__}-{'-'.join(options)}" for kind, _, options in CASES]


def take_steps(optimizer, parameters, seeds):
    taken = []
    for seed in seeds:
        taken.append(gradients(parameters, seed))
        for parameter, gradient in zip(parameters, taken[-1]):
            parameter.grad.copy_(gradient)
        optimizer.step()
    return taken


@pytest.mark.parametrize("kind, formula, options", CASES, ids=IDS)
def test_steps_follow_the_formula(kind, formula, options):
    parameters = make_parameters()
    start = [p.data.numpy().astype(np.float64) for p in parameters]
    optimizer = kind(parameters, **options)
    taken = take_steps(optimizer, parameters, range(STEPS))
    for parameter, before, expected in zip(
        parameters, start, formula(start, taken, **options)
    ):
        assert np.abs(expected - before).max() > 0.01
        np.testing.assert_allclose(
            parameter.data.numpy(), expected, rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize("kind, formula, options", CASES, ids=IDS)
def test_padding_stays_zero_and_others_stay_as_they_are(kind, formula, options):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    left_out = model[0].bias
    parameters = [p for p in model.parameters() if p is not left_out]
    before = left_out.data.numpy()
    left_out.grad.fill_(1)
    optimizer = kind(parameters, **options)
    take_steps(optimizer, parameters, range(STEPS))
    np.testing.assert_array_equal(left_out.data.numpy(), before)
    slab = model[0].weight.slab
    inside = np.zeros(slab.data.size, bool)
    for parameter in model.parameters():
        inside[parameter.offset : parameter.offset + parameter.size] = True
    assert not slab.data.numpy()[~inside].any()


def test_a_model_is_one_run():
    model = nn.reference_network()
    (run,) = optim.RMSprop(model.parameters()).runs
    slab = model[0].weight.slab
    assert (run.data.ptr, run.data.size) == (slab.data.ptr, slab.data.size)
    # in whatever order they are given
    shuffled = list(reversed(model.parameters()))
    assert len(optim.SGD(shuffled).runs) == 1


def test_gaps_and_slabs_cut_runs():
    parameters = make_parameters()
    runs = optim.SGD(parameters).runs
    assert [run.parameters for run in runs] == [
        parameters[:1],
        parameters[1:3],
        parameters[3:],
    ]
    # each up to where the next parameter would begin: 35, 350 and 70, 6 elements
    assert [run.data.size for run in runs] == [64, 384 + 128, 64]


@pytest.mark.parametrize("kind, formula, options", CASES, ids=IDS)
def test_state_follows_parameters_that_move(kind, formula, options):
    def run(move):
        layers = [nn.Linear(7, 5), nn.Linear(5, 3)]
        rng = np.random.default_rng(5)
        for layer in layers:
            layer.weight.data.copy_(rng.standard_normal(layer.weight.shape))
            layer.bias.data.copy_(rng.standard_normal(layer.bias.shape))
        parameters = layers[0].parameters() + layers[1].parameters()
        optimizer = kind(parameters, **options)
        assert len(optimizer.runs) == 2
        take_steps(optimizer, parameters, range(3))
        if move:
            nn.Sequential(layers[1], layers[0])
            assert len(optimizer.runs) == 1
        take_steps(optimizer, parameters, range(3, 6))
        return [p.data.numpy() for p in parameters]

    for moved, stayed in zip(run(move=True), run(move=False)):
        np.testing.assert_array_equal(moved, stayed)


def test_gradients_survive_a_move_before_the_step():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.data.numpy()
    layer.weight.grad.copy_([[1.0, 2.0]])
    nn.Sequential(nn.Linear(1, 2), layer)
    optimizer.step()
    np.testing.assert_allclose(layer.weight.data.numpy(), before - [[1, 2]], rtol=1e-6)


def test_zero_grad():
    parameters = make_parameters()
    optimizer = optim.RMSprop(parameters)
    before = [p.data.numpy() for p in parameters]
    for parameter in parameters:
        parameter.grad.fill_(3)
    optimizer.zero_grad()
    assert not any(parameter.grad.numpy().any() for parameter in parameters)
    optimizer.step()
    for parameter, expected in zip(parameters, before):
        np.testing.assert_array_equal(parameter.data.numpy(), expected)


def test_the_learning_rate_can_change():
    parameter = nn.Parameter(np.zeros(3))
    optimizer = optim.SGD([parameter], lr=0.5)
    parameter.grad.fill_(1)
    optimizer.step()
    optimizer.lr = 0.25
    assert optimizer.lr == 0.25
    optimizer.step()
    optimizer.lr = 0
    optimizer.step()
    assert parameter.data.numpy().tolist() == [-0.75] * 3
    for wrong in (-1, np.nan, np.inf, 1e39, "1", True, None):
        with pytest.raises((ValueError, TypeError), match="lr must be"):
            optimizer.lr = wrong
    assert optimizer.lr == 0


def test_beta_is_alpha():
    parameters = [nn.Parameter(np.zeros(3))]
    assert optim.RMSprop(parameters, beta=0.9).alpha == 0.9
    assert optim.RMSprop(parameters).alpha == 0.99
    with pytest.raises(TypeError, match="two names of one number"):
        optim.RMSprop(parameters, alpha=0.9, beta=0.9)


@pytest.mark.parametrize("kind, formula, options", CASES, ids=IDS)
def test_state_goes_round(kind, formula, options):
    parameters = make_parameters()
    optimizer = kind(parameters, **options)
    take_steps(optimizer, parameters, range(3))
    optimizer.lr = 0.02
    state = optimizer.state_dict()
    plain = str, float, bool, list, np.ndarray
    assert all(isinstance(v, plain) for v in state.values())
    weights = [p.data.numpy() for p in parameters]
    take_steps(optimizer, parameters, range(3, 6))
    expected = [p.data.numpy() for p in parameters]

    # into an optimizer that was made otherwise, over parameters that lie otherwise
    others = [nn.Parameter(array) for array in weights]
    resumed = kind(others, lr=7, weight_decay=0.5)
    resumed.load_state_dict(state)
    assert repr(resumed) == repr(optimizer) and resumed.lr == 0.02
    take_steps(resumed, others, range(3, 6))
    for parameter, array in zip(others, expected):
        np.testing.assert_array_equal(parameter.data.numpy(), array)


def test_loading_keeps_the_memory():
    parameters = make_parameters()
    optimizer = optim.RMSprop(parameters)
    state = optimizer.state_dict()
    places = [run.state["square_avg"].ptr for run in optimizer.runs]
    optimizer.load_state_dict(state)
    assert [run.state["square_avg"].ptr for run in optimizer.runs] == places


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda s: s.update(type="SGD"),
            ValueError,
            "of SGD, the optimizer is RMSprop",
        ),
        (lambda s: s.pop("lr"), ValueError, "has no lr"),
        (lambda s: s.update(alpha=2.0), ValueError, "alpha must be"),
        (lambda s: s.pop("square_avg.3"), ValueError, "has no square_avg.3"),
        (lambda s: s.update(more=1), ValueError, "has more"),
        (lambda s: s.update(momentum=0.5), ValueError, "has no momentum_buffer.0"),
        (
            lambda s: s.update({"square_avg.1": np.zeros(3)}),
            ShapeError,
            r"square_avg.1 has shape \(3,\), the parameter \(70, 5\)",
        ),
        (
            lambda s: s.update({"square_avg.1": np.zeros((70, 5), int)}),
            TypeError,
            "square_avg.1 is int64",
        ),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, error, message):
    parameters = make_parameters()
    optimizer = optim.RMSprop(parameters, lr=0.5)
    take_steps(optimizer, parameters, range(2))
    before = optimizer.state_dict()
    state = {k: v + 1 if isinstance(v, np.ndarray) else v for k, v in before.items()}
    state["lr"] = 0.1
    change(state)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: optim.SGD([]), ValueError, "no parameters"),
        (lambda p: optim.SGD(nn.Linear(1, 1)), TypeError, r"model.parameters\(\)"),
        (lambda p: optim.SGD([np.zeros(3)]), TypeError, "must hold Parameters"),
        (lambda p: optim.SGD(p + p), ValueError, "given twice"),
        (lambda p: optim.SGD(p, lr=-1), ValueError, "lr must be finite"),
        (lambda p: optim.SGD(p, momentum=-1), ValueError, "momentum must be finite"),
        (lambda p: optim.SGD(p, maximize=1), TypeError, "maximize must be True"),
        (lambda p: optim.SGD(p, weight_decay=-1), ValueError, "weight_decay must be"),
        (lambda p: optim.SGD(p, nesterov=True), ValueError, "momentum, which is 0"),
        (lambda p: optim.SGD(p, momentum=0.9, nesterov=1), TypeError, "nesterov"),
        (lambda p: optim.RMSprop(p, alpha=1.1), ValueError, "alpha .* from 0 to 1"),
        (lambda p: optim.RMSprop(p, beta=-0.1), ValueError, "alpha must be"),
        (lambda p: optim.RMSprop(p, eps=-1e-8), ValueError, "eps must be finite, not"),
        (lambda p: optim.RMSprop(p, maximize=0), TypeError, "maximize must be True"),
        (lambda p: optim.RMSprop(p, eps=None), TypeError, "eps must be a number"),
        (
            lambda p: optim.RMSprop(p, initial_accumulator=np.inf),
            ValueError,
            "initial_accumulator must be finite",
        ),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make([nn.Parameter(np.zeros(3))])


def test_an_optimizer_is_not_copied():
    optimizer = optim.SGD([nn.Parameter(np.zeros(3))])
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            make_copy(optimizer)


def test_settings_are_read_only():
    optimizer = optim.RMSprop([nn.Parameter(np.zeros(3))], momentum=0.5)
    assert repr(optimizer) == (
        "RMSprop(lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.5, "
        "initial_accumulator=0.0; 3 parameters)"
    )
    for name in ("alpha", "eps", "weight_decay", "momentum", "initial_accumulator"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 0.25)


def test_training_lowers_the_loss():
    rng = np.random.default_rng(8)
    x = rng.standard_normal((64, 6))
    labels = (x[:, 0] > x[:, 1]).astype(int)
    for kind, lr in [(optim.RMSprop, 0.01), (optim.SGD, 0.5)]:
        model = nn.Sequential(nn.Linear(6, 16), nn.Sigmoid(), nn.Linear(16, 2))
        loss, optimizer = nn.CrossEntropyLoss(), kind(model.parameters(), lr=lr)
        values = []
        for _ in range(100):
            values.append(float(loss(model(x), labels)))
            model.backward(loss.backward(), input_grad=False)
            optimizer.step()
        assert values[-1] < 0.5 * values[0]
