"""Predictions: the numbers of a forward pass, and nothing else changes."""

import copy
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import cycnn
from cycnn import nn, tensor


def make_model():
    cycnn.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 5), nn.Sigmoid(),
    ).to("cpu")  # fmt: skip


def images(count, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 1, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 128])
def test_the_output_is_that_of_forward(count):
    model, x = make_model(), images(count)
    expected = model(x).numpy()
    for given in (x, x.tolist(), x.astype(np.float64), np.asfortranarray(x)):
        found = model.predict(given)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)
    found = model.predict(cycnn.Tensor(x, "cpu"))
    assert isinstance(found, cycnn.Tensor)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_many_images_run_in_parts():
    class Sizes(nn.Layer):
        seen = ()

        def forward(self, x):
            self.seen += (len(x),)
            return x

    counter = Sizes()
    model = nn.Sequential(*make_model(), counter)
    x = images(23)
    found = model.predict(x, batch_size=10)
    assert counter.seen == (10, 10, 3)
    parts = [model(x[start : start + 10]).numpy() for start in (0, 10, 20)]
    np.testing.assert_array_equal(found, np.concatenate(parts))
    np.testing.assert_array_equal(
        model.predict(cycnn.Tensor(x, "cpu"), batch_size=10).numpy(), found
    )
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        model.predict(x, batch_size=0)


def test_no_images():
    assert make_model().predict(images(0)).shape == (0, 5)


def test_a_model_without_parameters():
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).to("cpu")
    x = images(3)
    np.testing.assert_array_equal(model.predict(x), np.maximum(x.reshape(3, -1), 0))


def test_backward_finds_what_the_last_forward_left():
    model, other = make_model(), make_model()
    x, dy = images(4), np.ones((4, 5), np.float32)
    for each in (model, other):
        each(x)
    model.predict(images(9, seed=2))
    dx = [each.backward(dy).numpy() for each in (model, other)]
    np.testing.assert_array_equal(*dx)
    for mine, its in zip(model.parameters(), other.parameters()):
        np.testing.assert_array_equal(mine.grad.numpy(), its.grad.numpy())
    model.predict(x)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        model.backward(dy)


def test_the_mode_of_each_layer_stays():
    class Watch(nn.Layer):
        def forward(self, x):
            seen.append(self.training)
            if x.shape[0] == 2:
                raise ZeroDivisionError
            return x

    seen = []
    model = nn.Sequential(Watch(), *make_model(), Watch())
    model[-1].eval()
    model.predict(images(3))
    with pytest.raises(ZeroDivisionError):
        model.predict(images(2))
    assert seen == [False] * 3
    assert [layer.training for layer in model] == [True] * 7 + [False]
    assert model.training


@pytest.mark.parametrize(
    "given, error, words",
    [
        (np.zeros((2, 1, 6, 6), np.uint8), TypeError, "holds uint8, expected floating"),
        (np.zeros((2, 1, 6, 6), int), TypeError, "holds int64, expected floating"),
        (np.zeros((2, 3, 6, 6), np.float32), cycnn.ShapeError, "3"),
        (np.float32(1), cycnn.ShapeError, "shape"),
        (np.zeros((2, 1, 2, 2), np.float32), cycnn.ShapeError, "Conv2d"),
    ],
)
def test_bad_input_is_refused_as_by_forward(given, error, words):
    with pytest.raises(error, match=words):
        make_model().predict(given)
    with pytest.raises(error):
        make_model()(given)


def test_a_tensor_of_bytes_is_refused():
    with pytest.raises(TypeError, match="uint8, expected float32"):
        make_model().predict(cycnn.Tensor(np.zeros((2, 1, 6, 6), np.uint8), "cpu"))


def test_a_model_with_a_forward_of_its_own_is_asked():
    class Doubled(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return cycnn.Tensor(2 * y.numpy(), y.device)

    plain = make_model()
    model = Doubled(*plain)
    assert nn.fuse(model) is model
    x = images(3)
    np.testing.assert_array_equal(model.predict(x), 2 * plain.predict(x))
    for fused in (False, True):
        found = nn.Predictor(model, fused)(x)
        np.testing.assert_array_equal(found, 2 * plain.predict(x))


def test_the_model_is_not_kept_alive():
    model = make_model()
    model.predict(images(2))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_copy_predicts_for_itself():
    model, x = make_model(), images(3)
    before = model.predict(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other[0].bias.data.fill_(1)
        assert (other.predict(x) != before).any()
    np.testing.assert_array_equal(model.predict(x), before)
    model.release()
    np.testing.assert_array_equal(model.predict(x), before)


def test_threads_take_turns():
    models = [make_model(), make_model()[:4]]
    x = images(40)
    expected = [model.predict(x) for model in models]
    wrong = []

    def ask(model, answer):
        for _ in range(20):
            if not np.array_equal(model.predict(x), answer):
                wrong.append(model)

    threads = [
        threading.Thread(target=ask, args=pair) for pair in [*zip(models, expected)] * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What is replayed, with a stand-in that runs it again: a CPU has no graphs


class Rerun:
    """A Graph that runs its function again, into the tensor of the first time."""

    made = ()

    def __init__(self, device_index):
        self.launches = 0
        self.rehearsed = self.function = None
        self.made.append(self)

    def rehearse(self, function):
        assert self.rehearsed is None
        made = function()
        self.rehearsed = weakref.ref(made)
        return made

    def record(self, function):
        assert self.rehearsed() is None, "a graph's memory is still in use"
        self.function, self.y = function, function()
        self.y.copy_(np.full(self.y.shape, np.nan))  # recording runs nothing
        return self.y

    def launch(self):
        self.launches += 1
        self.y.copy_(self.function())


@pytest.fixture
def replaying(monkeypatch):
    """A function that makes a Predictor believe that its model is on a GPU."""
    pytest.importorskip("cycnn.gpu.graph")
    from cycnn.gpu import graph
    from cycnn.nn import inference
    from cycnn.ops import cpu

    gpu = SimpleNamespace(compute=SimpleNamespace(synchronize=lambda: None))

    def shared(shape, dtype, device):
        array = np.full(shape, np.nan, dtype)
        return tensor.from_array(array), array

    monkeypatch.setattr(graph, "Graph", Rerun)
    monkeypatch.setattr(Rerun, "made", [])
    monkeypatch.setattr(inference, "_pinned", shared)
    monkeypatch.setattr(
        inference, "_uploaded",
        lambda x, cuts, *given: (cycnn.Tensor(x[i : i + cuts.step]) for i in cuts),
    )  # fmt: skip
    monkeypatch.setattr(cpu, "copy", lambda x, out: out.copy_(x), raising=False)
    monkeypatch.setattr(cycnn.devices, "_default", cycnn.devices.CPU)

    class OnGpu(nn.Predictor):
        def _renew(self):
            super()._renew()
            self._captured = True
            self._gpu, self._get_gpu = gpu, lambda index: gpu

    return OnGpu


@pytest.mark.parametrize("few", [0, 1 << 14])
@pytest.mark.parametrize("fused", [False, True])
def test_passes_are_run_then_recorded_then_replayed(few, fused, replaying, monkeypatch):
    monkeypatch.setattr("cycnn.nn.inference._FEW", few)
    model = make_model()
    predict = replaying(model, fused)
    for seed in range(5):
        x = images(3, seed)
        found = predict(x)
        np.testing.assert_array_equal(found, model(x).numpy())
        np.testing.assert_array_equal(predict(cycnn.Tensor(x)).numpy(), found)
    counts = [each.launches for each in Rerun.made]
    # arrays and tensors have passes of their own only where arrays are read in place
    assert counts == ([9] if few == 0 else [4, 4])


def test_parts_are_replayed(replaying):
    model, x = make_model(), images(70)
    predict = replaying(model)
    expected = np.concatenate([model(x[i : i + 20]).numpy() for i in (0, 20, 40, 60)])
    for given in (x, cycnn.Tensor(x)):
        np.testing.assert_array_equal(np.asarray(predict(given, 20)), expected)
    assert [each.launches for each in Rerun.made] == [5, 1]


def test_passes_follow_the_model(replaying):
    model, other, x = make_model(), make_model(), images(2)
    predict = replaying(model)
    before = [predict(x) for _ in range(3)][-1]
    model[0].bias.data.fill_(0.5)
    other[0].bias.data.fill_(0.5)
    np.testing.assert_array_equal(predict(x), other(x).numpy())
    assert len(Rerun.made) == 1, "parameters are read where they are"
    whole = nn.Sequential(*model, nn.Linear(5, 2).to("cpu"))  # moves the parameters
    whole[0].bias.data.copy_(make_model()[0].bias.data)
    np.testing.assert_array_equal(predict(x), before)
    assert len(Rerun.made) == 2
    cycnn.set_precision("tf32")
    try:
        np.testing.assert_array_equal(predict(x), before)
    finally:
        cycnn.set_precision("fp32")
    np.testing.assert_array_equal(predict(x), before)
    assert len(Rerun.made) == 4
    model[0].weight = nn.Parameter(np.zeros((4, 1, 3, 3)), device="cpu")
    predict.release()
    np.testing.assert_array_equal(predict(x), model(x).numpy())


def test_only_few_shapes_are_kept(replaying):
    model = make_model()
    predict = replaying(model)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 1):
        predict(images(count))
    assert [each.launches for each in Rerun.made[:2]] == [2, 0]
    predict(images(2))
    assert len(Rerun.made) == 10, "2 was not used for longest, and went"


def test_what_cannot_be_recorded_is_run(replaying, monkeypatch, caplog):
    def refuse(self, function):
        function()
        raise cycnn.CudaError("no results on the host", 900, "name", "call")

    monkeypatch.setattr(Rerun, "record", refuse)
    model = make_model()
    predict = replaying(model)
    for seed in range(4):
        x = images(2, seed)
        np.testing.assert_array_equal(predict(x), model(x).numpy())
    assert caplog.text.count("without a CUDA graph: no results on the host") == 1
