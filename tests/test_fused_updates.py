"""Optimizers and groups in steps whose update adds up the gradients itself."""

import numpy as np
import pytest
from test_fuse import Updater, calls, on_the_cpu  # noqa: F401 (fixtures)
from training import patterns

import cycnn
from cycnn import Trainer, nn, optim
from cycnn.ops import cpu, fused


class AnyUpdater(Updater):
    """The stand-in of test_fuse.py, with all the rules of the kernels."""

    def adam(self, params, grads, means, squares, *given):
        self._update(cpu.adam_step, params, grads, means, squares, None, *given)

    def adagrad(self, *given):
        self._update(cpu.adagrad_step, *given)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.02, momentum=0.9),
    "rmsprop": lambda p: optim.RMSprop(p, 0.001, initial_accumulator=0.1),
    "adam": lambda p: optim.Adam(p, 0.002, eps=1e-3),
    "adamw": lambda p: optim.AdamW(p, 0.002, eps=1e-3, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, 0.01, lr_decay=0.1, eps=1e-3),
}
TRAIN = patterns(60, side=28, classes=10)


@pytest.fixture(autouse=True)
def updaters(calls, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fused, "updater", AnyUpdater)


def trained(kind, groups, fuse, clip=None, capture=True, **options):
    cycnn.manual_seed(0)
    model = nn.reference_network()
    params = model.parameters()
    if groups:
        params = [
            {"params": params[::2], "weight_decay": 0.01},
            {"params": params[1::2], "lr": 0.0005},
        ]
    if options:
        params = [{"params": params, **options}]
    optimizer = OPTIMIZERS[kind](params)
    trainer = Trainer(
        model,
        nn.NLLLoss(),
        optimizer,
        optim.schedules.linear(),
        capture=capture,
        fuse=fuse,
        clip_grad_norm=clip,
    )
    trainer.fit(TRAIN, 2, 16, seed=1)
    return trainer


@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_update_in_parts_is_the_plain_one(kind, groups):
    plain, in_parts = (trained(kind, groups, fuse) for fuse in (False, True))
    assert in_parts.optimizer.partial_step() is not None
    found = in_parts.model.state_dict()
    for name, array in plain.model.state_dict().items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=name)
    state = in_parts.optimizer.state_dict()
    assert state.get("step") == (8 if kind in ("adam", "adamw", "adagrad") else None)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_uphill_by_a_schedule_in_replayed_steps(kind):
    eager = trained(kind, False, False, capture=False, maximize=True)
    replayed = trained(kind, False, True, maximize=True)
    assert replayed.history[-1].loss > replayed.history[0].loss
    rate = float(replayed.optimizer.lr_tensor)
    assert replayed.optimizer.lr == pytest.approx(rate) and rate > 0
    found = replayed.model.state_dict()
    for name, array in eager.model.state_dict().items():
        np.testing.assert_allclose(found[name], array, 1e-4, 1e-4, err_msg=name)


def test_clipped_gradients_are_added_up_before():
    plain, fused_trainer = (trained("adam", True, fuse, 0.1) for fuse in (False, True))
    found = fused_trainer.model.state_dict()
    for name, array in plain.model.state_dict().items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=name)
    other = trained("adam", True, False).model.state_dict()
    assert any((found[name] != array).any() for name, array in other.items())
