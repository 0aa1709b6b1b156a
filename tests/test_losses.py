"""Losses against the float64 reference, and which labels they refuse."""

import numpy as np
import pytest

from cycnn import devices, nn
from cycnn.errors import DataError, ShapeError
from cycnn.ops import reference
from cycnn.tensor import Tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


@pytest.fixture
def logits():
    return np.random.default_rng(1).standard_normal((6, 4), dtype=np.float32)


LABELS = np.array([0, 3, 1, 2, 2, 0])
LOSSES = [nn.NLLLoss, nn.CrossEntropyLoss]


def by_hand(kind, scores, labels):
    """Value in float64, written as the formula has it."""
    scores = np.asarray(scores, np.float64)
    if kind is nn.CrossEntropyLoss:
        scores = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return -sum(scores[n, label] for n, label in enumerate(labels)) / len(labels)


@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient(kind, logits):
    loss = kind()
    value = loss(Tensor(logits), Tensor(LABELS))
    assert isinstance(value, Tensor) and value.shape == ()
    assert float(value) == pytest.approx(by_hand(kind, logits, LABELS), rel=1e-6)
    gradient = loss.backward().numpy()
    step = 1e-6
    for i in range(logits.size):
        ends = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved.flat[i] += sign * step
            ends.append(by_hand(kind, moved, LABELS))
        assert gradient.flat[i] == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), abs=1e-6
        )


def test_cross_entropy_is_log_softmax_and_nll(logits):
    softmax, nll, fused = nn.LogSoftmax(), nn.NLLLoss(), nn.CrossEntropyLoss()
    apart = nll(softmax(logits), LABELS)
    assert float(fused(logits, LABELS)) == pytest.approx(float(apart), rel=1e-6)
    np.testing.assert_allclose(
        fused.backward().numpy(),
        softmax.backward(nll.backward()).numpy(),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "uint64"])
def test_labels_of_any_integer_kind_from_the_host(kind, dtype, logits):
    expected = float(kind()(logits, Tensor(LABELS)))
    assert float(kind()(logits, LABELS.astype(dtype))) == expected
    assert float(kind()(logits, LABELS.tolist())) == expected


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "labels, error, message",
    [
        ([0, 1, 2, 4, 0, -1], DataError, r"label 3 is 4, expected 0 to 3.*2 of 6"),
        ([0, 1, -1, 0, 0, 0], DataError, "label 2 is -1"),
        (np.array([2**40] * 6), DataError, "label 0 is 1099511627776"),
        (np.eye(4)[LABELS], ShapeError, "one-hot.*argmax"),
        (Tensor(np.eye(4)[LABELS], "cpu"), ShapeError, "one-hot.*argmax"),
        (np.zeros(6), TypeError, "labels are float64"),
        (np.zeros(6, bool), TypeError, "labels are bool"),
        (Tensor(np.zeros(6), "cpu"), TypeError, "labels are float32"),
        (Tensor(LABELS.astype(np.uint8), "cpu"), TypeError, "labels are uint8"),
        (LABELS[:5], ShapeError, r"\(6, 4\).*\(5,\)"),
        (Tensor(LABELS[:5], "cpu"), ShapeError, r"\(6, 4\).*\(5,\)"),
        (Tensor([0, 1, 2, 9, 0, 1], "cpu"), DataError, "9"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_labels_that_are_refused(kind, labels, error, message, logits):
    with pytest.raises(error, match=message):
        kind()(logits, labels)


@pytest.mark.parametrize("kind", LOSSES)
def test_scores_that_are_refused(kind):
    with pytest.raises(ShapeError, match=r"\(4,\).*expected \(N, classes\)"):
        kind()(np.zeros(4), np.zeros(4, int))
    with pytest.raises(TypeError, match="int32, expected float32"):
        kind()(Tensor(np.zeros((2, 3), int)), [0, 1])


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_batch(kind):
    loss = kind()
    assert np.isnan(float(loss(np.zeros((0, 4)), [])))
    assert loss.backward().shape == (0, 4)


@pytest.mark.parametrize("kind", LOSSES)
def test_each_backward_needs_its_call(kind, logits):
    loss = kind()
    with pytest.raises(RuntimeError, match="backward without a forward"):
        loss.backward()
    loss(logits, LABELS)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward without a forward"):
        loss.backward()


def test_the_mean_is_over_the_batch_at_hand(logits):
    loss = nn.NLLLoss()
    loss(logits[:2], LABELS[:2])
    gradient = loss.backward().numpy()
    assert sorted(set(gradient.ravel().tolist())) == [-0.5, 0]
    np.testing.assert_array_equal(
        gradient, reference.nll_loss_backward(logits[:2], LABELS[:2])
    )
