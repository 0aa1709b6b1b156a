"""Adagrad."""

from __future__ import annotations

from .optimizer import Optimizer, above_zero, checked, flag, hyperparameter


class Adagrad(Optimizer):
    """Gradients divided by the root of the sum of all their squares so far.

    Parameters
    ----------
    params : list of Parameter, or list of dict
        See :class:`Optimizer`.
    lr : float
        Learning rate.
    lr_decay : float
        How fast the learning rate falls besides.
    weight_decay : float
        L2 penalty: this times the parameter is added to the gradient.
    initial_accumulator_value : float
        What the sum starts at.
    eps : float
        Added to the root, so that nothing is divided by zero. With 0 an element whose
        gradients were all 0 stays as it is.
    maximize : bool
        Step along the gradient instead of against it.

    Notes
    -----
    Step t = 1, 2, ..., for every element of parameter p with gradient g (Duchi, Hazan
    and Singer, 2011; as in PyTorch)::

        g = g + weight_decay p
        s = s + g^2
        p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)
    """

    def __init__(
        self,
        params,
        lr=0.01,
        lr_decay=0.0,
        weight_decay=0.0,
        initial_accumulator_value=0.0,
        eps=1e-10,
        *,
        maximize=False,
    ):
        super().__init__(
            params,
            lr,
            {
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
                "maximize": maximize,
            },
        )

    @staticmethod
    def _checked(lr_decay, weight_decay, initial_accumulator_value, eps, maximize):
        return {
            "lr_decay": checked("lr_decay", lr_decay),
            "weight_decay": checked("weight_decay", weight_decay),
            "initial_accumulator_value": checked(
                "initial_accumulator_value", initial_accumulator_value
            ),
            "eps": checked("eps", eps),
            "maximize": flag("maximize", maximize),
        }

    lr_decay = hyperparameter("lr_decay")
    weight_decay = hyperparameter("weight_decay")
    initial_accumulator_value = hyperparameter("initial_accumulator_value")
    eps = hyperparameter("eps")
    maximize = hyperparameter("maximize")

    def _initial_state(self, settings):
        return {"sum": settings["initial_accumulator_value"]}

    def _counts_steps(self, settings):
        return True

    def _update(self, ops, run):
        ops.adagrad_step(*self._arguments(run))

    def _update_from(self, updater, run):
        updater.adagrad(*self._arguments(run))

    def _arguments(self, run):
        settings = run.group.settings
        lr, weight_decay = run.group.rate_and_decay()
        return (
            run.data,
            run.grad,
            run.state["sum"],
            self._counter,
            self._is_last(run),
            lr,
            settings["lr_decay"],
            above_zero(settings["eps"]),
            weight_decay,
        )
