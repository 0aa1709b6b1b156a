"""Losses of numbers and options of the losses of classes: torch and float64 agree."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycnn import devices, nn
from cycnn.errors import DataError, ShapeError
from cycnn.ops import reference
from cycnn.tensor import Tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def slope(function, x, step=1e-6):
    """Gradient of function(x) by finite differences, in float64."""
    found = np.zeros(x.shape)
    for i in range(x.size):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved.flat[i] += sign * step
            ends.append(float(function(moved)))
        found.flat[i] = (ends[0] - ends[1]) / (2 * step)
    return found


# the specification: gradients by finite differences

WEIGHT = np.array([0.5, 2.0, 0.25, 1.0])


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(
    "name, more",
    [
        ("mse_loss", ()),
        ("smooth_l1_loss", (0.0,)),
        ("smooth_l1_loss", (0.7,)),
        ("bce_with_logits", (None,)),
        ("bce_with_logits", (WEIGHT,)),
    ],
)
def test_gradients_of_the_specification(name, more, mean):
    rng = np.random.default_rng(3)
    x, target = rng.standard_normal((2, 3, 4)), rng.random((2, 3, 4))
    forward = getattr(reference, f"{name}_forward")
    backward = getattr(reference, f"{name}_backward")
    np.testing.assert_allclose(
        backward(x, target, *more, mean),
        slope(lambda x: forward(x, target, *more, mean), x),
        atol=1e-7,
    )


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [None, 2, -100])
def test_gradients_of_the_specification_of_classes(
    mean, weight, smoothing, ignore_index
):
    rng = np.random.default_rng(4)
    x, labels = rng.standard_normal((5, 4)), np.array([0, 2, 3, 1, 2])
    if ignore_index == -100:
        labels[3] = -100
    options = weight, smoothing, ignore_index
    total = reference.weighted_nll_loss_forward(x, labels, *options, mean)[1]
    np.testing.assert_allclose(
        reference.weighted_nll_loss_backward(x, labels, *options, total),
        slope(
            lambda x: reference.weighted_nll_loss_forward(x, labels, *options, mean)[0],
            x,
        ),
        atol=1e-7,
    )
    log_probs = reference.log_softmax_forward(x)
    np.testing.assert_allclose(
        reference.weighted_cross_entropy_backward(log_probs, labels, *options, total),
        slope(
            lambda x: reference.weighted_cross_entropy_forward(
                x, labels, *options, mean
            )[0],
            x,
        ),
        atol=1e-7,
    )


def test_options_at_their_defaults_are_the_plain_loss():
    rng = np.random.default_rng(5)
    x, labels = rng.standard_normal((6, 4)), rng.integers(0, 4, 6)
    loss, _, _ = reference.weighted_cross_entropy_forward(x, labels, None, 0, None, 1)
    assert loss == pytest.approx(reference.cross_entropy_forward(x, labels)[0])


# the layers: against the specification, and against torch

SHAPES = [(), (1,), (33, 1), (2, 31), (0, 3), (3, 2, 5, 7), (70, 257)]
ELEMENT_LOSSES = {
    "mse": (nn.MSELoss, "mse_loss", {}, ()),
    "l1": (nn.L1Loss, "smooth_l1_loss", {}, (0.0,)),
    "smooth l1": (nn.SmoothL1Loss, "smooth_l1_loss", {"beta": 0.3}, (0.3,)),
    "bce": (nn.BCEWithLogitsLoss, "bce_with_logits", {}, (None,)),
    "bce, weight": (
        nn.BCEWithLogitsLoss,
        "bce_with_logits",
        {"pos_weight": 2.5},
        (np.array([2.5]),),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ELEMENT_LOSSES)
def test_element_losses(name, shape, reduction):
    kind, op, options, more = ELEMENT_LOSSES[name]
    rng = np.random.default_rng(6)
    x = np.array(rng.standard_normal(shape) * 3, np.float32)
    target = np.array(rng.random(shape), np.float32)
    loss, mean = kind(reduction=reduction, **options), reduction == "mean"
    value = loss(x, target)
    assert value.shape == () and value.dtype == np.float32
    want = getattr(reference, f"{op}_forward")(x, target, *more, mean)
    np.testing.assert_allclose(float(value), want, rtol=1e-5)
    gradient = loss.backward()
    want = getattr(reference, f"{op}_backward")(x, target, *more, mean)
    assert gradient.shape == shape
    np.testing.assert_allclose(gradient.numpy(), want, rtol=1e-4, atol=1e-6)


def torch_result(loss, x, target):
    torch = pytest.importorskip("torch")
    x = torch.tensor(x, requires_grad=True)
    value = loss(x, torch.as_tensor(target))
    value.backward()
    return float(value.detach()), x.grad.numpy()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_element_losses_are_those_of_torch(data):
    torch = pytest.importorskip("torch")
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = (rng.standard_normal(shape) * 5).astype(np.float32)
    target = rng.random(shape).astype(np.float32)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    beta = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    weight = rng.random(shape[-1]).astype(np.float32) * 4
    pairs = [
        (nn.MSELoss(reduction), torch.nn.MSELoss(reduction=reduction)),
        (nn.L1Loss(reduction), torch.nn.L1Loss(reduction=reduction)),
        (
            nn.SmoothL1Loss(reduction, beta),
            torch.nn.SmoothL1Loss(reduction=reduction, beta=beta),
        ),
        (
            nn.BCEWithLogitsLoss(reduction),
            torch.nn.BCEWithLogitsLoss(reduction=reduction),
        ),
    ]
    if len(shape) > 1:
        pairs.append(
            (
                nn.BCEWithLogitsLoss(reduction, pos_weight=weight),
                torch.nn.BCEWithLogitsLoss(
                    reduction=reduction, pos_weight=torch.tensor(weight)
                ),
            )
        )
    for ours, theirs in pairs:
        value = float(ours(x, target))
        want, gradient = torch_result(theirs, x, target)
        assert value == pytest.approx(want, rel=1e-4, abs=1e-6), ours
        np.testing.assert_allclose(
            ours.backward().numpy(), gradient, rtol=1e-4, atol=1e-6, err_msg=repr(ours)
        )


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_class_losses_are_those_of_torch(data):
    torch = pytest.importorskip("torch")
    draw = data.draw
    n, f = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = (rng.standard_normal((n, f)) * 3).astype(np.float32)
    labels = rng.integers(0, f, n)
    given = {"reduction": draw(st.sampled_from(["mean", "sum"]))}
    theirs = dict(given)
    if draw(st.booleans()):
        given["weight"] = (rng.random(f) + 0.1).astype(np.float32)
        theirs["weight"] = torch.tensor(given["weight"])
    if draw(st.booleans()):
        given["ignore_index"] = theirs["ignore_index"] = draw(
            st.sampled_from([-100, 0, f - 1])
        )
        if given["ignore_index"] < 0:
            labels[rng.random(n) < 0.3] = -100
    pairs = [(nn.NLLLoss(**given), torch.nn.NLLLoss(**theirs))]
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    pairs.append(
        (
            nn.CrossEntropyLoss(**given, label_smoothing=smoothing),
            torch.nn.CrossEntropyLoss(**theirs, label_smoothing=smoothing),
        )
    )
    counts = (labels != given.get("ignore_index")).any()
    for ours, torchs in pairs:
        value = float(ours(x, labels))
        want, gradient = torch_result(torchs, x, labels)
        assert value == pytest.approx(want, rel=1e-4, abs=1e-5, nan_ok=True), ours
        found = ours.backward().numpy()
        if not counts:
            gradient = np.zeros_like(x)
        np.testing.assert_allclose(
            found, gradient, rtol=1e-4, atol=1e-6, err_msg=repr(ours)
        )


def test_if_no_row_counts_the_mean_is_nan_and_the_gradient_zero():
    x = np.random.default_rng(1).standard_normal((3, 4))
    for reduction, value in (("mean", np.nan), ("sum", 0.0)):
        loss = nn.CrossEntropyLoss(ignore_index=-1, reduction=reduction)
        np.testing.assert_equal(float(loss(x, [-1, -1, -1])), value)
        np.testing.assert_array_equal(loss.backward().numpy(), np.zeros((3, 4)))


def test_large_logits_do_not_overflow():
    x = np.array([1e4, -1e4, 1e4, -1e4], np.float32)
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    assert float(loss(x, [1, 0, 0, 1])) == 2e4
    assert loss.backward().numpy().tolist() == [0, 0, 1, -1]


def test_labels_out_of_range_are_still_refused():
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    x = np.zeros((3, 4))
    assert np.isfinite(float(loss(x, [0, -100, 3])))
    for wrong in ([0, -1, 3], [0, 4, 3]):
        with pytest.raises(DataError, match="label 1 is"):
            loss(x, wrong)
        with pytest.raises(DataError, match="at index 1"):
            loss(x, Tensor(np.array(wrong), "cpu"))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.MSELoss("none"), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: nn.NLLLoss(reduction=None), ValueError, "'mean' or 'sum'"),
        (lambda: nn.SmoothL1Loss(beta=-1), ValueError, "beta must be finite"),
        (lambda: nn.SmoothL1Loss(beta="1"), TypeError, "beta must be a number"),
        (lambda: nn.NLLLoss(weight=[[1.0]]), ShapeError, r"\(1, 1\), expected \(F,\)"),
        (lambda: nn.NLLLoss(weight=[-1.0]), ValueError, "weight must be finite and"),
        (lambda: nn.NLLLoss(weight=["a"]), TypeError, "weight holds"),
        (lambda: nn.NLLLoss(ignore_index=2**31), ValueError, "labels are int32"),
        (lambda: nn.NLLLoss(ignore_index=0.5), TypeError, "integer"),
        (
            lambda: nn.CrossEntropyLoss(label_smoothing=1.1),
            ValueError,
            "label_smoothing must be a number from 0 to 1",
        ),
        (
            lambda: nn.CrossEntropyLoss(weight=[1, 2])(np.zeros((3, 4)), [0, 1, 2]),
            ShapeError,
            "weight has 2 numbers, but there are 4 scores",
        ),
        (
            lambda: nn.BCEWithLogitsLoss(pos_weight=[1, 2])(
                np.zeros((3, 4)), np.zeros((3, 4))
            ),
            ShapeError,
            r"pos_weight has shape \(2,\), which does not fit a row of logits, \(4,\)",
        ),
        (
            lambda: nn.MSELoss()(np.zeros((3, 1)), np.zeros(3)),
            ShapeError,
            r"\(3, 1\), the target \(3,\): reshape",
        ),
        (
            lambda: nn.MSELoss()(np.zeros(3), Tensor([1, 2, 3], "cpu")),
            TypeError,
            "int32, expected float32; class indices are for CrossEntropyLoss",
        ),
        (lambda: nn.MSELoss()(np.zeros(1), ["a"]), TypeError, "expected numbers"),
        (lambda: nn.MSELoss().backward(), RuntimeError, "backward without a forward"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pos_weight_fits_the_last_axes():
    rng = np.random.default_rng(2)
    x, target = rng.standard_normal((2, 3, 4)), rng.random((2, 3, 4))
    weight = rng.random((3, 1)) + 1
    loss = nn.BCEWithLogitsLoss("sum", weight)
    want = reference.bce_with_logits_forward(
        x, target, np.broadcast_to(weight, (3, 4)).ravel(), False
    )
    assert float(loss(x, target)) == pytest.approx(want, rel=1e-5)


def test_repr_names_options_and_copies_are_whole():
    loss = nn.CrossEntropyLoss([1, 2], -1, "sum", 0.5)
    text = (
        "CrossEntropyLoss(weight=[1.0, 2.0], ignore_index=-1, reduction='sum', "
        "label_smoothing=0.5)"
    )
    assert repr(loss) == text and not loss.is_plain
    assert loss.weight.tolist() == [1, 2] and loss.label_smoothing == 0.5
    x = np.zeros((3, 2))
    value = float(loss(x, [0, 1, -1]))
    loss.backward()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == text and float(twin(x, [0, 1, -1])) == value
    assert repr(nn.SmoothL1Loss(beta=2)) == "SmoothL1Loss(beta=2.0)"
    assert repr(nn.BCEWithLogitsLoss()) == "BCEWithLogitsLoss()"
    assert nn.BCEWithLogitsLoss(pos_weight=3).pos_weight == 3
    assert nn.NLLLoss().is_plain and nn.NLLLoss().weight is None


def test_only_the_plain_loss_is_fused():
    model = nn.Sequential(nn.Linear(3, 2), nn.LogSoftmax())
    assert nn.Objective(model, nn.NLLLoss(), True)._linear is not None
    for loss in (nn.NLLLoss(weight=[1, 2]), nn.NLLLoss(reduction="sum"), nn.MSELoss()):
        objective = nn.Objective(model, loss, True)
        assert objective._linear is None
    labels = Tensor(np.array([0, 1, 1]), "cpu")
    loss = nn.NLLLoss(weight=[1, 2])
    objective = nn.Objective(model, loss, True)
    x = Tensor(np.random.default_rng(0).standard_normal((3, 3)), "cpu")
    _, value = objective.forward(x, labels)
    objective.backward()
    assert float(value) == float(loss(model(x), labels))
