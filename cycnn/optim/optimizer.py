"""The base class of the optimizers: runs of parameters, learning rate, saved state."""

from __future__ import annotations

import math
import numbers
from typing import ClassVar

import numpy as np

from ..errors import ShapeError
from ..nn.parameter import Parameter, pack, padded
from ..ops import for_device, fused
from ..shapes import ceil_div
from ..tensor import empty, zeros

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)
_MOST_STEPS = 2**31 - 2  # the counter on the device is int32

# parts of a slab that are summed up apart for its length: enough for every GPU
_PART, _MOST_PARTS = 4096, 1024


class Run:
    """Parameters that lie side by side in one slab, and are updated as one.

    Attributes
    ----------
    parameters : list of Parameter
    data, grad : Tensor
        float32 (size,), views of the slab, with the padding between the parameters.
    state : dict of str to Tensor
        What the optimizer remembers of each element, of the same shape.
    group : ParamGroup or None
        Whose learning rate and settings they have.
    """

    __slots__ = (
        "parameters",
        "slab",
        "departures",
        "start",
        "data",
        "grad",
        "state",
        "group",
    )

    def __init__(self, parameters, group=None):
        first, last = parameters[0], parameters[-1]
        self.parameters = parameters
        self.group = group
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


def find_runs(parameters, group=None) -> list:
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
                runs.append(Run(run, group))
                run = []
            run.append(parameter)
        runs.append(Run(run, group))
    return runs


class Places:
    """Runs of parameters, found anew when parameters have moved; state moves along.

    Parameters
    ----------
    make : callable
        ``make()`` gives the :class:`Run` list of now, with state in each.
    """

    def __init__(self, make):
        self._make = make
        self._runs = make()
        self._places = self._found()

    def _found(self):
        return {
            id(parameter): (parameter, run, parameter.offset)
            for run in self._runs
            for parameter in run.parameters
        }

    @property
    def moved(self) -> bool:
        """Whether a parameter has left since the runs were found."""
        return any(run.slab.departures != run.departures for run in self._runs)

    @property
    def runs(self) -> list:
        """The runs as they were found last."""
        return self._runs

    def find_again(self) -> None:
        """Find the runs, and carry over the state from the runs before."""
        before = self._places
        self._runs = self._make()
        self._places = self._found()
        for key, (parameter, run, offset) in self._places.items():
            _, old, old_offset = before[key]
            for name in run.state:
                run.part(name, offset, parameter).copy_(
                    old.part(name, old_offset, parameter)
                )

    def state_of(self, parameter) -> dict:
        """The state of one parameter: views, of its shape."""
        _, run, offset = self._places[id(parameter)]
        return {name: run.part(name, offset, parameter) for name in run.state}


class ParamGroup:
    """Parameters with a learning rate and settings of their own.

    ``group["lr"]`` and ``group["lr"] = 0.1`` are spelled as in PyTorch; the other
    settings can be read the same way. They are fixed, see :class:`Optimizer`.

    Attributes
    ----------
    params : list of Parameter
    lr : float
        May be set at any time.
    settings : dict
        The other hyper-parameters.
    lr_tensor : Tensor
        The learning rate on the device: float32, shape ().
    negated_lr : Tensor or None
        Minus that, as of the last update, if the group is to maximize.
    """

    def __init__(self, params, lr, settings):
        self.params = params
        self.settings = settings
        self._lr = lr
        self.lr_tensor = self.negated_lr = None

    @property
    def maximizes(self) -> bool:
        return self.settings.get("maximize", False)

    def rate_and_decay(self) -> tuple:
        """The learning rate (a Tensor) and weight decay that an update computes with.

        With both negated, every formula is that of the negated gradient. What is
        remembered of gradients, not of their squares, has the other sign then.
        """
        decay = self.settings["weight_decay"]
        if self.maximizes:
            return self.negated_lr, -decay
        return self.lr_tensor, decay

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value):
        value = checked("lr", value)
        if value != self._lr:
            for_device(self.lr_tensor.device).fill(self.lr_tensor, value)
            self._lr = value

    def __getitem__(self, name):
        if name == "params":
            return self.params
        return self._lr if name == "lr" else self.settings[name]

    def __setitem__(self, name, value):
        if name != "lr":
            raise TypeError(
                f"{name} cannot be changed, only lr: a recorded step keeps the numbers "
                f"that it was recorded with. Make a new optimizer"
            )
        self.lr = value

    def keys(self):
        return ["params", "lr", *self.settings]

    def __repr__(self):
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"ParamGroup({len(self.params)} parameters, lr={self._lr}, {settings})"


def hyperparameter(name):
    """A read-only property: see :class:`Optimizer`. Groups may have others."""
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
        runs = self._optimizer.runs
        self._optimizer._negate_rates()
        for run, updater in zip(runs, self._updaters):
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
    params : list of Parameter, or list of dict
        For instance ``model.parameters()``; all on one device. Or groups, as in
        PyTorch: ``[{"params": weights, "weight_decay": 1e-4}, {"params": biases}]``,
        each with any hyper-parameters of its own; the others are the optimizer's. The
        parameters are then put side by side in the order of the groups, so that each
        group is updated by one launch.
    lr : float
        Learning rate.
    settings : dict of str to float or bool
        The other hyper-parameters, by name.

    Raises
    ------
    TypeError, ValueError
        If there are no parameters, a parameter is given twice, they are on several
        devices, or a group has a setting that the optimizer has not.
    """

    # int32 (2,), see _settle
    _counter = None
    # settings that are left out of repr and state_dict where they have this value
    _unsaid: ClassVar[dict] = {"maximize": False}

    def __init__(self, params, lr, settings):
        refuse_layer(params)
        self._settings = self._checked(**settings)
        lr = checked("lr", lr)
        self._groups = []
        for given in _as_groups(params):
            own = dict(given)
            members = own.pop("params")
            group_lr = checked("lr", own.pop("lr", lr))
            for name in own:
                if name not in settings:
                    raise TypeError(
                        f"a group has {name!r}, which {type(self).__name__} has not: "
                        f"expected params, lr, {', '.join(settings)}"
                    )
            own = self._checked(**(settings | own))
            self._groups.append(ParamGroup(list(members), group_lr, own))
        self._params = [p for group in self._groups for p in group.params]
        groups = [group.params for group in self._groups]
        check_parameters(groups, "optimize", ": it would be updated twice")
        self._settle()
        self._places = Places(self._find_runs)

    # for the subclasses

    @staticmethod
    def _checked(**settings) -> dict:
        """The settings of a group, checked."""
        raise NotImplementedError

    def _initial_state(self, settings) -> dict:
        """Names of the state that each element has, with the number it starts at."""
        raise NotImplementedError

    def _counts_steps(self, settings) -> bool:
        """Whether an update depends on how many there were: see :attr:`_counter`."""
        return False

    def _update(self, ops, run) -> None:
        """Update the parameters of a run, in place."""
        raise NotImplementedError

    def _update_from(self, updater, run) -> None:
        """The same, from gradients in parts, which ``updater`` knows."""
        raise NotImplementedError

    def _updates_from_parts(self, settings) -> bool:
        """Whether :meth:`_update_from`, if there is one, can do these settings."""
        return True

    def _is_last(self, run) -> bool:
        """Whether a run is the one whose update counts the step."""
        counting = [
            other
            for other in self._places.runs
            if self._counts_steps(other.group.settings)
        ]
        return run is counting[-1]

    # where the parameters are

    def _settle(self):
        """Take the device of the parameters; what is kept there moves along."""
        devices = {parameter.device for parameter in self._params}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters are on several devices "
                f"({', '.join(sorted(map(str, devices)))}): move the whole model to one"
            )
        (device,) = devices
        self._ops = for_device(device)
        groups = self._groups
        if len(groups) > 1:
            # else a group is as many runs as others lie between its parameters
            pack(self._params)
        one = len(groups) == 1
        rates = empty(() if one else len(groups), device=device)
        for i, group in enumerate(groups):
            group.lr_tensor = rates if one else rates[i]
            self._ops.fill(group.lr_tensor, group.lr)
        self._lr_on_device = rates
        self._make_negated()
        # steps done, and what the GPU's blocks count with; None if nobody asks
        before, self._counter = self._counter, None
        if any(self._counts_steps(group.settings) for group in groups):
            self._counter = zeros(2, "int32", device)
            if before is not None:
                self._counter.copy_(before)

    def _make_negated(self):
        """Room for the negated learning rates of groups that maximize."""
        rates, groups = self._lr_on_device, self._groups
        self._negated = None
        if any(group.maximizes for group in groups):
            self._negated = empty(rates.shape, device=rates.device)
            for i, group in enumerate(groups):
                group.negated_lr = self._negated[i] if rates.shape else self._negated

    def _negate_rates(self):
        """Negate the learning rates, before an update that reads them.

        On the device and in each step, since a recorded one finds a new rate there.
        """
        if self._negated is not None:
            self._ops.fill(self._negated, 0.0)
            # as an average: 2 * 0 + (1 - 2) lr, which is exact
            self._ops.ema_step(self._negated, self._lr_on_device, 2.0)

    def _find_runs(self):
        runs = []
        for group in self._groups:
            for run in find_runs(group.params, group):
                for name, value in self._initial_state(group.settings).items():
                    made = empty(run.data.shape, device=run.data.device)
                    run.state[name] = made
                    self._ops.fill(made, value)
                runs.append(run)
        return runs

    @property
    def runs(self) -> list:
        """The :class:`Run` list as of now; normally one, a whole model."""
        self._follow()
        return self._places.runs

    def _follow(self):
        """Notice parameters that have moved."""
        if self._places.moved:
            self._settle()
            self._places.find_again()

    # what a user does

    @property
    def param_groups(self) -> list:
        """The :class:`ParamGroup` list; one, unless groups were given."""
        return list(self._groups)

    @property
    def lr(self) -> float:
        """The learning rate, kept on the device too, where a captured step reads it.

        Of several groups, that of the first; set the others in :attr:`param_groups`.
        """
        return self._groups[0].lr

    @lr.setter
    def lr(self, value):
        if len(self._groups) > 1:
            raise ValueError(
                f"there are {len(self._groups)} groups, each with a learning rate of "
                f"its own: set optimizer.param_groups[i].lr, or lrs"
            )
        self._groups[0].lr = value

    @property
    def lrs(self) -> list:
        """The learning rates of all groups."""
        return [group.lr for group in self._groups]

    @lrs.setter
    def lrs(self, values):
        values = [checked("lr", value) for value in values]
        if len(values) != len(self._groups):
            raise ValueError(
                f"there are {len(self._groups)} groups and {len(values)} learning rates"
            )
        for group, value in zip(self._groups, values):
            group.lr = value

    @property
    def lr_tensor(self):
        """The learning rate on the device: float32, shape (). Steps read it there.

        Of several groups: shape (groups,).
        """
        return self._lr_on_device

    def step(self) -> None:
        """Update all parameters by their gradients."""
        # first, since it may replace what the loop uses
        runs = self.runs
        self._negate_rates()
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
        known = type(self)._update_from is not Optimizer._update_from and all(
            self._updates_from_parts(group.settings) for group in self._groups
        )
        if not known or not all(updaters):
            return None
        return PartialStep(self, updaters, dict(packed))

    def clip_grad_norm(self, max_norm):
        """Shorten the gradient, of all parameters as one vector, to ``max_norm``.

        Call it between backward and :meth:`step`; a :class:`~cycnn.Trainer` does, if it
        is given ``clip_grad_norm``. Gradients are multiplied by
        max_norm / (norm + 1e-6) where that is less than 1, as
        ``torch.nn.utils.clip_grad_norm_`` does; if the length is NaN, so are they then.

        Returns
        -------
        Tensor
            The length before, float32, shape (), on the device.
        """
        max_norm = checked("max_norm", max_norm, positive=True)
        runs = self.runs
        device, ops = runs[0].data.device, self._ops
        parts = [min(ceil_div(run.grad.size, _PART), _MOST_PARTS) for run in runs]
        sums, norm = empty(sum(parts), device=device), empty((), device=device)
        first = 0
        for run, count in zip(runs, parts):
            ops.square_sums(run.grad, sums[first : first + count])
            first += count
        for run in runs:
            ops.clip_by_norm(run.grad, sums, max_norm, norm)
        return norm

    def zero_grad(self) -> None:
        """Set all gradients to zero; needed only before ``accumulate=True``."""
        runs = self.runs
        for run in runs:
            self._ops.fill(run.grad, 0.0)

    def _shown(self, settings):
        return {
            name: value
            for name, value in settings.items()
            if name not in self._unsaid or value != self._unsaid[name]
        }

    def state_dict(self) -> dict:
        """Everything that the next step depends on, besides parameters and gradients.

        Returns
        -------
        dict
            ``"type"``, ``"lr"`` and the other hyper-parameters as plain str, float and
            bool; the state as ndarrays named ``"<state>.<index of the parameter>"``;
            ``"step"``, the number of steps, if they matter. Of several groups also
            ``"param_groups"``, a list of their hyper-parameters and how many parameters
            each has, which are numbered through.
        """
        self._follow()
        state = {"type": type(self).__name__, "lr": self.lr}
        state |= self._shown(self._settings)
        if len(self._groups) > 1:
            state["param_groups"] = [
                {"params": len(g.params), "lr": g.lr, **self._shown(g.settings)}
                for g in self._groups
            ]
        if self._counter is not None:
            state["step"] = float(self._counter.numpy()[0])
        for i, parameter in enumerate(self._params):
            for name, part in self._places.state_of(parameter).items():
                state[f"{name}.{i}"] = part.numpy()
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
        self._follow()
        kind = state.get("type")
        if kind != type(self).__name__:
            raise ValueError(
                f"the state is of {kind}, the optimizer is {type(self).__name__}"
            )
        twin = self._twin(state)
        plain = {"type", "lr", *self._settings, "param_groups"}
        steps = 0
        if twin._counter is not None:
            plain.add("step")
            steps = state.get("step")
            if not isinstance(steps, (int, float)) or not 0 <= steps <= _MOST_STEPS:
                raise ValueError(f"the state's step is {steps!r}: expected a number")
        wanted = {
            f"{name}.{i}": parameter
            for i, parameter in enumerate(self._params)
            for name in twin._places.state_of(parameter)
        }
        arrays = {k: v for k, v in state.items() if k not in plain}
        for name, parameter in wanted.items():
            if name not in arrays:
                raise ValueError(
                    f"the state has no {name}: it is of another number of parameters, "
                    f"or of other settings"
                )
            check_state(name, arrays[name], parameter)
        for name in arrays:
            if name not in wanted:
                raise ValueError(f"the state has {name}, which this optimizer has not")
        # memory is replaced only where it must be, so that addresses stay as they are
        for mine, other in zip(self._groups, twin._groups):
            mine.settings = other.settings
        if (self._negated is None) != (twin._negated is None):
            self._make_negated()
        if [run.state.keys() for run in self._places.runs] != [
            run.state.keys() for run in twin._places.runs
        ]:
            self._places = Places(self._find_runs)
        if (self._counter is None) != (twin._counter is None):
            self._counter = twin._counter
        self._settings = twin._settings
        self.lrs = twin.lrs
        if self._counter is not None:
            self._counter.copy_(np.array([steps, 0], np.int32))
        for i, parameter in enumerate(self._params):
            for name, part in self._places.state_of(parameter).items():
                part.copy_(arrays[f"{name}.{i}"])

    def _twin(self, state):
        """An optimizer of these parameters with the settings of a state, checked."""
        defaults = self._options_in(state, "the state")
        groups = state.get("param_groups")
        if groups is None:
            if len(self._groups) > 1:
                raise ValueError(
                    f"the state is of one group of parameters, the optimizer has "
                    f"{len(self._groups)}"
                )
            groups = [{**defaults, "params": len(self._params)}]
        if not isinstance(groups, list) or len(groups) != len(self._groups):
            raise ValueError(
                f"the state's param_groups do not fit: the optimizer has "
                f"{len(self._groups)} groups"
            )
        given = []
        for i, (group, mine) in enumerate(zip(groups, self._groups)):
            if not isinstance(group, dict) or group.get("params") != len(mine.params):
                raise ValueError(
                    f"group {i} of the state is of other parameters: the optimizer's "
                    f"has {len(mine.params)}"
                )
            options = self._options_in(group, f"group {i} of the state")
            given.append({**options, "params": mine.params})
        return type(self)(given, **defaults)

    def _options_in(self, state, where) -> dict:
        """lr and the settings out of a state."""
        options = {}
        for name in ("lr", *self._settings):
            if name in state:
                options[name] = state[name]
            elif name in self._unsaid:
                options[name] = self._unsaid[name]
            else:
                raise ValueError(f"{where} has no {name}")
        return options

    def __reduce__(self):
        raise TypeError(
            f"{type(self).__name__} updates the parameters of one model, so it cannot "
            f"be copied or pickled: make a new one for the copied model and give it "
            f"load_state_dict(state_dict())"
        )

    def __repr__(self):
        settings = ", ".join(f"{k}={v}" for k, v in self._shown(self._settings).items())
        count = f"{sum(parameter.size for parameter in self._params):,} parameters"
        if len(self._groups) > 1:
            count += f" in {len(self._groups)} groups"
        return f"{type(self).__name__}(lr={self._groups[0].lr}, {settings}; {count})"


def _as_groups(params) -> list:
    """The groups that a user gave, as dicts with "params"."""
    params = list(params)
    if not params or not all(isinstance(given, dict) for given in params):
        return [{"params": params}]
    for given in params:
        if "params" not in given:
            raise ValueError(
                f"a group of parameters needs 'params', got {', '.join(given) or '{}'}"
            )
        if hasattr(given["params"], "parameters"):
            raise TypeError(
                "a group's params is a layer; give its parameters: layer.parameters()"
            )
    return [
        {**given, "params": [given["params"]]}
        if isinstance(given["params"], Parameter)
        else given
        for given in params
    ]


def above_zero(eps) -> float:
    """``eps`` as updates add it to a root: at least the smallest number of float32.

    To a root that is not 0 that adds nothing, and 0 / 0 is 0, not NaN: a parameter that
    never had a gradient stays, as does the padding between parameters.
    """
    return max(eps, _SMALLEST)


def flag(name, value) -> bool:
    """A hyper-parameter that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def refuse_layer(params) -> None:
    """``params`` is no layer, which is easily given for its parameters."""
    if hasattr(params, "parameters"):
        raise TypeError("params is a layer; give its parameters: model.parameters()")


def check_parameters(groups, verb, why="") -> None:
    """Lists of Parameters, none of them empty, and no parameter twice.

    ``verb`` is what they are for, ``why`` what speaks against giving one twice.
    """
    parameters = [parameter for group in groups for parameter in group]
    for parameter in parameters:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"params must hold Parameters, got {parameter!r}")
    if not all(groups) or not parameters:
        raise ValueError(f"there are no parameters to {verb}")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError(f"a parameter is given twice{why}")


def check_state(name, value, parameter) -> None:
    """What a saved state holds under ``name`` fits a parameter."""
    array = np.asarray(value)
    if array.shape != parameter.shape:
        raise ShapeError(
            f"state {name} has shape {array.shape}, the parameter {parameter.shape}"
        )
    if array.dtype.kind != "f":
        raise TypeError(f"state {name} is {array.dtype}, expected float32")


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
