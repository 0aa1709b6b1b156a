"""Dropout on the CPU: random numbers, training, checkpoints."""

import copy
import os

import numpy as np
import pytest
from test_ops_reference import slope
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import DataError, Tensor, Trainer, devices, nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference, reference_dropout
from cycnn.train import checkpoint


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def state_of(seed=2**63 + 17, step=0):
    words = [seed & 0xFFFFFFFF, seed >> 32, step, 0]
    return np.array(words, np.uint32).view(np.int32)


# random numbers


def test_philox_gives_the_numbers_of_its_authors():
    # "known answer tests" of Random123: counter, key, words
    ones = 0xFFFFFFFF
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        found = reference_dropout._philox([np.uint64(c) for c in counter], key)
        assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 31), (5, 7, 11), (40001,)], ids=str)
def test_the_cpu_computes_what_is_specified(shape, p):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), dtype=np.float32)
    for step in (0, 2**31 - 1, 2**32 - 1):
        state = state_of(step=step)
        tensor = Tensor(state, "cpu")
        y, used = cpu.dropout_forward(Tensor(x, "cpu"), tensor, p)
        want, want_used = reference.dropout_forward(x, state, p)
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-6)
        np.testing.assert_array_equal(y.numpy() == 0, want == 0)
        np.testing.assert_array_equal(used.numpy(), want_used)
        np.testing.assert_array_equal(tensor.numpy(), state)
        assert state.view(np.uint32)[2] == (step + (x.size > 0)) % 2**32
        dx = cpu.dropout_backward(Tensor(dy, "cpu"), used, p)
        want = reference.dropout_backward(dy, used.numpy(), p)
        np.testing.assert_allclose(dx.numpy(), want, rtol=1e-6)


def test_the_specification_has_the_slope_of_its_function():
    x, dy = np.random.default_rng(0).standard_normal((2, 5, 7))
    forward = lambda: reference.dropout_forward(x, state_of(), 0.3)
    found = reference.dropout_backward(dy, forward()[1], 0.3)
    expected = slope(lambda: forward()[0], x, dy)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_share_and_the_independence_of_what_is_dropped(p):
    n, steps = 40000, 4
    state = Tensor(state_of(), "cpu")
    x = Tensor(np.ones(n, np.float32), "cpu")
    dropped = np.array(
        [cpu.dropout_forward(x, state, p)[0].numpy() == 0 for _ in range(steps)]
    )
    deviation = np.sqrt(p * (1 - p) / n)
    assert (abs(dropped.mean(axis=1) - p) < 5 * deviation).all()
    centred = dropped - p
    for one, other in [
        (centred[0], centred[1]),
        (centred[2], centred[3]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, 4:], centred[:, :-4]),
    ]:
        assert abs((one * other).mean()) < 5 * p * (1 - p) / np.sqrt(one.size)


# the layer


def test_evaluation_is_the_identity():
    layer = nn.Dropout(0.5).eval()
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 5), dtype=np.float32)
    np.testing.assert_array_equal(layer(x).numpy(), x)
    np.testing.assert_array_equal(layer.backward(dy).numpy(), dy)
    assert layer.random_state.data.numpy()[2] == 0
    never = nn.Dropout(0)
    np.testing.assert_array_equal(never(x).numpy(), x)
    np.testing.assert_array_equal(never.backward(dy).numpy(), dy)
    assert (nn.Dropout(1)(x).numpy() == 0).all()


def test_backward_drops_what_forward_dropped():
    layer = nn.Dropout(0.4)
    ones = np.ones((33, 31), np.float32)
    y = layer(ones).numpy()
    np.testing.assert_array_equal(layer.backward(ones).numpy(), y)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.6)}
    assert (layer(ones).numpy() != y).any(), "another batch, another mask"
    assert layer.backward(ones, input_grad=False) is None
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(ones)


def test_the_seed_decides():
    ones = np.ones((33, 31), np.float32)

    def masks(seed):
        cycnn.manual_seed(seed)
        layers = [nn.Dropout(), nn.Dropout()]
        return [layer(ones).numpy() for layer in layers for _ in range(2)]

    first = masks(1)
    np.testing.assert_array_equal(masks(1), first)
    for i, one in enumerate(first):
        for other in [*first[:i], *masks(2)]:
            assert (one != other).any()


def test_a_prediction_draws_nothing():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.Linear(5, 2))
    x = np.random.default_rng(0).standard_normal((3, 5), dtype=np.float32)
    found = model.train().predict(x)
    np.testing.assert_allclose(found, model.eval()(x).numpy(), rtol=1e-6)
    assert model[1].random_state.data.numpy()[2] == 0


def test_the_state_dict_has_no_random_numbers():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout())
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    other = copy.deepcopy(model)
    ones = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(other(ones).numpy(), model(ones).numpy())
    other(ones)
    assert model[1].random_state.data.numpy()[2] == 1


def test_arguments_and_names():
    assert repr(nn.Dropout()) == "Dropout(p=0.5)"
    with pytest.raises(ValueError, match="p must be from 0 to 1, got 1.5"):
        nn.Dropout(1.5)
    with pytest.raises(ValueError, match="p must be from 0 to 1, got nan"):
        nn.Dropout(float("nan"))
    with pytest.raises(TypeError, match="p must be a number"):
        nn.Dropout("half")
    layer = nn.Dropout()
    layer(np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match="gradient has shape"):
        layer.backward(np.zeros((3, 2), np.float32))
    with pytest.raises(ShapeError, match="state has shape"):
        state = Tensor(np.zeros(3, np.int32), "cpu")
        cpu.dropout_forward(Tensor(np.zeros(3, np.float32), "cpu"), state, 0.5)


# training

TRAIN = patterns(200)


def make_trainer(seed=3, capture=None, dropout=2):
    cycnn.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        *(nn.Dropout(0.2) for _ in range(dropout)),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
        nn.LogSoftmax(),
    ).to("cpu")
    optimizer = optim.RMSprop(model.parameters(), lr=0.01)
    return Trainer(model, nn.NLLLoss(), optimizer, capture=capture)


class StopAt:
    def __init__(self, path, steps):
        self.path, self.left = path, steps

    def on_step_end(self, trainer):
        self.left -= 1
        if self.left == 0:
            trainer.save(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [1, 7, 10])
@pytest.mark.parametrize("capture", [False, True])
def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path, steps, capture):
    whole = make_trainer(capture=capture)
    history = whole.fit(TRAIN, 2, 32, seed=5)
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make_trainer().fit(TRAIN, 2, 32, seed=5, callbacks=[StopAt(path, steps)])
    # made from another seed: the file knows the right one
    other = make_trainer(seed=4)
    resumed = Trainer.resume(path, other.model, other.loss, other.optimizer)
    assert figures(resumed.fit(TRAIN, 2, 32)) == figures(history)
    assert digest(resumed) == digest(whole)


def test_recorded_steps_end_with_the_same_bits():
    trainers = [make_trainer(capture=capture) for capture in (False, True)]
    histories = [trainer.fit(TRAIN, 2, 32, seed=5) for trainer in trainers]
    assert figures(histories[0]) == figures(histories[1])
    assert digest(trainers[0]) == digest(trainers[1])
    assert trainers[1].model[2].random_state.data.numpy()[2] == 14


@pytest.mark.parametrize("dropout", [1, 3])
def test_a_checkpoint_of_other_layers_is_refused(tmp_path, dropout):
    make_trainer().save(tmp_path / "run")
    other = make_trainer(dropout=2)
    content = {"2.random_state": np.zeros(4, np.int32)}
    own = checkpoint._apart(other.model)
    with pytest.raises(DataError, match="only this model has 3.random_state"):
        checkpoint._check_buffers("run", own, content)
    other = make_trainer(dropout=dropout)
    before = digest(other)
    with pytest.raises(DataError, match="of another model") as caught:
        Trainer.resume(tmp_path / "run", other.model, other.loss, other.optimizer)
    assert os.fspath(tmp_path / "run") in str(caught.value)
    assert digest(other) == before
    with pytest.raises(DataError, match=r"is int32 of shape \(3,\), in this model"):
        checkpoint._check_buffers(
            "run", own, {name: np.zeros(3, np.int32) for name in own}
        )
