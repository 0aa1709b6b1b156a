"""Batch normalisation folded into convolutions."""

import numpy as np
import pytest

import cycnn
from cycnn import devices, nn
from cycnn.ops import reference


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def seasoned(model, seed=0):
    """The model with statistics and weights that tell channels apart."""
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    for name, array in state.items():
        if array.dtype == np.float32 and array.ndim == 1:
            state[name] = rng.uniform(0.3, 3, array.shape).astype(np.float32)
    model.load_state_dict(state)
    return model


def make(bias=True, **settings):
    cycnn.manual_seed(1)
    return seasoned(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=bias),
            nn.BatchNorm2d(6, **settings),
            nn.ReLU(),
            nn.Sequential(
                nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4, **settings)
            ),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(4 * 36, 5),
        )
    )


def kinds(model):
    return [type(layer).__name__ for _, layer in model._descendants()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_model_predicts_the_same(bias, affine):
    model = make(bias, affine=affine, eps=1e-3)
    before = model.state_dict()
    folded = nn.fold_batch_norm(model)
    assert kinds(folded) == [
        "Conv2d", "ReLU", "Sequential", "Conv2d", "BatchNorm2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert not folded.training and model.training
    x = np.random.default_rng(2).standard_normal((9, 2, 8, 8), dtype=np.float32)
    want = model.eval()(x).numpy()
    error = np.abs(folded(x).numpy() - want).max() / np.abs(want).max()
    assert error < 2e-6
    np.testing.assert_array_equal(folded.predict(x), folded(x).numpy())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert len({id(p.slab) for p in folded.parameters()}) == 1
    names = [name for name, _ in folded.named_parameters()]
    assert names[:4] == ["0.weight", "0.bias", "2.0.weight", "2.0.bias"]


def test_folding_costs_no_more_than_rounding():
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = seasoned(nn.Sequential(conv, norm)).eval()
    x = np.random.default_rng(3).standard_normal((4, 3, 9, 9), dtype=np.float32)
    exact = reference.conv2d_forward(
        x, conv.weight.data.numpy(), conv.bias.data.numpy()
    )
    state = norm.state_dict()
    exact = reference.batch_norm2d_inference(
        exact, *(state[name] for name in list(state)[:4]), norm.eps
    )
    errors = [
        np.linalg.norm(made(x).numpy() - exact) / np.linalg.norm(exact)
        for made in (model, nn.fold_batch_norm(model))
    ]
    assert errors[0] < 5e-7 and errors[1] < 5e-7


def test_what_cannot_be_folded_stays():
    for layers in (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)],
        [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)],
        [nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3)],
    ):
        model = nn.Sequential(*layers)
        assert kinds(nn.fold_batch_norm(model)) == kinds(model)
    linear = nn.fold_batch_norm(nn.Linear(2, 3))
    assert type(linear) is nn.Linear and not linear.training


def test_a_folded_model_can_be_trained_on():
    folded = nn.fold_batch_norm(make(bias=False)).train()
    x = np.random.default_rng(4).standard_normal((3, 2, 8, 8), dtype=np.float32)
    folded.backward(np.ones_like(folded(x).numpy()), input_grad=False)
    assert all(np.isfinite(p.grad.numpy()).all() for p in folded.parameters())
