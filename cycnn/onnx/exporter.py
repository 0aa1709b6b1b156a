"""From layers to an ONNX file."""

from __future__ import annotations

import math
import operator

import numpy as np

from .. import __version__, nn, shapes
from ..errors import ShapeError
from ..nn.output_shape import output_shape
from ..nn.weights import replace_file
from .common import onnx_package

# Before 11 a Gemm has to have a bias.
_OPSETS = range(11, 23)


def export(model, path, input_shape, opset=17):
    """Write a model to an ONNX file, as it computes in evaluation mode.

    Parameters
    ----------
    model : Layer
        Made of the library's layers; its own ones cannot be written.
    path : str or os.PathLike
        The file appears whole or not at all.
    input_shape : tuple
        Shape of a batch, such as ``(None, 1, 28, 28)``. Its first size does not
        matter: the file takes batches of any size.
    opset : int
        Version of the operators, 11 to 22; LayerNorm needs 17. Before 20 there is no
        operator for GELU, and it is written in simpler ones, as SiLU always is.

    Returns
    -------
    onnx.ModelProto
        What was written. Input and output are called "input" and "output", their first
        axis "N"; weights have their names in :meth:`~cycnn.nn.Layer.state_dict`, where
        what only training needs is left out. The version of the format (IR) is 8, or
        what an opset above 18 needs.

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    TypeError
        If the model has a layer of one's own. The message names it.
    ShapeError
        If a layer does not take what it would be given.
    ValueError
        If there is no such opset, it has no operator for a layer, or a BatchNorm2d has
        no running statistics.
    """
    onnx = onnx_package()
    if opset not in _OPSETS:
        raise ValueError(
            f"opset is {opset!r}: expected {_OPSETS[0]} to {_OPSETS[-1]}, 17 for most "
            f"programs that read ONNX"
        )
    shape = _checked(input_shape)
    writer = _Writer(onnx.helper, opset)
    last_shape = writer.whole(model, shape)

    def value(name, shape):
        kind = onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(name, kind, ["N", *shape[1:]])

    used = {name for node in writer.nodes for name in node.input}
    weights = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (model.state_dict() | writer.constants).items()
        if name in used
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
    constants : dict of str to ndarray
        Inputs of nodes that are no weights.
    shape : tuple
        Of the input of the layer that is being written, with 1 for N.
    """

    def __init__(self, helper, opset):
        self.helper, self.opset = helper, opset
        self.nodes, self.constants = [], {}

    def whole(self, model, shape) -> tuple:
        """Write a model for an input of this shape; returns that of the output."""
        _, shape = self.layer(model, "", "input", shape)
        if not self.nodes:
            self.node("Identity", ["input"], "")
        self.nodes[-1].output[0] = "output"
        return shape

    def node(self, name, inputs, prefix, part="", **attributes) -> str:
        """Write a node for a layer, or for a part of it that has a name."""
        label = (prefix + part).rstrip(".") or name
        output = prefix + (part or "output")
        made = self.helper.make_node(name, inputs, [output], label, **attributes)
        self.nodes.append(made)
        return output

    def constant(self, prefix, name, array) -> str:
        self.constants[prefix + name] = np.asarray(array)
        return prefix + name

    def weight(self, layer, prefix, name, default) -> str:
        """A parameter or buffer, or the array that does the same where it has none."""
        if getattr(layer, name) is None:
            return self.constant(prefix, name, default)
        return prefix + name

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
        write = _written(prefix, layer)
        after, self.shape = self.shape_after(layer, prefix, shape), shape
        return write(self, layer, prefix, current), after

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


def _written(prefix, layer):
    """The function that writes a layer."""
    for kind, write in _LAYERS.items():
        if _computes_as(layer, kind):
            return write
    known = ", ".join(kind.__name__ for kind in _LAYERS)
    raise TypeError(
        f"{_named(prefix, layer)} cannot be written as ONNX, only {known}, Sequential, "
        f"Residual and Concat can. Export the layers in front of it, and those behind "
        f"it, as models of their own"
    )


def _one(name, attributes=lambda layer: {}):
    """A layer that is one operator, with a weight and a bias if it has them."""

    def write(writer, layer, prefix, current):
        inputs = [current]
        for weight in ("weight", "bias"):
            if getattr(layer, weight, None) is not None:
                inputs.append(prefix + weight)
        return writer.node(name, inputs, prefix, **attributes(layer))

    return write


def _window(layer) -> dict:
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": (*layer.padding[:2], *layer.padding[-2:]),
    }


def _pool2d(name, attributes=lambda layer: {}):
    """A pooling; ceil_mode is written where the output has a window more by it."""

    def write(writer, layer, prefix, current):
        settings = {**_window(layer), **attributes(layer)}
        ends = zip(layer.padding[:2], layer.padding[-2:])
        axes = [
            (*axis, *pads)
            for *axis, pads in zip(
                writer.shape[2:], layer.kernel_size, layer.stride, ends
            )
        ]
        counts = [shapes.pooled_size(*axis, layer.ceil_mode) for axis in axes]
        if counts != [shapes.pooled_size(*axis, False) for axis in axes]:
            settings["ceil_mode"] = 1
            for count, (size, window, step, *pads) in zip(counts, axes):
                room = size + sum(pads) - window
                if writer.opset < 22 and count != shapes.ceil_div(room, step) + 1:
                    raise ValueError(
                        f"{_named(prefix, layer)} needs opset 22 for images of "
                        f"{writer.shape[2:]}, opset is {writer.opset}: before it "
                        f"ceil_mode has windows that begin behind the image"
                    )
        return writer.node(name, [current], prefix, **settings)

    return write


def _zero_pad2d(writer, layer, prefix, current):
    left, right, top, bottom = layer.padding
    pads = np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)
    inputs = [current, writer.constant(prefix, "pads", pads)]
    return writer.node("Pad", inputs, prefix)


def _dropout(writer, layer, prefix, current):
    # does nothing without an input that says that it is training
    if writer.opset < 12:
        return writer.node("Dropout", [current], prefix, ratio=layer.p)
    ratio = writer.constant(prefix, "ratio", np.float32(layer.p))
    return writer.node("Dropout", [current, ratio], prefix)


def _batch_norm2d(writer, layer, prefix, current):
    if layer.running_mean is None:
        raise ValueError(
            f"{_named(prefix, layer)} has no running statistics: its output depends on "
            f"the other images of the batch, and no operator does that. Train it with "
            f"track_running_stats=True"
        )
    ones = np.ones(layer.num_features, np.float32)
    inputs = [
        current,
        writer.weight(layer, prefix, "weight", ones),
        writer.weight(layer, prefix, "bias", 0 * ones),
        prefix + "running_mean",
        prefix + "running_var",
    ]
    settings = {"epsilon": layer.eps}
    if layer.momentum is not None:
        settings["momentum"] = 1 - layer.momentum  # ONNX: of the old statistics
    return writer.node("BatchNormalization", inputs, prefix, **settings)


def _layer_norm(writer, layer, prefix, current):
    if writer.opset < 17:
        raise ValueError(
            f"{_named(prefix, layer)} needs opset 17 or later, opset is {writer.opset}"
        )
    ones = np.ones(layer.normalized_shape, np.float32)
    inputs = [current, writer.weight(layer, prefix, "weight", ones)]
    if layer.bias is not None:
        inputs.append(prefix + "bias")
    settings = {"axis": -len(layer.normalized_shape), "epsilon": layer.eps}
    return writer.node("LayerNormalization", inputs, prefix, **settings)


def _hardtanh(writer, layer, prefix, current):
    inputs, most = [current], float(np.finfo(np.float32).max)
    for name, end in (("min", layer.min_val), ("max", layer.max_val)):
        if abs(end) > most:  # no end: the input is left out
            inputs.append("")
        else:
            inputs.append(writer.constant(prefix, name, np.float32(end)))
    return writer.node("Clip", inputs, prefix)


def _silu(writer, layer, prefix, current):
    gate = writer.node("Sigmoid", [current], prefix, "sigmoid")
    return writer.node("Mul", [current, gate], prefix)


def _gelu(writer, layer, prefix, current):
    """x Phi(x), with Phi = (1 + s) / 2 and s = erf(x / sqrt 2), or its approximation
    s = tanh(sqrt(2 / pi) (x + 0.044715 x^3)).
    """
    if writer.opset >= 20:
        return writer.node("Gelu", [current], prefix, approximate=layer.approximate)

    def number(name, value):
        return writer.constant(prefix, name, np.float32(value))

    def node(name, part, *inputs):
        return writer.node(name, inputs, prefix, part)

    if layer.approximate == "none":
        scaled = node("Div", "scaled", current, number("sqrt2", math.sqrt(2)))
        s = node("Erf", "erf", scaled)
    else:
        cube = node("Pow", "cube", current, number("three", 3))
        cube = node("Mul", "small_cube", cube, number("small", 0.044715))
        inner = node("Add", "sum", current, cube)
        factor = number("factor", math.sqrt(2 / math.pi))
        s = node("Tanh", "tanh", node("Mul", "scaled", inner, factor))
    twice = node("Add", "twice_phi", s, number("one", 1))
    product = node("Mul", "product", current, twice)
    return node("Mul", "", product, number("half", 0.5))


_LAYERS = {
    nn.Conv2d: _one(
        "Conv", lambda x: {**_window(x), "dilations": x.dilation, "group": x.groups}
    ),
    nn.ConvTranspose2d: _one(
        "ConvTranspose",
        lambda x: {
            **_window(x),
            "dilations": x.dilation,
            "group": x.groups,
            "output_padding": x.output_padding,
        },
    ),
    nn.ZeroPad2d: _zero_pad2d,
    nn.Linear: _one("Gemm", lambda x: {"transB": 1}),
    nn.MaxPool2d: _pool2d("MaxPool"),
    nn.AvgPool2d: _pool2d(
        "AveragePool", lambda x: {"count_include_pad": int(x.count_include_pad)}
    ),
    nn.AdaptiveAvgPool2d: _one("GlobalAveragePool"),
    nn.BatchNorm2d: _batch_norm2d,
    nn.LayerNorm: _layer_norm,
    nn.Dropout: _dropout,
    nn.ReLU: _one("Relu"),
    nn.LeakyReLU: _one("LeakyRelu", lambda x: {"alpha": x.negative_slope}),
    nn.Hardtanh: _hardtanh,
    nn.Sigmoid: _one("Sigmoid"),
    nn.Tanh: _one("Tanh"),
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.Flatten: _one("Flatten", lambda x: {"axis": 1}),
    nn.Softmax: _one("Softmax", lambda x: {"axis": 1}),
    nn.LogSoftmax: _one("LogSoftmax", lambda x: {"axis": 1}),
}
