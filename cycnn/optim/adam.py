"""Adam and AdamW."""

from __future__ import annotations

from .optimizer import Optimizer, above_zero, checked, flag, hyperparameter


class Adam(Optimizer):
    """A running mean of gradients over a running root mean square of them.

    Parameters
    ----------
    params : list of Parameter, or list of dict
        See :class:`Optimizer`.
    lr : float
        Learning rate: about how far a parameter moves in a step.
    betas : (float, float)
        How much of the mean, and of the mean square, stays at each step; from 0 to less
        than 1.
    eps : float
        Added to the root, so that nothing is divided by zero. With 0 an element whose
        gradients were all 0 stays as it is.
    weight_decay : float
        L2 penalty: this times the parameter is added to the gradient. (:class:`AdamW`
        shrinks the parameter itself.)
    amsgrad : bool
        Divide by the largest mean square so far. Its step is not part of the fused
        update: gradients are summed before it.
    maximize : bool
        Step along the gradient instead of against it. ``exp_avg`` of the state is then
        the mean of the gradients as they are, of which PyTorch keeps the negative.

    Notes
    -----
    Step t = 1, 2, ..., for every element of parameter p with gradient g (Kingma and Ba,
    2014; as in PyTorch)::

        g = g + weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        V = max(V, v)  if amsgrad, else  v
        p = p - lr (m / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps)

    m and v start at 0; the divisors make up for that. t is counted on the device, so
    that a recorded step knows which one it is.
    """

    _decoupled = False

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        maximize=False,
    ):
        super().__init__(
            params,
            lr,
            {
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
            },
        )

    @staticmethod
    def _checked(betas, eps, weight_decay, amsgrad, maximize):
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas must be two numbers, got {betas!r}") from None
        return {
            # a list, which a checkpoint gives back as it is
            "betas": [
                checked("betas[0]", beta1, below=1),
                checked("betas[1]", beta2, below=1),
            ],
            "eps": checked("eps", eps),
            "weight_decay": checked("weight_decay", weight_decay),
            "amsgrad": flag("amsgrad", amsgrad),
            "maximize": flag("maximize", maximize),
        }

    @property
    def betas(self) -> tuple:
        """Read-only, as all hyper-parameters but the learning rate."""
        return tuple(self._settings["betas"])

    eps = hyperparameter("eps")
    weight_decay = hyperparameter("weight_decay")
    amsgrad = hyperparameter("amsgrad")
    maximize = hyperparameter("maximize")

    def _initial_state(self, settings):
        state = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
        if settings["amsgrad"]:
            state["max_exp_avg_sq"] = 0.0
        return state

    def _counts_steps(self, settings):
        return True

    def _update(self, ops, run):
        state = run.state
        ops.adam_step(
            run.data,
            run.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq"),
            *self._numbers(run),
        )

    def _update_from(self, updater, run):
        state = run.state
        updater.adam(
            run.data,
            run.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            *self._numbers(run),
        )

    def _updates_from_parts(self, settings):
        return not settings["amsgrad"]

    def _numbers(self, run):
        settings = run.group.settings
        lr, weight_decay = run.group.rate_and_decay()
        return (
            self._counter,
            self._is_last(run),
            lr,
            *settings["betas"],
            above_zero(settings["eps"]),
            weight_decay,
            self._decoupled,
        )


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters apart from the gradient.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
        As of :class:`Adam`.
    weight_decay : float
        Each step takes this times lr from the parameter, whatever the gradient is.

    Notes
    -----
    As :class:`Adam`, but instead of adding to the gradient a step begins with
    ``p = (1 - lr weight_decay) p`` (Loshchilov and Hutter, 2017).
    """

    _decoupled = True

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        amsgrad=False,
        *,
        maximize=False,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize
        )
