"""Stochastic gradient descent."""

from __future__ import annotations

from typing import ClassVar

from .optimizer import Optimizer, checked, flag, hyperparameter


class SGD(Optimizer):
    """Steps against the gradient, with momentum if wanted.

    Parameters
    ----------
    params : list of Parameter, or list of dict
        See :class:`Optimizer`.
    lr : float
        Learning rate.
    momentum : float
        How much of the last step is kept for the next one.
    weight_decay : float
        L2 penalty: this times the parameter is added to the gradient.
    nesterov : bool
        Look ahead along the momentum. Needs momentum, and no dampening.
    dampening : float
        How much of the gradient is kept out of the momentum, from 0 to 1. Its step is
        not part of the fused update: gradients are summed before it.
    maximize : bool
        Step along the gradient instead of against it. ``momentum_buffer`` of the state
        then has the other sign than in PyTorch.

    Notes
    -----
    Each step, for every element of parameter p with gradient g (as in PyTorch)::

        g = g + weight_decay p
        b = momentum b + (1 - dampening) g  if there is momentum; first b = g
        g = g + momentum b  if nesterov, else  b
        p = p - lr g
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        weight_decay=0.0,
        nesterov=False,
        *,
        dampening=0.0,
        maximize=False,
    ):
        super().__init__(
            params,
            lr,
            {
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "dampening": dampening,
                "maximize": maximize,
            },
        )

    _unsaid: ClassVar[dict] = Optimizer._unsaid | {"dampening": 0.0}

    @staticmethod
    def _checked(momentum, weight_decay, nesterov, dampening, maximize):
        flag("nesterov", nesterov)
        momentum = checked("momentum", momentum)
        dampening = checked("dampening", dampening)
        if dampening > 1:
            raise ValueError(f"dampening must be from 0 to 1, got {dampening}")
        if nesterov and not momentum:
            raise ValueError("nesterov=True looks ahead along the momentum, which is 0")
        if nesterov and dampening:
            raise ValueError(f"nesterov=True needs dampening 0, got {dampening}")
        return {
            "momentum": momentum,
            "weight_decay": checked("weight_decay", weight_decay),
            "nesterov": nesterov,
            "dampening": dampening,
            "maximize": flag("maximize", maximize),
        }

    momentum = hyperparameter("momentum")
    weight_decay = hyperparameter("weight_decay")
    nesterov = hyperparameter("nesterov")
    dampening = hyperparameter("dampening")
    maximize = hyperparameter("maximize")

    def _initial_state(self, settings):
        return {"momentum_buffer": 0.0} if settings["momentum"] else {}

    def _counts_steps(self, settings):
        return _is_damped(settings)

    def _update(self, ops, run):
        settings = run.group.settings
        if _is_damped(settings):
            lr, weight_decay = run.group.rate_and_decay()
            ops.damped_sgd_step(
                run.data,
                run.grad,
                run.state["momentum_buffer"],
                self._counter,
                self._is_last(run),
                lr,
                settings["momentum"],
                settings["dampening"],
                weight_decay,
                settings["nesterov"],
            )
        else:
            ops.sgd_step(*self._arguments(run))

    def _update_from(self, updater, run):
        updater.sgd(*self._arguments(run))

    def _updates_from_parts(self, settings):
        return not _is_damped(settings)

    def _arguments(self, run):
        settings = run.group.settings
        lr, weight_decay = run.group.rate_and_decay()
        return (
            run.data,
            run.grad,
            run.state.get("momentum_buffer"),
            lr,
            settings["momentum"],
            weight_decay,
            settings["nesterov"],
        )


def _is_damped(settings) -> bool:
    # without momentum there is nothing to damp
    return bool(settings["momentum"] and settings["dampening"])
