"""Predictions as CUDA graphs: the bits of the fused forward pass, of what is there now."""

import gc
import threading

import numpy as np
import pytest
from training import make_trainer, patterns

import cycnn
from cycnn import nn, optim
from cycnn.gpu import memory
from cycnn.nn import inference

pytestmark = [pytest.mark.gpu, pytest.mark.long]


@pytest.fixture(autouse=True)
def nothing_left():
    gc.collect()
    before = memory.stats()["live_bytes"]
    yield
    gc.collect()
    assert memory.stats()["live_bytes"] == before


def make_model(seed=0):
    cycnn.manual_seed(seed)
    return nn.reference_network().to("cuda")


def images(count, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 1, 28, 28)).astype(np.float32)


def eager(model, x):
    return nn.fuse(model)(cycnn.Tensor(x, "cuda")).numpy()


@pytest.mark.parametrize("count", [1, 3, 128, 300])
def test_the_bits_are_those_of_the_fused_layers(count, precision):
    model = make_model()
    for seed in range(4):  # run, recorded, replayed, replayed
        x = images(count, seed)
        expected = eager(model, x)
        np.testing.assert_array_equal(model.predict(x), expected)
        found = model.predict(cycnn.Tensor(x, "cuda"))
        assert found.device == model.device
        np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(model.predict(x.astype(np.float64)), expected)


@pytest.mark.parametrize("on_device", [False, True])
def test_many_images_run_in_parts(on_device):
    model, x = make_model(), images(700)
    given = cycnn.Tensor(x, "cuda") if on_device else x
    parts = [eager(model, x[start : start + 150]) for start in range(0, 700, 150)]
    for _ in range(3):
        found = np.asarray(model.predict(given, batch_size=150))
        np.testing.assert_array_equal(found, np.concatenate(parts))


def test_layers_without_fused_kernels():
    cycnn.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, dilation=2, padding=2), nn.Sigmoid(), nn.MaxPool2d(3, 2),
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=3), nn.ReLU()),
        nn.Flatten(), nn.Linear(6 * 3 * 3, 7),
    ).to("cuda")  # fmt: skip
    rng = np.random.default_rng(0)
    for count in (1, 5, 400):
        for _ in range(3):
            x = rng.standard_normal((count, 2, 12, 12)).astype(np.float32)
            np.testing.assert_array_equal(model.predict(x), eager(model, x))
            unfused = nn.Predictor(model, fused=False)
            for _ in range(3):
                np.testing.assert_array_equal(unfused(x), model(x).numpy())


def test_new_parameters_are_used():
    model, other = make_model(0), make_model(1)
    trainer = cycnn.Trainer(
        model, nn.NLLLoss(), optim.RMSprop(model.parameters(), lr=0.001)
    )
    x = images(5)
    expected = [eager(m, x) for m in (model, other)]
    for _ in range(3):
        np.testing.assert_array_equal(model.predict(x), expected[0])
    model.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(model.predict(x), expected[1])
    for epochs in (1, 2):
        trainer.fit(patterns(200, side=28, classes=10), epochs, 64, seed=1)
        found = model.predict(x)
        assert not np.array_equal(found, expected[1])
        np.testing.assert_array_equal(found, eager(model, x))


def test_another_precision_and_another_device():
    model = make_model()
    for count in (1, 40):
        x = images(count)
        for precision in ("fp32", "tf32", "fp32", "bf16"):
            cycnn.set_precision(precision)
            try:
                for _ in range(3):
                    np.testing.assert_array_equal(model.predict(x), eager(model, x))
            finally:
                cycnn.set_precision("fp32")
        on_gpu = model.predict(x)
        model.to("cpu")
        np.testing.assert_allclose(model.predict(x), on_gpu, atol=1e-4)
        model.to("cuda")
        for _ in range(3):
            np.testing.assert_array_equal(model.predict(x), on_gpu)


def test_parameters_that_are_packed_elsewhere():
    model, x = make_model(), images(2)
    expected = [model.predict(x) for _ in range(3)][-1]
    head = nn.Linear(10, 10).to("cuda")
    whole = nn.Sequential(*model, head)  # moves the parameters into one slab
    np.testing.assert_array_equal(model.predict(x), expected)
    np.testing.assert_array_equal(whole.predict(x), eager(whole, x))


def test_two_models_in_turn():
    models = [make_model(0), make_model(1)]
    for seed in range(4):
        x = images(3, seed)
        for model in models:
            np.testing.assert_array_equal(model.predict(x), eager(model, x))


def test_results_stay():
    model = make_model()
    given = [images(2, seed) for seed in range(5)]
    arrays = [model.predict(x) for x in given]
    tensors = [model.predict(cycnn.Tensor(x, "cuda")) for x in given]
    for x, array, tensor in zip(given, arrays, tensors):
        np.testing.assert_array_equal(array, eager(model, x))
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_bad_input_is_refused_at_every_call():
    model, x = make_model(), images(2)
    for _ in range(4):
        model.predict(x)
        with pytest.raises(TypeError, match="holds uint8, expected floating"):
            model.predict(x.astype(np.uint8))
        with pytest.raises(TypeError, match="uint8, expected float32"):
            model.predict(cycnn.Tensor(x.astype(np.uint8), "cuda"))
        with pytest.raises(TypeError, match="its input on cpu"):
            model.predict(cycnn.Tensor(x, "cpu"))
        with pytest.raises(cycnn.ShapeError, match="Conv2d"):
            model.predict(np.zeros((2, 3, 28, 28), np.float32))
    assert model.predict(x[:0]).shape == (0, 10)


def test_backward_finds_what_the_last_forward_left():
    model, other = make_model(), make_model()
    x, dy = images(4), np.ones((4, 10), np.float32)
    for each in (model, other):
        each(x)
    for _ in range(3):
        model.predict(images(4, seed=2))
    model.backward(dy, input_grad=False)
    other.backward(dy, input_grad=False)
    for mine, its in zip(model.parameters(), other.parameters()):
        np.testing.assert_array_equal(mine.grad.numpy(), its.grad.numpy())


class Curious(nn.Layer):
    """Reads a result on the host, which cannot be recorded."""

    def forward(self, x):
        return cycnn.Tensor(x.numpy() + 1, x.device)


@pytest.mark.no_sanitizer
def test_what_cannot_be_recorded_runs_without_a_graph(caplog):
    plain = make_model()
    model = nn.Sequential(*plain, Curious())
    for count in (1, 100):
        for seed in range(4):
            x = images(count, seed)
            np.testing.assert_array_equal(model.predict(x), plain.predict(x) + 1)
    assert caplog.text.count("without a CUDA graph") == 2


def test_few_shapes_are_kept():
    model = make_model()
    expected = {}
    for _ in range(3):
        for count in range(1, 2 * inference._SHAPES):
            x = images(count)
            found = model.predict(x)
            np.testing.assert_array_equal(found, expected.setdefault(count, found))
    assert len(model._predictor._passes) == inference._SHAPES


def test_memory_goes_with_the_model_and_by_release():
    model, x = make_model(), images(256)
    before = memory.stats()["live_bytes"]
    for _ in range(3):
        first = model.predict(x)
    assert memory.stats()["live_bytes"] > before + 256 * 32 * 12 * 12 * 4
    model.release()
    assert memory.stats()["live_bytes"] == before
    np.testing.assert_array_equal(model.predict(x), first)
    gc.disable()
    try:
        del model
        assert memory.stats()["live_bytes"] < before
    finally:
        gc.enable()


def test_after_a_shutdown(run_python):
    run_python("""
import numpy as np, cycnn
from cycnn import nn
model = nn.reference_network().to("cuda")
x = np.ones((2, 1, 28, 28), np.float32)
before = [model.predict(x) for _ in range(3)]
cycnn.shutdown()
for _ in range(3):
    np.testing.assert_array_equal(model.predict(x), before[0])
""")


@pytest.mark.no_sanitizer
def test_threads_take_turns():
    models = [make_model(0), make_model(1)]
    given = [images(count) for count in (4, 1, 100)]
    wrong = []

    def ask(model, answers):
        for x, answer in [*zip(given, answers)] * 10:
            if not np.array_equal(model.predict(x), answer):
                wrong.append(len(x))

    threads = [
        threading.Thread(target=ask, args=(model, [eager(model, x) for x in given]))
        for model in models * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_trainer_predicts_with_them():
    test = patterns(130, seed=9)
    scaled = (test.images * test.scale + test.shift).astype(np.float32)
    results = []
    for capture in (False, None):
        trainer = make_trainer(device="cuda")
        trainer.capture = capture
        trainer.fit(patterns(200), 2, 32, seed=5)
        for _ in range(3):
            found = [
                trainer.evaluate(test),
                trainer.predict(test),
                trainer.predict_proba(test),
            ]
            for given in (scaled, cycnn.Tensor(scaled, "cpu")):
                found += [trainer.predict(given), trainer.predict_proba(given)]
        results.append(found)
    for eagerly, replayed in zip(*results):
        if isinstance(eagerly, dict):
            assert eagerly == replayed
        else:
            assert eagerly.dtype == replayed.dtype
            np.testing.assert_array_equal(eagerly, replayed)
    with pytest.raises(TypeError, match="uint8, expected float32"):
        trainer.predict(test.images)
