"""Dropout on the GPU: the CPU's bits, captured and trained."""

import numpy as np
import pytest
from bounds import SIZES, assert_same_bits, on_gpu, poison
from test_dropout import TRAIN, state_of
from training import CLASSES, digest, figures

import cycnn
from cycnn import Tensor, Trainer, nn, optim
from cycnn.ops import cpu


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


# the last of them takes more blocks than there are, so that each does several pieces
@pytest.mark.parametrize("size", (*SIZES, 2048 * 1024 + 4093))
@pytest.mark.parametrize("p", (0.3, 1.0))
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "unaligned"))
def test_the_bits_of_the_cpu(ops, size, p, offset):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, size + offset), dtype=np.float32)
    state, state_on_cpu = on_gpu(state_of(step=7)), Tensor(state_of(step=7), "cpu")
    for step in (8, 9):
        y, used = ops.dropout_forward(on_gpu(x)[offset:], state, p)
        want, used_on_cpu = cpu.dropout_forward(
            Tensor(x[offset:], "cpu"), state_on_cpu, p
        )
        assert_same_bits(y, want)
        np.testing.assert_array_equal(state.numpy(), state_on_cpu.numpy())
        if not size:
            continue
        assert state.numpy()[2] == step
        np.testing.assert_array_equal(used.numpy(), used_on_cpu.numpy())
        dx = ops.dropout_backward(on_gpu(dy)[offset:], used, p)
        want = cpu.dropout_backward(Tensor(dy[offset:], "cpu"), used_on_cpu, p)
        assert_same_bits(dx, want)


def test_captured_has_the_bits_of_eager():
    from cycnn.gpu.graph import Graph

    layers = []
    for _ in range(2):
        cycnn.manual_seed(1)
        layers.append(nn.Dropout(0.4).to("cuda"))
    x, dy = on_gpu(np.ones((2, 33, 31), np.float32))

    def run(layer):
        return layer(x), layer.backward(dy)

    graph = Graph(0)
    graph.rehearse(lambda: run(layers[0]))
    run(layers[1])
    captured = graph.record(lambda: run(layers[0]))
    seen = []
    for _ in range(3):
        graph.launch()
        for got, want in zip(captured, run(layers[1])):
            assert_same_bits(got, want)
        seen.append(captured[0].numpy())
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
    assert [layer.random_state.data.numpy()[2] for layer in layers] == [4, 4]


def make_trainer(device="cuda", seed=3, **settings):
    cycnn.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, CLASSES),
        nn.LogSoftmax(),
    ).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, nn.NLLLoss(), optimizer, **settings)


@pytest.mark.long
@pytest.mark.parametrize("fuse", (False, True), ids=("plain", "fused"))
def test_recorded_steps_end_with_the_same_bits(fuse):
    trainers = [make_trainer(capture=c, fuse=fuse) for c in (False, True)]
    histories = [trainer.fit(TRAIN, 2, 16, seed=5) for trainer in trainers]
    assert digest(trainers[0]) == digest(trainers[1])
    assert figures(histories[0]) == figures(histories[1])
    states = [t.model[2].random_state.data.numpy() for t in trainers]
    np.testing.assert_array_equal(*states)
    assert states[0][2] == 26


@pytest.mark.long
def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path):
    whole, first = make_trainer(), make_trainer()
    whole.fit(TRAIN, 3, 32, seed=5)
    first.fit(TRAIN, 1, 32, seed=5)
    first.save(tmp_path / "run")
    other = make_trainer(seed=4)
    resumed = Trainer.resume(tmp_path / "run", other.model, other.loss, other.optimizer)
    resumed.fit(TRAIN, 3, 32)
    assert digest(resumed) == digest(whole)


@pytest.mark.long
def test_both_devices_agree_over_an_epoch():
    states = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(device)
        trainer.fit(TRAIN, 1, 50, seed=5)
        states.append(trainer.model.state_dict())
    for name, array in states[0].items():
        np.testing.assert_allclose(
            states[1][name], array, rtol=2e-2, atol=2e-3, err_msg=name
        )


def test_a_layer_goes_on_where_it_was_when_it_moves():
    cycnn.manual_seed(2)
    stays = nn.Dropout().to("cpu")
    cycnn.manual_seed(2)
    moves = nn.Dropout().to("cpu")
    ones = np.ones((5, 7), np.float32)
    for device in ("cpu", "cuda", "cuda", "cpu"):
        want = stays(ones)
        assert_same_bits(moves.to(device)(Tensor(ones, device)), want)
