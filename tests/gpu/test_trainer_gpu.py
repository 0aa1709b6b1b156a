"""Training on a GPU: close to the CPU, the same bits every time, also when resumed."""

import signal

import numpy as np
import pytest
from training import digest, figures, make_trainer, patterns

import cycnn
from cycnn import Trainer, data, nn, optim
from cycnn.errors import DataError

pytestmark = pytest.mark.gpu

TRAIN = patterns(500)
TEST = patterns(100, seed=9)


def fit(trainer, epochs=2, **options):
    return trainer.fit(TRAIN, epochs, 32, seed=5, test=TEST, **options)


@pytest.mark.long
def test_the_gpu_trains_as_the_cpu_does():
    histories = [fit(make_trainer(device=device)) for device in ("cpu", "cuda")]
    for name in ("loss", "test_loss"):
        assert histories[1][name] == pytest.approx(histories[0][name], rel=1e-3)
    # an image or two may lie on the edge between two classes
    for name in ("accuracy", "test_accuracy"):
        assert histories[1][name] == pytest.approx(histories[0][name], abs=0.01)


@pytest.mark.long
def test_the_reference_network_trains_as_on_the_cpu():
    # one epoch of four batches; later the paths part by rounding alone
    train = patterns(500, side=28, classes=10)
    losses = []
    for device in ("cpu", "cuda"):
        cycnn.manual_seed(0)
        model = nn.reference_network().to(device)
        optimizer = optim.RMSprop(
            model.parameters(), lr=0.001, initial_accumulator=1e-3
        )
        trainer = Trainer(model, nn.NLLLoss(), optimizer)
        losses.append(trainer.fit(train, 1, 128, seed=1)[0].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.long
def test_two_runs_have_the_same_bits():
    trainers = [make_trainer(device="cuda") for _ in range(2)]
    histories = [figures(fit(trainer)) for trainer in trainers]
    assert digest(trainers[0]) == digest(trainers[1])
    assert histories[0] == histories[1]


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    path = tmp_path / "run"
    whole = make_trainer(device="cuda")
    fit(whole)

    class Stop:
        def on_step_end(self, trainer):
            if trainer.epoch * 16 + trainer.step == 20:
                trainer.save(path)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(device="cuda"), callbacks=[Stop()])
    fresh = make_trainer(device="cuda")
    resumed = Trainer.resume(
        path, fresh.model, fresh.loss, fresh.optimizer, fresh.schedule
    )
    assert (resumed.epoch, resumed.step) == (1, 4)
    history = fit(resumed)
    assert digest(resumed) == digest(whole)
    assert figures(history) == figures(whole.history)


@pytest.mark.long
def test_an_interrupted_run_goes_on_on_another_device():
    class Stop:
        def on_step_end(self, trainer):
            if trainer.step == 5:
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(device="cuda")
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, callbacks=[Stop()])
    trainer.model.to("cpu")
    history = fit(trainer)
    expected = fit(make_trainer(device="cuda"))
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.long
def test_predictions():
    trainer = make_trainer(device="cuda")
    fit(trainer)
    probabilities = trainer.predict_proba(TEST)
    np.testing.assert_array_equal(probabilities.argmax(1), trainer.predict(TEST))
    trainer.model.to("cpu")
    np.testing.assert_allclose(
        trainer.predict_proba(TEST), probabilities, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("capture", [False, True])
def test_labels_without_a_score_are_refused_before_anything_changes(capture):
    wrong = data.ArrayDataset(TRAIN.images, TRAIN.labels + 3, TRAIN.scale, TRAIN.shift)
    trainer = make_trainer(device="cuda")
    trainer.capture = capture
    before = digest(trainer)
    with pytest.raises(DataError, match="labels up to 6, .* gives 4 scores"):
        trainer.fit(wrong, 1, 32, seed=5)
    assert digest(trainer) == before
    with pytest.raises(DataError, match="labels up to 6"):
        trainer.evaluate(wrong)
    fit(trainer)
    assert np.isfinite(trainer.history["loss"]).all()
