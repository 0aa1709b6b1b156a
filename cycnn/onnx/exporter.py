"""From layers to an ONNX file."""

from __future__ import annotations

import operator

import numpy as np

from .. import __version__, nn
from ..errors import ShapeError
from ..nn.weights import replace_file
from .common import onnx_package, output_shape

# Before 11 a Gemm has to have a bias.
_OPSETS = range(11, 23)


def export(model, path, input_shape, opset=17):
    """Write a model to an ONNX file.

    Parameters
    ----------
    model : Layer
        Made of Conv2d, ConvTranspose2d, Linear, MaxPool2d, ZeroPad2d, ReLU, Sigmoid,
        Flatten and LogSoftmax in Sequential, Residual and Concat, nested or not.
    path : str or os.PathLike
        The file appears whole or not at all.
    input_shape : tuple
        Shape of a batch, such as ``(None, 1, 28, 28)``. Its first size does not
        matter: the file takes batches of any size.
    opset : int
        Version of the operators, 11 to 22.

    Returns
    -------
    onnx.ModelProto
        What was written. Input and output are called "input" and "output", their first
        axis "N"; weights have their names in :meth:`~cycnn.nn.Layer.state_dict`. The
        version of the format (IR) is 8, or what an opset above 18 needs.

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    TypeError
        If the model has a layer that is not in the list above. The message names it.
    ShapeError
        If a layer does not take what it would be given.
    ValueError
        If there is no such opset.
    """
    onnx = onnx_package()
    if opset not in _OPSETS:
        raise ValueError(
            f"opset is {opset!r}: expected {_OPSETS[0]} to {_OPSETS[-1]}, 17 for most "
            f"programs that read ONNX"
        )
    shape = _checked(input_shape)
    writer = _Writer(onnx.helper)
    last_shape = writer.whole(model, shape)

    def value(name, shape):
        kind = onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(name, kind, ["N", *shape[1:]])

    weights = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (*model.state_dict().items(), *writer.constants)
    ]
    ends = [value("input", shape)], [value("output", last_shape)]
    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(writer.nodes, "cycnn", *ends, weights),
        opset_imports=opsets,
        ir_version=max(8, onnx.helper.find_min_ir_version_for(opsets)),
        producer_name="cycnn",
        producer_version=__version__,
    )
    onnx.checker.check_model(proto, full_check=True)
    replace_file(path, proto.SerializeToString(deterministic=True))
    return proto


def _checked(input_shape) -> tuple:
    """The shape of a batch of one."""
    try:
        shape = (1, *map(operator.index, input_shape[1:]))
    except TypeError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ShapeError(
            f"input_shape is {input_shape!r}: expected the shape of a batch, such as "
            f"(None, 1, 28, 28)"
        )
    return shape


class _Writer:
    """Turns layers into nodes, in the order of computation.

    Attributes
    ----------
    nodes : list of NodeProto
    constants : list of (str, ndarray)
        Inputs of nodes that are no weights.
    """

    def __init__(self, helper):
        self.helper = helper
        self.nodes, self.constants = [], []

    def whole(self, model, shape) -> tuple:
        """Write a model for an input of this shape; returns that of the output."""
        _, shape = self.layer(model, "", "input", shape)
        if not self.nodes:
            self.node("Identity", ["input"], "")
        self.nodes[-1].output[0] = "output"
        return shape

    def node(self, name, inputs, prefix, **attributes) -> str:
        label, output = prefix.rstrip(".") or name, prefix + "output"
        made = self.helper.make_node(name, inputs, [output], label, **attributes)
        self.nodes.append(made)
        return output

    def layer(self, layer, prefix, current, shape) -> tuple:
        """Write a layer whose input is ``current``; returns its output and its shape.

        ``prefix`` is that of its parameters' names.
        """
        # one with a forward of its own may compute something else
        if _computes_as(layer, nn.Sequential):
            for name, child in layer._children():
                current, shape = self.layer(child, f"{prefix}{name}.", current, shape)
            return current, shape
        if _computes_as(layer, nn.Residual) or _computes_as(layer, nn.Concat):
            return self.block(layer, prefix, current, shape)
        name, attributes = _operator(prefix, layer)
        after = self.shape_after(layer, prefix, shape)
        inputs = [current]
        for weight in ("weight", "bias"):
            if getattr(layer, weight, None) is not None:
                inputs.append(prefix + weight)
        if isinstance(layer, nn.ZeroPad2d):
            left, right, top, bottom = layer.padding
            pads = np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)
            self.constants.append((f"{prefix}pads", pads))
            inputs.append(f"{prefix}pads")
        return self.node(name, inputs, prefix, **attributes(layer)), after

    def block(self, layer, prefix, current, shape) -> tuple:
        """A Residual or a Concat: its branches, then what joins them."""
        ends = [
            self.layer(branch, f"{prefix}{name}.", current, shape)[0]
            for name, branch in layer._children()
        ]
        after = self.shape_after(layer, prefix, shape)
        if isinstance(layer, nn.Concat):
            return self.node("Concat", ends, prefix, axis=1), after
        if layer.shortcut is None:
            ends.append(current)
        return self.node("Add", ends, prefix), after

    def shape_after(self, layer, prefix, shape) -> tuple:
        try:
            return output_shape(layer, shape)
        except ShapeError as error:
            raise ShapeError(
                f"{_named(prefix, layer)}: {error} (input_shape is the shape of a "
                f"batch, such as (None, 1, 28, 28))"
            ) from None


def _named(prefix, layer) -> str:
    kind = type(layer).__name__
    return f"layer {prefix.rstrip('.')} ({kind})" if prefix else f"the model, {kind},"


def _computes_as(layer, kind) -> bool:
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _operator(prefix, layer) -> tuple:
    """Name of the operator that computes what a layer does, and its attributes."""
    for kind, (name, attributes) in _OPERATORS.items():
        if _computes_as(layer, kind):
            return name, attributes
    known = ", ".join(kind.__name__ for kind in _OPERATORS)
    raise TypeError(
        f"{_named(prefix, layer)} cannot be written as ONNX, only {known}, Sequential, "
        f"Residual and Concat can. Export the layers in front of it, and those behind "
        f"it, as models of their own"
    )


def _window(layer) -> dict:
    top, left = layer.padding
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": (top, left, top, left),
    }


_OPERATORS = {
    nn.Conv2d: (
        "Conv",
        lambda x: {**_window(x), "dilations": x.dilation, "group": x.groups},
    ),
    nn.ConvTranspose2d: (
        "ConvTranspose",
        lambda x: {
            **_window(x),
            "dilations": x.dilation,
            "group": x.groups,
            "output_padding": x.output_padding,
        },
    ),
    nn.ZeroPad2d: ("Pad", lambda x: {}),
    nn.Linear: ("Gemm", lambda x: {"transB": 1}),
    nn.MaxPool2d: ("MaxPool", _window),
    nn.ReLU: ("Relu", lambda x: {}),
    nn.Sigmoid: ("Sigmoid", lambda x: {}),
    nn.Flatten: ("Flatten", lambda x: {"axis": 1}),
    nn.LogSoftmax: ("LogSoftmax", lambda x: {"axis": 1}),
}
