"""The base class of the optimizers: runs of parameters, learning rate, saved state."""

from __future__ import annotations

import math
import numbers

import numpy as np

from ..errors import ShapeError
from ..nn.parameter import Parameter, padded
from ..ops import for_device, fused
from ..tensor import empty

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class Run:
    """Parameters that lie side by side in one slab, and are updated as one.

    Attributes
    ----------
    parameters : list of Parameter
    data, grad : Tensor
        float32 (size,), views of the slab, with the padding between the parameters.
    state : dict of str to Tensor
        What the optimizer remembers of each element, of the same shape.
    """

    __slots__ = ("parameters", "slab", "departures", "start", "data", "grad", "state")

    def __init__(self, parameters):
        first, last = parameters[0], parameters[-1]
        self.parameters = parameters
        self.slab = first.slab
        self.departures = first.slab.departures
        self.start = first.offset
        end = last.offset + padded(last.size)
        self.data = self.slab.data[self.start : end]
        self.grad = self.slab.grad[self.start : end]
        self.state = {}

    def part(self, name, offset, parameter):
        """The state of one parameter, which lay at ``offset`` when the run was made."""
        begin = offset - self.start
        return self.state[name][begin : begin + parameter.size].reshape(parameter.shape)


def find_runs(parameters) -> list:
    """Cut parameters into as few :class:`Run` as their places in memory allow."""
    slabs = {}
    for parameter in parameters:
        slabs.setdefault(id(parameter.slab), []).append(parameter)
    runs = []
    for neighbours in slabs.values():
        neighbours.sort(key=lambda parameter: parameter.offset)
        run = neighbours[:1]
        for parameter in neighbours[1:]:
            if parameter.offset != run[-1].offset + padded(run[-1].size):
                runs.append(Run(run))
                run = []
            run.append(parameter)
        runs.append(Run(run))
    return runs


def hyperparameter(name):
    """A read-only property: see :class:`Optimizer`."""
    return property(lambda self: self._settings[name])


class PartialStep:
    """A step that adds up gradients which come in parts: one launch a run.

    Made by :meth:`Optimizer.partial_step`. The gradients are written, too.
    """

    def __init__(self, optimizer, updaters, packed):
        self._optimizer = optimizer
        self._updaters = updaters
        self._packed = packed

    def run(self, partials, recording=False) -> None:
        """One step.

        Parameters
        ----------
        partials : dict
            ``{Parameter: Tensor (splits, *shape)}``; the gradient of any other
            parameter is whole, in its ``grad``.
        recording : bool
            Whether a graph records this; :meth:`upload` must follow the recording.
        """
        for run, updater in zip(self._optimizer.runs, self._updaters):
            entries = []
            for parameter in run.parameters:
                parts = partials.get(parameter)
                if parts is None:
                    parts = parameter.grad.reshape(1, *parameter.shape)
                packed = self._packed.get(parameter)
                entries.append((parameter.offset - run.start, parts, packed))
            updater.plan(entries)
            if not recording:
                updater.upload()
            self._optimizer._update_from(updater, run)
        for packed in self._packed.values():
            packed.settled = True

    def upload(self) -> None:
        """Tell the GPU where the parts are that a recorded step reads."""
        for updater in self._updaters:
            updater.upload()


class Optimizer:
    """Changes parameters against their gradients.

    The learning rate may be set at any time. Everything else is fixed when the
    optimizer is made, because a captured step keeps the numbers that it was recorded
    with; the learning rate it reads from the device.

    Parameters may move, by ``model.to(device)`` or by joining layers into another
    Sequential: the optimizer notices at its next step and moves its state after them.

    Parameters
    ----------
    params : list of Parameter
        For instance ``model.parameters()``; all on one device.
    lr : float
        Learning rate.
    settings : dict of str to float or bool
        The other hyper-parameters, by name, checked already.

    Raises
    ------
    TypeError, ValueError
        If there are no parameters, a parameter is given twice, or they are on several
        devices.
    """

    def __init__(self, params, lr, settings):
        if hasattr(params, "parameters"):
            raise TypeError(
                "params is a layer; give its parameters: model.parameters()"
            )
        self._params = list(params)
        for parameter in self._params:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"params must hold Parameters, got {parameter!r}")
        if not self._params:
            raise ValueError("there are no parameters to optimize")
        if len({id(parameter) for parameter in self._params}) < len(self._params):
            raise ValueError("a parameter is given twice: it would be updated twice")
        self._settings = settings
        self._lr = checked("lr", lr)
        self._runs = []
        self._places = {}
        self._plan()

    # for the subclasses

    def _initial_state(self) -> dict:
        """Names of the state that each element has, with the number it starts at."""
        raise NotImplementedError

    def _update(self, ops, run) -> None:
        """Update the parameters of a run, in place."""
        raise NotImplementedError

    def _update_from(self, updater, run) -> None:
        """The same, from gradients in parts, which ``updater`` knows."""
        raise NotImplementedError

    # where the parameters are

    def _plan(self):
        """Find the runs, and carry over the state from the runs before, if any."""
        devices = {parameter.device for parameter in self._params}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters are on several devices "
                f"({', '.join(sorted(map(str, devices)))}): move the whole model to one"
            )
        before, places = self._runs, self._places
        ops = for_device(self._params[0].device)
        runs = find_runs(self._params)
        for run in runs:
            for name, value in self._initial_state().items():
                made = run.state[name] = empty(run.data.shape, device=run.data.device)
                ops.fill(made, value)
        self._runs = runs
        self._places = {
            id(parameter): (run, parameter.offset)
            for run in runs
            for parameter in run.parameters
        }
        if before:
            for parameter in self._params:
                old, old_offset = places[id(parameter)]
                run, offset = self._places[id(parameter)]
                for name in run.state:
                    run.part(name, offset, parameter).copy_(
                        old.part(name, old_offset, parameter)
                    )
        self._ops = ops
        self._lr_on_device = empty((), device=self._params[0].device)
        ops.fill(self._lr_on_device, self._lr)

    @property
    def runs(self) -> list:
        """The :class:`Run` list as of now; normally one, a whole model."""
        for run in self._runs:
            if run.slab.departures != run.departures:
                self._plan()
                break
        return self._runs

    # what a user does

    @property
    def lr(self) -> float:
        """The learning rate, kept on the device too, where a captured step reads it."""
        return self._lr

    @lr.setter
    def lr(self, value):
        value = checked("lr", value)
        if value != self._lr:
            self._ops.fill(self._lr_on_device, value)
            self._lr = value

    @property
    def lr_tensor(self):
        """The learning rate on the device: float32, shape (). Steps read it there."""
        return self._lr_on_device

    def step(self) -> None:
        """Update all parameters by their gradients."""
        # first, since it may replace what the loop uses
        runs = self.runs
        ops = self._ops
        for run in runs:
            self._update(ops, run)

    def partial_step(self, packed=()):
        """A :class:`PartialStep` of this optimizer, or None where there is none.

        Parameters
        ----------
        packed : dict, optional
            ``{Parameter: PackedFilter}``: filters which the step is to pack anew, see
            :meth:`cycnn.nn.Objective.pack_filters`. After it must come another kernel.
        """
        updaters = [
            fused.updater(len(run.parameters), run.data.device) for run in self.runs
        ]
        known = type(self)._update_from is not Optimizer._update_from
        if not known or not all(updaters):
            return None
        return PartialStep(self, updaters, dict(packed))

    def zero_grad(self) -> None:
        """Set all gradients to zero; needed only before ``accumulate=True``."""
        runs = self.runs
        for run in runs:
            self._ops.fill(run.grad, 0.0)

    def state_dict(self) -> dict:
        """Everything that the next step depends on, besides parameters and gradients.

        Returns
        -------
        dict
            ``"type"``, ``"lr"`` and the other hyper-parameters as plain str, float and
            bool; the state as ndarrays named ``"<state>.<index of the parameter>"``.
        """
        runs = self.runs
        state = {"type": type(self).__name__, "lr": self._lr, **self._settings}
        for name in runs[0].state:
            for i, parameter in enumerate(self._params):
                run, offset = self._places[id(parameter)]
                state[f"{name}.{i}"] = run.part(name, offset, parameter).numpy()
        return state

    def load_state_dict(self, state) -> None:
        """Go on as the optimizer did whose :meth:`state_dict` this is.

        The hyper-parameters are taken over, too.

        Raises
        ------
        ValueError, ShapeError, TypeError
            If it is the state of another kind of optimizer, or of other parameters. The
            message names the first difference; nothing is changed then.
        """
        kind = state.get("type")
        if kind != type(self).__name__:
            raise ValueError(
                f"the state is of {kind}, the optimizer is {type(self).__name__}"
            )
        scalars = ["lr", *self._settings]
        for name in scalars:
            if name not in state:
                raise ValueError(f"the state has no {name}")
        given = {name: state[name] for name in self._settings}
        # the constructor's own checks, and which state such an optimizer has
        twin = type(self)(self._params, lr=state["lr"], **given)
        kept = twin._initial_state()
        wanted = {
            f"{name}.{i}": parameter.shape
            for name in kept
            for i, parameter in enumerate(self._params)
        }
        arrays = {k: v for k, v in state.items() if k not in ("type", *scalars)}
        for name, shape in wanted.items():
            if name not in arrays:
                raise ValueError(
                    f"the state has no {name}: it is of another number of parameters, "
                    f"or of other settings"
                )
            array = np.asarray(arrays[name])
            if array.shape != shape:
                raise ShapeError(
                    f"state {name} has shape {array.shape}, the parameter {shape}"
                )
            if array.dtype.kind != "f":
                raise TypeError(f"state {name} is {array.dtype}, expected float32")
        for name in arrays:
            if name not in wanted:
                raise ValueError(f"the state has {name}, which this optimizer has not")
        # memory is replaced only where it must be, so that addresses stay as they are
        if kept.keys() != self._initial_state().keys():
            self._runs, self._places = twin._runs, twin._places
        self._settings = twin._settings
        self.lr = twin.lr
        for name in kept:
            for i, parameter in enumerate(self._params):
                run, offset = self._places[id(parameter)]
                run.part(name, offset, parameter).copy_(arrays[f"{name}.{i}"])

    def __reduce__(self):
        raise TypeError(
            f"{type(self).__name__} updates the parameters of one model, so it cannot "
            f"be copied or pickled: make a new one for the copied model and give it "
            f"load_state_dict(state_dict())"
        )

    def __repr__(self):
        settings = ", ".join(f"{k}={v}" for k, v in self._settings.items())
        count = sum(parameter.size for parameter in self._params)
        return f"{type(self).__name__}(lr={self._lr}, {settings}; {count:,} parameters)"


def checked(name, value, below=math.inf, positive=False) -> float:
    """A hyper-parameter as a float: finite, not negative, and less than ``below``.

    ``positive`` also refuses what is 0 in float32, in which the update is computed.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not 0 <= value < below or value > _LARGEST:
        limit = "" if below == math.inf else f" and less than {below}"
        raise ValueError(f"{name} must be finite, not negative{limit}, got {value}")
    if positive and value < _SMALLEST:
        raise ValueError(
            f"{name} must be positive, at least {_SMALLEST:.3g} (float32), got {value}"
        )
    return value
