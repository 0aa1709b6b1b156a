"""A residual network with batch normalisation and dropout on a GPU, as a whole."""

import numpy as np
import pytest
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import Trainer, nn, optim

pytestmark = [pytest.mark.gpu, pytest.mark.long]

TRAIN, TEST = patterns(200), patterns(60, seed=1)  # the last batch is a smaller one

# Of scores, between ways that round at other places.
ROUNDING = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 6e-2}


def convolution(inputs, outputs, size=3, stride=1):
    padding = size // 2
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def block(inputs, outputs, stride=1):
    body = nn.Sequential(
        *convolution(inputs, outputs, 3, stride),
        nn.ReLU(),
        nn.Dropout(0.1),
        *convolution(outputs, outputs),
    )
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(*convolution(inputs, outputs, 1, stride))
    return [nn.Residual(body, shortcut), nn.ReLU()]


def make_trainer(**settings):
    cycnn.manual_seed(3)
    model = nn.Sequential(
        *convolution(1, 8),
        nn.ReLU(),
        *block(8, 8),
        *block(8, 16, 2),
        *block(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, CLASSES),
        nn.LogSoftmax(),
    ).to("cuda")
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return Trainer(model, nn.NLLLoss(), optimizer, optim.schedules.linear(), **settings)


def trained(**settings):
    trainer = make_trainer(**settings)
    history = trainer.fit(TRAIN, 2, 32, seed=5, test=TEST)
    return digest(trainer), figures(history)


def test_recorded_steps_end_with_the_bits_of_eager_ones(precision):
    assert trained(capture=True, fuse=False) == trained(capture=False, fuse=False)


def test_two_fused_runs_end_with_the_same_bits(precision):
    assert trained(capture=True, fuse=True) == trained(capture=True, fuse=True)


@pytest.mark.parametrize("settings", [{}, {"capture": False, "fuse": False}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, settings, precision):
    whole, first = make_trainer(**settings), make_trainer(**settings)
    histories = [whole.fit(TRAIN, 3, 32, seed=5, test=TEST)]

    def interrupt(_, record):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(TRAIN, 3, 32, seed=5, test=TEST, callbacks=[interrupt])
    first.save(tmp_path / "run")
    other = make_trainer(**settings)
    cycnn.manual_seed(99)  # the run brings its own
    resumed = Trainer.resume(
        tmp_path / "run",
        other.model,
        other.loss,
        other.optimizer,
        other.schedule,
        **settings,
    )
    histories.append(resumed.fit(TRAIN, 3, 32, test=TEST))
    assert digest(resumed) == digest(whole)
    assert figures(histories[1])[-1] == figures(histories[0])[-1]


def test_it_learns(precision):
    trainer = make_trainer()
    trainer.fit(TRAIN, 12, 32, seed=5)
    assert trainer.evaluate(TEST)["accuracy"] > 0.8


def test_predictions_are_those_of_the_eager_forward(precision):
    trainer = make_trainer()
    trainer.fit(TRAIN, 2, 32, seed=5)
    model = trainer.model
    for count in 1, 33:
        x = TEST.images[:count] * np.float32(1 / 127) - np.float32(128 / 127)
        found = [model.predict(x) for _ in range(3)]  # eager, recorded, replayed
        np.testing.assert_array_equal(found[0], nn.fuse(model.eval())(x).numpy())
        for again in found[1:]:
            np.testing.assert_array_equal(again, found[0])
        # layer by layer it rounds at other places
        bound = ROUNDING[precision]
        np.testing.assert_allclose(found[0], model(x).numpy(), rtol=bound, atol=bound)
        model.train()


def test_a_folded_model_predicts_the_same(precision):
    trainer = make_trainer()
    trainer.fit(TRAIN, 2, 32, seed=5)
    folded = nn.fold_batch_norm(trainer.model)
    assert not [name for name in folded.state_dict() if "running" in name]
    x = TEST.images[:33] * np.float32(1 / 127) - np.float32(128 / 127)
    want, bound = trainer.model.predict(x), ROUNDING[precision]
    for _ in range(3):
        np.testing.assert_allclose(folded.predict(x), want, rtol=bound, atol=bound)
