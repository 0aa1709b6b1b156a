"""RMSprop."""

from __future__ import annotations

from typing import ClassVar

from .optimizer import Optimizer, above_zero, checked, flag, hyperparameter


class RMSprop(Optimizer):
    """Gradients divided by a running root mean square of themselves.

    Parameters
    ----------
    params : list of Parameter, or list of dict
        See :class:`Optimizer`.
    lr : float
        Learning rate.
    alpha : float
        How much of the running mean stays at each step, from 0 to 1. Some call it
        beta; ``beta=`` is accepted as well.
    eps : float
        Added to the root, so that nothing is divided by zero. With 0 an element whose
        gradients were all 0 stays as it is.
    weight_decay : float
        L2 penalty: this times the parameter is added to the gradient.
    momentum : float
        How much of the last update is kept for the next one.
    initial_accumulator : float
        What the running mean starts at. 0, as in PyTorch, makes the first steps large,
        about lr / sqrt(1 - alpha) whatever the gradient is; a small number, such as
        1e-3, damps them.
    centered : bool
        Divide by the standard deviation of the gradient instead, the root of the mean
        square less the squared mean.
    maximize : bool
        Step along the gradient instead of against it. ``momentum_buffer`` and
        ``grad_avg`` of the state then have the other sign than in PyTorch.

    Notes
    -----
    Each step, for every element of parameter p with gradient g (Tieleman and Hinton,
    2012; eps outside of the root, as in PyTorch)::

        g = g + weight_decay p
        v = alpha v + (1 - alpha) g^2
        u = g / (sqrt(v) + eps)             centered: sqrt(v - a^2) with
                                            a = alpha a + (1 - alpha) g
        b = momentum b + u,  u = b          if there is momentum
        p = p - lr u
    """

    def __init__(
        self,
        params,
        lr=0.01,
        alpha=0.99,
        eps=1e-8,
        weight_decay=0.0,
        momentum=0.0,
        initial_accumulator=0.0,
        *,
        centered=False,
        beta=None,
        maximize=False,
    ):
        if beta is not None:
            if alpha != 0.99:
                raise TypeError(
                    f"alpha={alpha!r} and beta={beta!r} are given: they are two names "
                    f"of one number"
                )
            alpha = beta
        super().__init__(
            params,
            lr,
            {
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "initial_accumulator": initial_accumulator,
                "centered": centered,
                "maximize": maximize,
            },
        )

    _unsaid: ClassVar[dict] = Optimizer._unsaid | {"centered": False}

    @staticmethod
    def _checked(
        alpha, eps, weight_decay, momentum, initial_accumulator, centered, maximize
    ):
        alpha = checked("alpha", alpha)
        if alpha > 1:  # the mean of squares would be negative
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        return {
            "alpha": alpha,
            "eps": checked("eps", eps),
            "weight_decay": checked("weight_decay", weight_decay),
            "momentum": checked("momentum", momentum),
            "initial_accumulator": checked("initial_accumulator", initial_accumulator),
            "centered": flag("centered", centered),
            "maximize": flag("maximize", maximize),
        }

    alpha = hyperparameter("alpha")
    eps = hyperparameter("eps")
    weight_decay = hyperparameter("weight_decay")
    momentum = hyperparameter("momentum")
    initial_accumulator = hyperparameter("initial_accumulator")
    centered = hyperparameter("centered")
    maximize = hyperparameter("maximize")

    def _initial_state(self, settings):
        state = {"square_avg": settings["initial_accumulator"]}
        if settings["momentum"]:
            state["momentum_buffer"] = 0.0
        if settings["centered"]:
            state["grad_avg"] = 0.0
        return state

    def _update(self, ops, run):
        data, grad, square_avg, *others = self._arguments(run)
        if run.group.settings["centered"]:
            grad_avg = run.state["grad_avg"]
            ops.centered_rmsprop_step(data, grad, square_avg, grad_avg, *others)
        else:
            ops.rmsprop_step(data, grad, square_avg, *others)

    def _updates_from_parts(self, settings):
        return not settings["centered"]

    def _update_from(self, updater, run):
        updater.rmsprop(*self._arguments(run))

    def _arguments(self, run):
        settings, state = run.group.settings, run.state
        lr, weight_decay = run.group.rate_and_decay()
        return (
            run.data,
            run.grad,
            state["square_avg"],
            state.get("momentum_buffer"),
            lr,
            settings["alpha"],
            above_zero(settings["eps"]),
            weight_decay,
            settings["momentum"],
        )
