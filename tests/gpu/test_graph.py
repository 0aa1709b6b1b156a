"""CUDA graphs: recorded once, replayed with the same bits."""

import gc
import threading

import numpy as np
import pytest
from training import digest, figures, make_trainer, patterns

import cycnn
from cycnn import data, nn, optim
from cycnn.data import window
from cycnn.errors import CudaError
from cycnn.gpu import memory
from cycnn.gpu.graph import Graph
from cycnn.ops import cuda as ops

pytestmark = pytest.mark.gpu

TRAIN = patterns(200)
TEST = patterns(70, seed=9)


@pytest.fixture(autouse=True)
def nothing_left():
    gc.collect()
    before = memory.stats()["live_bytes"]
    yield
    gc.collect()
    assert memory.stats()["live_bytes"] == before


def test_a_replay_reads_what_is_there_now():
    x = cycnn.Tensor(np.arange(-3.0, 4), "cuda")
    total = cycnn.zeros(7, device="cuda")

    def step():
        ops.add(ops.relu_forward(x), total, total)

    graph = Graph(0, keep=(x, total))
    graph.rehearse(step)
    graph.record(step)
    assert graph.nodes == 2
    expected = np.maximum(x.numpy(), 0)
    np.testing.assert_array_equal(total.numpy(), expected, "recording runs nothing")
    x.copy_(np.arange(7.0))
    for _ in range(3):
        graph.launch()
    np.testing.assert_array_equal(total.numpy(), expected + 3 * np.arange(7.0))


def test_memory_of_a_graph_stays_its_own():
    x = cycnn.Tensor(np.arange(1000.0), "cuda")
    graph = Graph(0)

    def double_twice():
        y = cycnn.empty(1000, device="cuda")
        ops.add(x, x, y)
        z = cycnn.empty(1000, device="cuda")
        ops.add(y, y, z)
        return z

    graph.rehearse(double_twice)
    result = graph.record(double_twice)
    others = [cycnn.zeros(1000, device="cuda").fill_(i) for i in range(8)]
    graph.launch()
    np.testing.assert_array_equal(result.numpy(), 4 * np.arange(1000.0))
    for i, other in enumerate(others):
        assert (other.numpy() == i).all()


def test_what_dies_while_recording_is_freed_afterwards():
    x = cycnn.zeros(100, device="cuda")
    held = [cycnn.zeros(1 << 20, device="cuda") for _ in range(3)]
    graph = Graph(0)
    graph.rehearse(lambda: ops.relu_forward(x))

    def step():
        held.clear()
        return ops.relu_forward(x)

    live = memory.stats()["live_bytes"]
    result = graph.record(step)
    assert memory.stats()["live_bytes"] == live - 3 * (4 << 20)
    graph.launch()
    assert not result.numpy().any()


@pytest.mark.no_sanitizer
def test_what_cannot_be_recorded_leaves_the_stream_usable():
    x = cycnn.Tensor([1.0, -1.0], "cuda")
    graph = Graph(0)
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        graph.launch()
    graph.rehearse(lambda: ops.relu_forward(x))
    with pytest.raises(CudaError):
        graph.record(lambda: ops.relu_forward(x).numpy())
    np.testing.assert_array_equal(ops.relu_forward(x).numpy(), [1, 0])
    with pytest.raises(CudaError, match="rehearsal did not"):
        graph.record(lambda: cycnn.empty(12345, device="cuda"))
    with pytest.raises(ZeroDivisionError):
        graph.record(lambda: 1 / 0)
    kept = graph.record(lambda: ops.relu_forward(x))
    graph.launch()
    np.testing.assert_array_equal(kept.numpy(), [1, 0])
    with pytest.raises(RuntimeError, match="recorded already"):
        graph.record(lambda: ops.relu_forward(x))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("schedule", [None, optim.schedules.linear()])
def test_captured_training_equals_eager_training(precision, schedule):
    cycnn.set_precision(precision)
    try:
        trainers = [make_trainer(schedule, device="cuda") for _ in range(2)]
        histories = []
        for trainer, capture in zip(trainers, (False, True)):
            trainer.capture = capture
            histories.append(figures(trainer.fit(TRAIN, 3, 32, seed=5, test=TEST)))
    finally:
        cycnn.set_precision("fp32")
    assert histories[0] == histories[1]
    assert digest(trainers[0]) == digest(trainers[1])


@pytest.mark.long
def test_the_reference_network_captured():
    train = patterns(300, side=28, classes=10)
    digests = []
    for capture in (False, True):
        cycnn.manual_seed(0)
        model = nn.reference_network().to("cuda")
        optimizer = optim.RMSprop(
            model.parameters(), lr=0.001, initial_accumulator=1e-3
        )
        trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture)
        trainer.fit(train, 2, 128, seed=1)
        digests.append(digest(trainer))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("count", [1, 5])
def test_captured_predictions_equal_eager_ones(precision, count):
    """Short enough for racecheck; test_inference_gpu.py has the others."""
    cycnn.manual_seed(0)
    model = nn.reference_network().to("cuda")
    rng = np.random.default_rng(count)
    given = rng.standard_normal((2, count, 1, 28, 28), dtype=np.float32)
    together = nn.fuse(model.eval())
    wanted = [together(cycnn.Tensor(x, "cuda")).numpy() for x in given]
    # run, recorded and replayed, of an array and of a tensor
    for i in (0, 1, 0):
        np.testing.assert_array_equal(model.predict(given[i]), wanted[i])
        found = model.predict(cycnn.Tensor(given[i], "cuda"))
        np.testing.assert_array_equal(found.numpy(), wanted[i])


@pytest.fixture
def nothing_fits(monkeypatch):
    """Sets stream, through slots of a few batches each."""
    monkeypatch.setattr(data.DataLoader, "resident", lambda self: None)
    monkeypatch.setattr(window, "_SLOT_BYTES", 2 * 32 * 40)


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.long), 32, 150, 1000]
)
@pytest.mark.parametrize("capture", [False, True])
def test_a_set_that_streams_trains_as_one_that_stays(batch_size, capture, request):
    digests = []
    for streams in (False, True):
        if streams:
            request.getfixturevalue("nothing_fits")
        trainer = make_trainer(device="cuda")
        trainer.capture = capture
        trainer.fit(TRAIN, 2, batch_size, seed=5)
        digests.append(digest(trainer))
    assert digests[0] == digests[1]


def test_a_streamed_epoch_goes_on_where_it_was_interrupted(nothing_fits):
    class Stop:
        left = 0

        def on_step_end(self, trainer):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    whole, broken, stop = (
        make_trainer(device="cuda"),
        make_trainer(device="cuda"),
        Stop(),
    )
    whole.fit(TRAIN, 2, 32, seed=5)
    for stop.left in (1, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            broken.fit(TRAIN, 2, 32, seed=5, callbacks=[stop])
    broken.fit(TRAIN, 2, 32, seed=5)
    assert digest(broken) == digest(whole)
    assert not [t for t in threading.enumerate() if t.name == "cycnn-window"]


def test_what_fails_while_streaming_is_raised(nothing_fits, monkeypatch):
    trainer = make_trainer(device="cuda")

    def fail(*args, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "take", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(TRAIN, 1, 32, seed=5)
    monkeypatch.undo()
    trainer.fit(TRAIN, 1, 32, seed=5)
