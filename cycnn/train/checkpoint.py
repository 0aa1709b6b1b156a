"""A run in one file: safetensors, with everything that is no tensor as JSON.

    model.<name>        parameters and buffers, as in the state_dict
    buffer.<name>       buffers that are not in it: the state of random numbers
    optimizer.<name>    tensors of the optimizer's state
    average.<index>     averaged parameters, if there are any
    metadata "cycnn"    JSON: format version, layers, loss, schedule, the optimizer's
                        numbers, the run
    metadata "sha256"   digest of all of that, since safetensors checks sizes only

Nothing in such a file is executed when it is read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import reprlib
import sys

import numpy as np

from .. import __version__
from ..errors import DataError
from ..nn import weights
from ..nn.fuse import FusedSequential
from ..nn.inference import turn
from .history import EpochRecord

_FORMAT = 1


def packed(model, loss, optimizer, schedule, run: dict, average=None) -> tuple:
    """A checkpoint as the arrays and the metadata that :func:`weights.write` takes.

    ``run`` is anything that JSON can hold.
    """
    averages = {} if average is None else average.state_dict()
    tensors = {f"model.{name}": array for name, array in model.state_dict().items()}
    for name, buffer in _apart(model).items():
        tensors[f"buffer.{name}"] = buffer.data.numpy()
    tensors |= {name: array for name, array in averages.items() if name != "decay"}
    numbers = {}
    for name, value in optimizer.state_dict().items():
        if isinstance(value, np.ndarray):
            tensors[f"optimizer.{name}"] = value
        else:
            numbers[name] = value
    text = json.dumps(
        {
            "format": _FORMAT,
            "cycnn": __version__,
            "layers": layers_of(model),
            "loss": loss_name(loss),
            "schedule": schedule_name(schedule),
            "optimizer": numbers,
            "average": averages.get("decay"),
            "run": run,
        },
        default=_plain,
    )
    return tensors, {"cycnn": text, "sha256": _digest(tensors, text)}


def _plain(value):
    """A NumPy scalar, say a seed or a batch size, as the number that it is."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a checkpoint cannot hold {value!r}")


def load(path, model, loss, optimizer, schedule, average=None) -> dict:
    """Put a checkpoint into model, optimizer and average; returns its ``run``.

    Raises
    ------
    DataError
        If anything does not fit. All three are as they were then.
    """
    path = os.fspath(path)
    tensors, text = _read(path)
    content = _parse(path, text)
    saved, given = content["schedule"], schedule_name(schedule)
    if saved != given:
        raise DataError(f"{path} was made with the schedule {saved}, this is {given}")
    if content["layers"] is not None:
        _check_layers(path, content["layers"], layers_of(model))
    saved, given = content["loss"], loss_name(loss)
    if saved not in (None, given):
        raise DataError(
            f"{path} was made with the loss {_short(saved)}, this is {_short(given)}"
        )
    _check_run(path, content["run"])
    base = content["run"]["base_lr"]
    groups = len(base) if type(base) is list else 1
    if groups != len(optimizer.lrs):
        raise DataError(
            f"{path} is of another run: it has {groups} groups of parameters, the "
            f"optimizer {len(optimizer.lrs)}"
        )
    decay = content.get("average")
    if (decay is None) != (average is None):
        raise DataError(
            f"{path} was made {'without' if decay is None else 'with'} an average of "
            f"the parameters, this is {'with' if decay is None else 'without'} one"
        )
    parameters, buffers, state = {}, {}, dict(content["optimizer"])
    parts = {"model": parameters, "buffer": buffers, "optimizer": state}
    averages = {} if decay is None else {"decay": decay}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        if part == "average" and average is not None:
            averages[name] = array
            continue
        if part not in parts or rest in content["optimizer"]:
            raise DataError(f"{path} holds {name}, which no checkpoint has")
        parts[part][rest] = array
    with turn:  # a prediction meets all of it, or nothing
        _apply(
            path, model, parameters, optimizer, state, average, averages, buffers
        )
    return content["run"]


def _apply(
    path, model, parameters, optimizer, state, average, averages, buffers
) -> None:
    """Overwrite all, or nothing; behind each is what it is to load."""
    own = _apart(model)
    _check_buffers(path, own, buffers)
    before = model.state_dict()
    averages_before = None if average is None else average.state_dict()
    try:
        # Each of them checks everything before it writes anything.
        model.load_state_dict(parameters)
        if average is not None:
            average.load_state_dict(averages)
        optimizer.load_state_dict(state)
    except BaseException as error:
        model.load_state_dict(before)
        if average is not None:
            average.load_state_dict(averages_before)
        # OverflowError: a number such as 10**400, which is in no float's range
        if isinstance(error, (ValueError, TypeError, OverflowError)):
            raise DataError(f"{path} is of another run: {error}") from error
        raise
    for name, buffer in own.items():
        buffer.data.copy_(buffers[name])


def _apart(model) -> dict:
    """``{name: Buffer}`` of the buffers that the model's state_dict leaves out."""
    return {name: b for name, b in model.named_buffers() if not b.persistent}


def _check_buffers(path, own, given) -> None:
    """The buffers of a file are those of the model."""
    for name in sorted(own.keys() | given.keys()):
        if name not in given or name not in own:
            where = "this model" if name in own else "the file"
            raise DataError(f"{path} is of another run: only {where} has {name}")
        wanted, found = own[name].data, given[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise DataError(
                f"{path} is of another run: {name} is {found.dtype} of shape "
                f"{found.shape}, in this model {wanted.dtype} of shape {wanted.shape}"
            )


def layers_of(layer, path="") -> list:
    """What computes: ``[path, class, settings]`` of each layer, in order.

    Settings are said of the library's own layers, as in their repr. Those of any other
    class are None, since nobody knows whether its repr stays the same.
    """
    if isinstance(layer, FusedSequential):
        layer = layer._original  # the same network, faster
    settings = layer._settings() if _is_ours(layer) else None
    found = [[path, type(layer).__name__, settings]]
    for name, child in layer._children():
        found += layers_of(child, f"{path}.{name}" if path else name)
    return found


def loss_name(loss) -> str:
    """What a checkpoint keeps of a loss: with its options, if it is the library's."""
    return repr(loss) if _is_ours(loss) else type(loss).__name__


def _is_ours(thing) -> bool:
    return type(thing).__module__.partition(".")[0] == "cycnn"


def _check_layers(path, saved, given) -> None:
    for was, now in itertools.zip_longest(saved, given):
        if was == now:
            continue
        if was is None:
            difference = f"it has no layer {now[0]}, here {_said(now)}"
        elif now is None:
            difference = f"its layer {was[0]}, {_said(was)}, is not in this one"
        elif was[0] != now[0]:
            difference = (
                f"it has a layer {was[0]}, {_said(was)}, where this one has {now[0]}, "
                f"{_said(now)}"
            )
        else:
            where = f"its layer {was[0]}" if was[0] else "it"
            difference = f"{where} is {_said(was)}, here {_said(now)}"
        raise DataError(f"{path} is of another model: {difference}")


def _said(row) -> str:
    _, name, settings = row
    return _short(name if settings is None else f"{name}({settings})")


def _short(text) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def schedule_name(schedule) -> str:
    """What a checkpoint keeps of a schedule, to notice when another one resumes it."""
    if schedule is None:
        return "none"
    if type(schedule).__repr__ is not object.__repr__ and not hasattr(
        schedule, "__qualname__"
    ):
        return repr(schedule)
    # a function or a plain object: its repr holds an address
    return getattr(schedule, "__qualname__", type(schedule).__qualname__)


def _read(path):
    try:
        tensors, metadata = weights.read(path)
    except TypeError as error:
        raise DataError(f"{error}; it is not from Trainer.save") from None
    if "cycnn" not in metadata:
        raise DataError(
            f"{path} holds no run: expected a file that Trainer.save wrote (weights "
            f"alone are read by model.load)"
        )
    if metadata.get("sha256") != _digest(tensors, metadata["cycnn"]):
        raise DataError(f"{path} is damaged: its content does not match its digest")
    return tensors, metadata["cycnn"]


# The digest shows damage, not malice: anybody can compute it. So what the JSON holds is
# checked as well, before anything of it is used.


def _parse(path, text) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: no JSON in it ({error})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise DataError(f"{path} is damaged: its JSON has no format")
    if content["format"] != _FORMAT:
        raise DataError(
            f"{path} has format {content['format']} of cycnn {content.get('cycnn')}; "
            f"this is cycnn {__version__}, which reads format {_FORMAT}"
        )
    for name, kind in (("schedule", str), ("optimizer", dict), ("run", dict)):
        value = content.get(name)
        if not isinstance(value, kind):
            raise DataError(f"{path} is damaged: {name} is {reprlib.repr(value)}")
    for name, check in (("layers", _are_layers), ("loss", _is_text)):
        # older files do not say
        value = content.setdefault(name, None)
        if value is not None and not check(value):
            raise DataError(f"{path} is damaged: {name} is {reprlib.repr(value)}")
    return content


def _is_text(value):
    return type(value) is str


def _are_layers(value):
    return type(value) is list and len(value) > 0 and all(map(_is_layer, value))


def _is_layer(row):
    return (
        type(row) is list
        and len(row) == 3
        and _is_text(row[0])
        and _is_text(row[1])
        and (row[2] is None or _is_text(row[2]))
    )


def _is_count(value, limit=2**63):
    return type(value) is int and 0 <= value < limit


def _is_number(value):
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_figure(value):
    """What was measured; a loss may be infinite, or NaN."""
    return type(value) is float or _is_number(value)


def _is_seed(value):
    return _is_count(value, 2**64)


def _optional(check):
    return lambda value: value is None or check(value)


def _fields(**checks):
    return lambda value: (
        type(value) is dict
        and value.keys() == checks.keys()
        and all(check(value[name]) for name, check in checks.items())
    )


def _is_history(value):
    # the figures are for people; only their names and kinds matter here
    names = EpochRecord.__dataclass_fields__
    record = _fields(**{name: _optional(_is_figure) for name in names})
    return type(value) is list and all(record(row) for row in value)


_is_order = _fields(
    seed=_is_seed,
    shuffle=lambda value: type(value) is bool,
    batch_size=_is_count,
    images=_is_count,
    augment=_optional(_is_text),
)

_RUN = {
    "epoch": _is_count,
    "step": _is_count,
    "seed": _optional(_is_seed),
    "base_lr": lambda value: (
        _is_number(value)
        or (type(value) is list and len(value) > 1 and all(map(_is_number, value)))
    ),
    "seconds": _is_number,
    # older files do not say how images were augmented
    "order": _optional(
        lambda value: type(value) is dict and _is_order({"augment": None} | value)
    ),
    "tally": _optional(
        _fields(
            loss_sum=_is_figure,
            hits=lambda value: _is_count(value, 2**31),
            full=_is_count,
            rest=_is_figure,
            rest_count=_is_count,
        )
    ),
    "history": _is_history,
}


def _check_run(path, run) -> None:
    """Refuse a run that Trainer.save cannot have written."""
    for name, check in _RUN.items():
        if name not in run:
            raise DataError(f"{path} is damaged: its run has no {name}")
        if not check(run[name]):
            raise DataError(f"{path} is damaged: {name} is {reprlib.repr(run[name])}")
    if run["step"] and None in (run["order"], run["tally"]):
        raise DataError(
            f"{path} is damaged: step {run['step']} of an epoch without its order or "
            f"its sums"
        )


def _digest(tensors, text) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
