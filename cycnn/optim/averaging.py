"""Averages of parameters over training."""

from __future__ import annotations

import contextlib

from ..nn.inference import turn
from ..ops import for_device
from ..tensor import empty
from .optimizer import (
    Places,
    check_parameters,
    check_state,
    checked,
    find_runs,
    refuse_layer,
)


class EMA:
    """An exponential moving average of parameters, which often tests better than they.

    Made before training, it starts as a copy of the parameters. A
    :class:`~cycnn.Trainer` that is given it as ``average`` updates it after each step,
    also in a recorded one, and evaluates and predicts with the averages. In a loop of
    one's own: ``average.update()`` after ``optimizer.step()``.

    Parameters
    ----------
    params : list of Parameter
        For instance ``model.parameters()``.
    decay : float
        How much of the average stays at each update, from 0 to less than 1: it reaches
        back about 1 / (1 - decay) steps.

    Notes
    -----
    Each update, for every element: average = decay average + (1 - decay) parameter.

    Only parameters are averaged. A layer that gathers statistics of its own, such as
    batch normalisation, keeps those of the training.

    Examples
    --------
    >>> average = optim.EMA(model.parameters(), decay=0.999)
    >>> trainer = Trainer(model, loss, optimizer, average=average)
    >>> with average.applied():
    ...     model.predict(images)       # with the averages
    >>> average.copy_to_parameters()    # for good, for instance before model.save
    """

    def __init__(self, params, decay=0.999):
        refuse_layer(params)
        self._params = list(params)
        check_parameters([self._params], "average")
        self._decay = checked("decay", decay, below=1)
        self._is_applied = False
        self._places = Places(self._find_runs)

    def _find_runs(self):
        runs = find_runs(self._params)
        for run in runs:
            made = run.state["average"] = empty(run.data.shape, device=run.data.device)
            made.copy_(run.data)
        return runs

    def _runs(self):
        if self._places.moved:
            self._places.find_again()
        return self._places.runs

    @property
    def decay(self) -> float:
        return self._decay

    @property
    def is_applied(self) -> bool:
        """Whether the averages are in the place of the parameters."""
        return self._is_applied

    def _refuse_if_applied(self, what):
        if self._is_applied:
            raise RuntimeError(
                f"{what} while the averages are in the place of the parameters: leave "
                f"the block of applied() first"
            )

    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self._refuse_if_applied("update")
        for run in self._runs():
            ops = for_device(run.data.device)
            ops.ema_step(run.state["average"], run.data, self._decay)

    @contextlib.contextmanager
    def applied(self):
        """A block in which the parameters are the averages; afterwards as before."""
        self._refuse_if_applied("applied()")
        self._exchange()
        self._is_applied = True
        try:
            yield self
        finally:
            self._is_applied = False
            self._exchange()

    def _exchange(self):
        # nobody shall compute with one half of each
        with turn:
            for run in self._runs():
                for_device(run.data.device).swap(run.data, run.state["average"])

    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with the averages."""
        self._refuse_if_applied("copy_to_parameters")
        with turn:
            for run in self._runs():
                run.data.copy_(run.state["average"])

    def state_dict(self) -> dict:
        """``"decay"``, and the averages as ndarrays ``"average.<index>"``."""
        self._refuse_if_applied("state_dict")
        self._runs()
        state = {"decay": self._decay}
        for i, parameter in enumerate(self._params):
            part = self._places.state_of(parameter)["average"]
            state[f"average.{i}"] = part.numpy()
        return state

    def load_state_dict(self, state) -> None:
        """Go on as the average did whose :meth:`state_dict` this is.

        Raises
        ------
        ValueError, ShapeError, TypeError
            If it is of other parameters. Nothing is changed then.
        """
        self._refuse_if_applied("load_state_dict")
        self._runs()
        if "decay" not in state:
            raise ValueError("the state has no decay: it is not of an EMA")
        decay = checked("decay", state["decay"], below=1)
        wanted = {f"average.{i}": p for i, p in enumerate(self._params)}
        for name, parameter in wanted.items():
            if name not in state:
                raise ValueError(
                    f"the state has no {name}: it is of another number of parameters"
                )
            check_state(name, state[name], parameter)
        for name in state:
            if name != "decay" and name not in wanted:
                raise ValueError(f"the state has {name}, which this average has not")
        self._decay = decay
        for name, parameter in wanted.items():
            self._places.state_of(parameter)["average"].copy_(state[name])

    def __repr__(self):
        count = sum(parameter.size for parameter in self._params)
        return f"EMA(decay={self._decay}; {count:,} parameters)"
