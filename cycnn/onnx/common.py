"""What export and import share."""

from __future__ import annotations

import importlib


def onnx_package():
    """The package onnx, with the parts of it that are used here.

    Raises
    ------
    ImportError
        If it is not installed, with the command that installs it.
    """
    try:
        for part in ("checker", "helper", "numpy_helper"):
            importlib.import_module(f"onnx.{part}")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            f"ONNX files need the package onnx ({error}): pip install 'cycnn[onnx]'"
        ) from error
