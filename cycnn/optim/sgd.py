"""Stochastic gradient descent."""

from __future__ import annotations

from .optimizer import Optimizer, checked, hyperparameter


class SGD(Optimizer):
    """Steps against the gradient, with momentum if wanted.

    Parameters
    ----------
    params : list of Parameter
    lr : float
        Learning rate.
    momentum : float
        How much of the last step is kept for the next one, from 0 to less than 1.
    weight_decay : float
        L2 penalty: this times the parameter is added to the gradient.
    nesterov : bool
        Look ahead along the momentum. Needs momentum.

    Notes
    -----
    Each step, for every element of parameter p with gradient g (as in PyTorch)::

        g = g + weight_decay p
        b = momentum b + g                  if there is momentum; b starts at 0
        g = g + momentum b  if nesterov, else  b
        p = p - lr g
    """

    def __init__(self, params, lr=1e-3, momentum=0.0, weight_decay=0.0, nesterov=False):
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov must be True or False, got {nesterov!r}")
        momentum = checked("momentum", momentum, below=1)
        if nesterov and not momentum:
            raise ValueError("nesterov=True looks ahead along the momentum, which is 0")
        super().__init__(
            params,
            lr,
            {
                "momentum": momentum,
                "weight_decay": checked("weight_decay", weight_decay),
                "nesterov": nesterov,
            },
        )

    momentum = hyperparameter("momentum")
    weight_decay = hyperparameter("weight_decay")
    nesterov = hyperparameter("nesterov")

    def _initial_state(self):
        return {"momentum_buffer": 0.0} if self.momentum else {}

    def _update(self, ops, run):
        ops.sgd_step(*self._arguments(run))

    def _update_from(self, updater, run):
        updater.sgd(*self._arguments(run))

    def _arguments(self, run):
        settings = self._settings
        return (
            run.data,
            run.grad,
            run.state.get("momentum_buffer"),
            self._lr_on_device,
            settings["momentum"],
            settings["weight_decay"],
            settings["nesterov"],
        )
