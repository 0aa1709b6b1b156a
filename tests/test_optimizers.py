"""Optimizers against torch.optim and the float64 reference; groups; clipping."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cycnn
from cycnn import Tensor, devices, nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

STEPS = 12


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


# (class, name in torch.optim, options, drawn at random)
KINDS = {
    "SGD": (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, Nesterov": (optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "SGD, dampened by nothing": (optim.SGD, {"dampening": 0.5}),
    "RMSprop": (optim.RMSprop, {"alpha": 0.9, "momentum": 0.5, "weight_decay": 0.1}),
    "RMSprop, centered": (
        optim.RMSprop,
        {"alpha": 0.95, "eps": 1e-3, "centered": True, "weight_decay": 0.1},
    ),
    "RMSprop, centered, momentum": (
        optim.RMSprop,
        {"eps": 1e-2, "centered": True, "momentum": 0.7},
    ),
    "Adam": (optim.Adam, {}),
    "Adam, L2": (optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1}),
    "Adam, amsgrad": (optim.Adam, {"betas": (0.5, 0.6), "amsgrad": True}),
    "Adam, no memory": (optim.Adam, {"betas": (0.0, 0.0), "eps": 1e-3}),
    "AdamW": (optim.AdamW, {}),
    "AdamW, decay": (optim.AdamW, {"weight_decay": 0.5, "amsgrad": True}),
    "Adagrad": (optim.Adagrad, {}),
    "Adagrad, decay": (
        optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    ),
    # the ends of what PyTorch takes
    "SGD, all kept": (optim.SGD, {"momentum": 1.0, "dampening": 1.0}),
    "RMSprop, all kept": (optim.RMSprop, {"alpha": 1.0, "momentum": 1.0, "eps": 1.0}),
    "RMSprop, no eps": (optim.RMSprop, {"eps": 0.0, "alpha": 0.5}),
    "Adam, no eps": (optim.Adam, {"eps": 0.0, "amsgrad": True}),
    "Adagrad, no eps": (optim.Adagrad, {"eps": 0.0}),
}
# each of them uphill, too
KINDS |= {
    f"{name}, maximize": (kind, {**options, "maximize": True})
    for name, (kind, options) in KINDS.items()
    if "no eps" not in name
}


def model_of(seed=0):
    cycnn.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 70), nn.Linear(70, 3))


def gradients(parameters, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(p.shape).astype(np.float32) for p in parameters]


def take_steps(optimizer, parameters, seeds):
    for seed in seeds:
        for parameter, gradient in zip(parameters, gradients(parameters, seed)):
            parameter.grad.copy_(gradient)
        optimizer.step()


def torch_steps(kind, groups, options, lr, seeds):
    """Parameters after the steps of torch's optimizer; groups: [(arrays, options)]."""
    torch = pytest.importorskip("torch")
    tensors, given = [], []
    for arrays, own in groups:
        held = [torch.tensor(a, requires_grad=True) for a in arrays]
        tensors += held
        given.append({"params": held, **own})
    optimizer = getattr(torch.optim, kind.__name__)(given, lr=lr, **options)
    for seed in seeds:
        for tensor, gradient in zip(tensors, gradients(tensors, seed)):
            tensor.grad = torch.tensor(gradient)
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_torch(name):
    kind, options = KINDS[name]
    parameters = model_of().parameters()
    start = [p.data.numpy() for p in parameters]
    want = torch_steps(kind, [(start, {})], options, 0.01, range(STEPS))
    take_steps(kind(parameters, 0.01, **options), parameters, range(STEPS))
    for parameter, before, expected in zip(parameters, start, want):
        assert np.abs(expected - before).max() > 1e-3
        np.testing.assert_allclose(
            parameter.data.numpy(), expected, rtol=2e-5, atol=2e-6
        )


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_settings_are_those_of_torch(data):
    draw = data.draw
    part = st.floats(0, 0.99)
    eps = st.sampled_from([1e-8, 1e-4, 1e-2])
    decay = st.sampled_from([0.0, 0.01, 0.3])
    kind = draw(
        st.sampled_from(
            [optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW, optim.Adagrad]
        )
    )
    options = {"weight_decay": draw(decay), "maximize": draw(st.booleans())}
    if kind is optim.SGD:
        options |= {"momentum": draw(part), "dampening": draw(part)}
    elif kind is optim.RMSprop:
        # where the variance is close to 0, rounding decides the step
        options |= {"alpha": draw(st.floats(0.3, 0.99)), "eps": 1e-2}
        options |= {"momentum": draw(part), "centered": draw(st.booleans())}
    elif kind is optim.Adagrad:
        options |= {"lr_decay": draw(part), "eps": draw(eps)}
    else:
        options |= {"betas": (draw(part), draw(part)), "eps": draw(eps)}
        options |= {"amsgrad": draw(st.booleans())}
    parameters = model_of().parameters()
    start = [p.data.numpy() for p in parameters]
    want = torch_steps(kind, [(start, {})], options, 0.01, range(10))
    take_steps(kind(parameters, 0.01, **options), parameters, range(10))
    for parameter, expected in zip(parameters, want):
        np.testing.assert_allclose(
            parameter.data.numpy(),
            expected,
            rtol=1e-4,
            atol=1e-5,
            err_msg=repr(options),
        )


@pytest.mark.parametrize("name", [name for name in KINDS if "maximize" in name])
def test_uphill_is_down_the_negated_gradient(name):
    kind, options = KINDS[name]
    found = []
    for sign in 1, -1:
        parameters = model_of().parameters()
        optimizer = kind(parameters, 0.01, **(options | {"maximize": sign == 1}))
        for seed in range(STEPS):
            for parameter, gradient in zip(parameters, gradients(parameters, seed)):
                parameter.grad.copy_(sign * gradient)
            optimizer.lr = 0.01 / (1 + seed)
            optimizer.step()
        assert optimizer.lr == pytest.approx(0.01 / STEPS)
        assert float(optimizer.lr_tensor) == pytest.approx(0.01 / STEPS)
        found.append([p.data.numpy() for p in parameters])
    for up, down in zip(*found):
        np.testing.assert_array_equal(up, down)


@pytest.mark.parametrize(
    "kind, options",
    [
        (optim.RMSprop, {"alpha": 0.0}),
        (optim.RMSprop, {"centered": True, "momentum": 0.9}),
        (optim.Adam, {}),
        (optim.AdamW, {"betas": (0.0, 0.0), "weight_decay": 0.0}),
        (optim.Adagrad, {}),
    ],
)
def test_without_eps_what_has_no_gradient_stays(kind, options):
    parameter = nn.Parameter([1.0, 2.0, 3.0])
    optimizer = kind([parameter], 0.5, eps=0, **options)
    assert optimizer.eps == 0 and optimizer.state_dict()["eps"] == 0
    for _ in range(3):
        parameter.grad.copy_([0.0, 1.0, -1e-15])
        optimizer.step()
    first, *others = parameter.data.numpy()
    assert first == 1 and np.isfinite(others).all() and others != [2, 3]
    np.testing.assert_array_equal(parameter.slab.data.numpy()[3:], 0)


def test_bias_correction_after_many_steps():
    """1 - beta^t at its ends: the first step moves by lr, a late one is plain."""
    parameter = nn.Parameter(np.zeros(3))
    optimizer = optim.Adam([parameter], lr=0.5, betas=(0.9, 0.999))
    parameter.grad.copy_([1.0, -2.0, 1e-3])
    optimizer.step()
    np.testing.assert_allclose(parameter.data.numpy(), [-0.5, 0.5, -0.5], rtol=1e-4)
    state = optimizer.state_dict() | {"step": 1e6}
    optimizer.load_state_dict(state)
    before = parameter.data.numpy()
    optimizer.step()
    mean, square = 0.9 * 0.1 + 0.1, 0.999 * 0.001 + 0.001
    np.testing.assert_allclose(
        parameter.data.numpy() - before,
        -0.5 * mean / np.sqrt(square) * np.array([1, -1, 1]),
        rtol=1e-3,
    )
    assert optimizer.state_dict()["step"] == 1e6 + 1


# the operations against their specification

RNG = np.random.default_rng(5)


def slabs(n, count):
    made = [RNG.standard_normal(n).astype(np.float32) for _ in range(count)]
    return [np.abs(a) if i > 1 else a for i, a in enumerate(made)]


OPERATIONS = {
    "adam": ("adam_step", 4, (None,), (0.9, 0.99, 1e-8, 0.1, False)),
    "adamw": ("adam_step", 4, (None,), (0.9, 0.99, 1e-8, 0.1, True)),
    "amsgrad": ("adam_step", 5, (), (0.9, 0.99, 1e-8, 0.1, True)),
    "adagrad": ("adagrad_step", 3, (), (0.1, 1e-8, 0.1)),
    "sgd": ("damped_sgd_step", 3, (), (0.9, 0.2, 0.1, False)),
}


@pytest.mark.parametrize("n", [0, 1, 31, 257, 40_000])
@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_counted_steps_follow_their_specification(name, advance, n):
    op, count, more, numbers = OPERATIONS[name]
    arrays = slabs(n, count)
    for steps in (0, 3):
        step = np.array([steps, 0], np.int32)
        tensors = [Tensor(a, "cpu") for a in arrays]
        held = Tensor(step, "cpu")
        lr = np.array(0.1, np.float32)
        getattr(cpu, op)(*tensors, *more, held, advance, Tensor(lr, "cpu"), *numbers)
        wanted = [a.astype(np.float64) for a in arrays]
        getattr(reference, op)(*wanted, *more, step, advance, lr, *numbers)
        assert held.numpy().tolist() == step.tolist() == [steps + advance, 0]
        for tensor, want in zip(tensors, wanted):
            np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 31, 257, 40_000])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_centered_rmsprop_follows_its_specification(n, momentum):
    param, grad, square, mean, buffer = slabs(n, 5)
    # of a variance near 0 few digits are left: test_any_shape.py has bounds for those
    square = square + mean * mean + np.float32(0.01)
    given = [param, grad, square, mean, buffer if momentum else None]
    tensors = [None if a is None else Tensor(a, "cpu") for a in given]
    wanted = [None if a is None else a.astype(np.float64) for a in given]
    numbers = 0.9, 1e-2, 0.1, momentum
    lr = np.array(0.1, np.float32)
    cpu.centered_rmsprop_step(*tensors, Tensor(lr, "cpu"), *numbers)
    reference.centered_rmsprop_step(*wanted, lr, *numbers)
    for tensor, want in zip(tensors, wanted):
        if want is not None:
            np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-4, atol=1e-5)


def test_a_variance_that_rounds_below_zero_is_zero():
    arrays = [np.full(2, v, np.float32) for v in (1.0, 0.1, 0.01, 0.1)]
    arrays[2] *= np.float32(0.9999)
    tensors = [Tensor(a, "cpu") for a in arrays]
    lr = Tensor(np.array(1e-3, np.float32), "cpu")
    cpu.centered_rmsprop_step(*tensors, None, lr, 0.9, 1e-2, 0.0, 0.0)
    assert np.isfinite(tensors[0].numpy()).all()


def test_slabs_must_fit():
    n3, n4 = (Tensor(np.zeros(n), "cpu") for n in (3, 4))
    lr, step = Tensor(np.zeros(()), "cpu"), Tensor(np.zeros(2, int), "cpu")
    with pytest.raises(ShapeError, match=r"grad has shape \(4,\)"):
        cpu.adagrad_step(n3, n4, n3, step, True, lr, 0.0, 1e-8, 0.0)
    with pytest.raises(ShapeError, match="step has shape"):
        cpu.adagrad_step(n3, n3, n3, step[:1], True, lr, 0.0, 1e-8, 0.0)
    with pytest.raises(ShapeError, match="lr has shape"):
        cpu.centered_rmsprop_step(n3, n3, n3, n3, None, n3, 0.9, 1e-8, 0.0, 0.0)


# state


@pytest.mark.parametrize("name", KINDS)
def test_state_goes_round(name):
    kind, options = KINDS[name]
    model = model_of()
    parameters = model.parameters()
    optimizer = kind(parameters, 0.05, **options)
    take_steps(optimizer, parameters, range(3))
    state, weights = optimizer.state_dict(), model.state_dict()
    take_steps(optimizer, parameters, range(3, 6))
    twin = model_of(1)
    twin.load_state_dict(weights)
    resumed = kind(twin.parameters(), lr=7)
    resumed.load_state_dict(state)
    assert repr(resumed) == repr(optimizer)
    take_steps(resumed, twin.parameters(), range(3, 6))
    for key, array in model.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[key], array)
    again = resumed.state_dict()
    assert again.keys() == state.keys()


def test_names_of_the_state():
    parameters = [nn.Parameter(np.zeros(3))]
    assert set(optim.Adam(parameters, amsgrad=True).state_dict()) == {
        "type", "lr", "betas", "eps", "weight_decay", "amsgrad", "step", "exp_avg.0",
        "exp_avg_sq.0", "max_exp_avg_sq.0",
    }  # fmt: skip
    assert "sum.0" in optim.Adagrad(parameters).state_dict()
    centered = optim.RMSprop(parameters, centered=True, momentum=0.5)
    assert {"square_avg.0", "grad_avg.0", "momentum_buffer.0"} < set(
        centered.state_dict()
    )


def test_state_follows_a_move():
    def run(move):
        layers = [nn.Linear(7, 5), nn.Linear(5, 3)]
        for i, layer in enumerate(layers):
            layer.weight.data.fill_(i + 1)
        parameters = layers[0].parameters() + layers[1].parameters()
        optimizer = optim.Adam(parameters, 0.1)
        take_steps(optimizer, parameters, range(3))
        if move:
            nn.Sequential(layers[1], layers[0])
        take_steps(optimizer, parameters, range(3, 6))
        assert optimizer.state_dict()["step"] == 6
        return [p.data.numpy() for p in parameters[::2]]

    for moved, stayed in zip(run(True), run(False)):
        np.testing.assert_array_equal(moved, stayed)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: s.pop("step"), ValueError, "step is None"),
        (lambda s: s.update(step=-1), ValueError, "step is -1"),
        (lambda s: s.update(step="1"), ValueError, "step is '1'"),
        (lambda s: s.update(step=float("nan")), ValueError, "step is nan"),
        (lambda s: s.update(betas=0.9), TypeError, "betas must be two numbers"),
        (lambda s: s.update(betas=[0.9, 1.0]), ValueError, "less than 1"),
        (lambda s: s.update(type="AdamW"), ValueError, "of AdamW, the optimizer is"),
        (lambda s: s.update(amsgrad=True), ValueError, "no max_exp_avg_sq.0"),
        (lambda s: s.update(param_groups=[]), ValueError, "param_groups do not fit"),
        (lambda s: s.update(param_groups=[3]), ValueError, "group 0 of the state"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, error, message):
    parameters = model_of().parameters()
    optimizer = optim.Adam(parameters, 0.05)
    take_steps(optimizer, parameters, range(2))
    before = optimizer.state_dict()
    state = dict(before)
    change(state)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: optim.Adam(p, betas=(0.9, 1)), ValueError, r"betas\[1\] must be"),
        (lambda p: optim.Adam(p, betas=0.9), TypeError, "betas must be two numbers"),
        (lambda p: optim.Adam(p, eps=-1), ValueError, "eps must be finite, not neg"),
        (lambda p: optim.AdamW(p, maximize=1), TypeError, "maximize must be True"),
        (lambda p: optim.Adagrad(p, maximize=None), TypeError, "maximize must be"),
        (lambda p: optim.AdamW(p, amsgrad=1), TypeError, "amsgrad must be True"),
        (lambda p: optim.Adagrad(p, lr_decay=-1), ValueError, "lr_decay must be"),
        (lambda p: optim.RMSprop(p, centered=1), TypeError, "centered must be True"),
        (lambda p: optim.SGD(p, dampening=2), ValueError, "dampening must be from"),
        (
            lambda p: optim.SGD(p, momentum=0.5, nesterov=True, dampening=0.5),
            ValueError,
            "needs dampening 0",
        ),
        (lambda p: optim.SGD([{"lr": 1}]), ValueError, "needs 'params', got lr"),
        (
            lambda p: optim.SGD([{"params": p, "alpha": 1}]),
            TypeError,
            "has 'alpha', which SGD has not: expected params, lr, momentum",
        ),
        (
            lambda p: optim.SGD([{"params": p, "momentum": -1}]),
            ValueError,
            "momentum must be",
        ),
        (lambda p: optim.SGD([{"params": p}] * 2), ValueError, "given twice"),
        (lambda p: optim.SGD([{"params": []}]), ValueError, "no parameters"),
        (lambda p: optim.SGD([*p, {"params": p}]), TypeError, "must hold Parameters"),
        (
            lambda p: optim.SGD([{"params": nn.Linear(1, 1)}]),
            TypeError,
            r"layer.parameters\(\)",
        ),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make([nn.Parameter(np.zeros(3))])


# groups


def groups_of(model, own):
    weights = [layer.weight for layer in model]
    biases = [layer.bias for layer in model]
    return [{"params": weights}, {"params": biases, **own}]


@pytest.mark.parametrize(
    "kind, options, own",
    [
        (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.0}),
        (optim.SGD, {"momentum": 0.9}, {"momentum": 0.0, "lr": 0.2}),
        (optim.SGD, {"momentum": 0.9, "dampening": 0.3}, {"dampening": 0.0}),
        (optim.RMSprop, {"weight_decay": 0.1}, {"centered": True, "eps": 0.01}),
        (optim.Adam, {"weight_decay": 0.1}, {"lr": 0.02, "amsgrad": True}),
        (optim.AdamW, {}, {"weight_decay": 0.0, "betas": (0.5, 0.5)}),
        (optim.Adagrad, {"lr_decay": 0.1}, {"lr": 0.5}),
        (optim.AdamW, {"weight_decay": 0.5}, {"maximize": True, "lr": 0.02}),
        (optim.SGD, {"momentum": 0.9, "maximize": True}, {"maximize": False}),
    ],
)
def test_groups_are_those_of_torch(kind, options, own):
    model = model_of()
    optimizer = kind(groups_of(model, own), 0.01, **options)
    parameters = [p for group in optimizer.param_groups for p in group.params]
    arrays = [p.data.numpy() for p in parameters]
    want = torch_steps(
        kind, [(arrays[:3], {}), (arrays[3:], own)], options, 0.01, range(STEPS)
    )
    # saved and resumed halfway, by an optimizer with other numbers
    take_steps(optimizer, parameters, range(5))
    resumed = kind(groups_of(model, {}), 3.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.lrs == optimizer.lrs and "in 2 groups" in repr(resumed)
    take_steps(resumed, parameters, range(5, STEPS))
    for parameter, expected in zip(parameters, want):
        np.testing.assert_allclose(
            parameter.data.numpy(), expected, rtol=2e-5, atol=2e-6
        )


def test_learning_rates_of_groups():
    model = model_of()
    optimizer = optim.SGD(groups_of(model, {"lr": 0.5}), 0.1)
    assert optimizer.lrs == [0.1, 0.5] and optimizer.lr == 0.1
    assert optimizer.lr_tensor.numpy().tolist() == pytest.approx([0.1, 0.5])
    first, second = optimizer.param_groups
    second["lr"] = 0.25
    first.lr = 0.0
    assert optimizer.lrs == [0.0, second["lr"]] == [0.0, 0.25]
    assert optimizer.lr_tensor.numpy().tolist() == [0.0, 0.25]
    assert second["momentum"] == 0 and second["params"] is second.params
    assert list(second.keys())[:3] == ["params", "lr", "momentum"]
    assert "3 parameters, lr=0.25" in repr(second)
    for wrong, error, message in [
        (lambda: setattr(optimizer, "lr", 1.0), ValueError, "2 groups, each with"),
        (lambda: setattr(optimizer, "lrs", [1.0]), ValueError, "1 learning rates"),
        (lambda: setattr(optimizer, "lrs", [1.0, -1]), ValueError, "lr must be"),
        (lambda: second.__setitem__("momentum", 0.5), TypeError, "cannot be changed"),
    ]:
        with pytest.raises(error, match=message):
            wrong()
    assert optimizer.lrs == [0.0, 0.25]
    before = [p.data.numpy() for p in first.params + second.params]
    take_steps(optimizer, first.params + second.params, [1])
    for p, array in zip(first.params, before):
        np.testing.assert_array_equal(p.data.numpy(), array)
    for p, array in zip(second.params, before[3:]):
        assert (p.data.numpy() != array).any()


def test_a_group_is_one_run_wherever_its_parameters_go():
    model = model_of()
    values = model.state_dict()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad.fill_(i)
    optimizer = optim.Adam(groups_of(model, {"weight_decay": 0.1}))
    assert [run.group for run in optimizer.runs] == optimizer.param_groups
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, values[name])
    for i, parameter in enumerate(model.parameters()):
        assert (parameter.grad.numpy() == i).all()
    places = [p.data.ptr for p in model.parameters()]
    optimizer.step()
    assert [p.data.ptr for p in model.parameters()] == places
    # joined anew they lie in the order of the layers, until the optimizer notices
    whole = nn.Sequential(nn.Linear(2, 7), *model)
    average = optim.EMA(whole.parameters())
    optimizer.step()
    assert len(optimizer.runs) == 2 and optimizer.state_dict()["step"] == 2
    average.update()


def test_groups_in_a_state_must_fit():
    model = model_of()
    optimizer = optim.SGD(groups_of(model, {}), 0.1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="1 groups"):
        optim.SGD(model.parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match="of one group"):
        optimizer.load_state_dict(optim.SGD(model.parameters()).state_dict())
    state["param_groups"][1]["params"] = 2
    with pytest.raises(ValueError, match="group 1 of the state is of other parameters"):
        optimizer.load_state_dict(state)


# clipping


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("grouped", [False, True])
def test_clipping_is_that_of_torch(max_norm, grouped):
    torch = pytest.importorskip("torch")
    model = model_of()
    parameters = model.parameters()
    made = gradients(parameters, 3)
    tensors = [torch.zeros(p.shape, requires_grad=True) for p in parameters]
    for parameter, tensor, gradient in zip(parameters, tensors, made):
        parameter.grad.copy_(gradient)
        tensor.grad = torch.tensor(gradient)
    optimizer = optim.SGD(groups_of(model, {}) if grouped else parameters)
    norm = optimizer.clip_grad_norm(max_norm)
    want = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    assert norm.shape == () and float(norm) == pytest.approx(float(want), rel=1e-6)
    for parameter, tensor, gradient in zip(parameters, tensors, made):
        np.testing.assert_allclose(
            parameter.grad.numpy(), tensor.grad.numpy(), rtol=1e-5
        )
        if max_norm == 1e6:
            np.testing.assert_array_equal(parameter.grad.numpy(), gradient)


def test_clipping_passes_on_nan():
    parameter = nn.Parameter(np.zeros(3))
    optimizer = optim.SGD([parameter])
    parameter.grad.copy_([1.0, np.nan, 2.0])
    assert np.isnan(float(optimizer.clip_grad_norm(1.0)))
    assert np.isnan(parameter.grad.numpy()).all()
    with pytest.raises(ValueError, match="max_norm must be positive"):
        optimizer.clip_grad_norm(0)


@pytest.mark.parametrize("n", [1, 2, 4096, 50_000])
@pytest.mark.parametrize("parts", [1, 3, 13])
def test_sums_of_squares(n, parts):
    x = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    out, want = Tensor(np.full(parts, np.nan), "cpu"), np.empty(parts)
    cpu.square_sums(Tensor(x, "cpu"), out)
    reference.square_sums(x, want)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-6)
    assert want.sum() == pytest.approx(np.sum(x.astype(np.float64) ** 2))
