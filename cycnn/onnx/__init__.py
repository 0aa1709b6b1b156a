"""Networks to and from ONNX files, which other frameworks and runtimes read and write.

The package onnx (``pip install 'cycnn[onnx]'``) is imported when a function is called.
"""

from .exporter import export
from .importer import load

__all__ = ["export", "load"]
