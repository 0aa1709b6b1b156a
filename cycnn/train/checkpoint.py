"""A run in one file: safetensors, with everything that is no tensor as JSON.

    model.<name>        parameters
    optimizer.<name>    tensors of the optimizer's state
    metadata "cycnn"    JSON: format version, schedule, the optimizer's numbers, the run
    metadata "sha256"   digest of all of that, since safetensors checks sizes only

Nothing in such a file is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from .. import __version__
from ..errors import DataError
from ..nn import weights

_FORMAT = 1


def save(path, model, optimizer, schedule, run: dict) -> None:
    """Write a checkpoint; ``run`` is anything that JSON can hold."""
    tensors = {f"model.{name}": array for name, array in model.state_dict().items()}
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
            "schedule": schedule_name(schedule),
            "optimizer": numbers,
            "run": run,
        }
    )
    weights.write(path, tensors, {"cycnn": text, "sha256": _digest(tensors, text)})


def load(path, model, optimizer, schedule) -> dict:
    """Put a checkpoint into ``model`` and ``optimizer``; returns its ``run``.

    Raises
    ------
    DataError
        If anything does not fit. Model and optimizer are as they were then.
    """
    path = os.fspath(path)
    tensors, text = _read(path)
    content = json.loads(text)
    if content["format"] != _FORMAT:
        raise DataError(
            f"{path} has format {content['format']} of cycnn {content['cycnn']}; this "
            f"is cycnn {__version__}, which reads format {_FORMAT}"
        )
    saved, given = content["schedule"], schedule_name(schedule)
    if saved != given:
        raise DataError(f"{path} was made with the schedule {saved}, this is {given}")
    parameters, state = {}, dict(content["optimizer"])
    for name, array in tensors.items():
        part, name = name.split(".", 1)
        (parameters if part == "model" else state)[name] = array
    before = model.state_dict()
    try:
        # Each of the two checks everything before it writes anything.
        model.load_state_dict(parameters)
        optimizer.load_state_dict(state)
    except (ValueError, TypeError) as error:
        model.load_state_dict(before)
        raise DataError(f"{path} is of another run: {error}") from error
    return content["run"]


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
    tensors, metadata = weights.read(path)
    if "cycnn" not in metadata:
        raise DataError(
            f"{path} holds no run: expected a file that Trainer.save wrote (weights "
            f"alone are read by model.load)"
        )
    if metadata.get("sha256") != _digest(tensors, metadata["cycnn"]):
        raise DataError(f"{path} is damaged: its content does not match its digest")
    return tensors, metadata["cycnn"]


def _digest(tensors, text) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
