"""From layers to an ONNX file."""

from __future__ import annotations

import operator

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
        Made of Conv2d, Linear, MaxPool2d, ReLU, Sigmoid, Flatten, LogSoftmax and
        Sequential, nested or not.
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
    nodes, last_shape = _nodes(onnx.helper, model, shape)

    def value(name, shape):
        kind = onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(name, kind, ["N", *shape[1:]])

    weights = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in model.state_dict().items()
    ]
    ends = [value("input", shape)], [value("output", last_shape)]
    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "cycnn", *ends, weights),
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


def _nodes(helper, model, shape) -> tuple:
    """The nodes for an input of this shape, and the shape of the output."""
    nodes, current = [], "input"
    for prefix, layer in _steps(model):
        name, attributes = _operator(prefix, layer)
        try:
            shape = output_shape(layer, shape)
        except ShapeError as error:
            raise ShapeError(
                f"{_named(prefix, layer)}: {error} (input_shape is the shape of a "
                f"batch, such as (None, 1, 28, 28))"
            ) from None
        weights = [
            prefix + weight
            for weight in ("weight", "bias")
            if getattr(layer, weight, None) is not None
        ]
        label, output = prefix.rstrip(".") or name, prefix + "output"
        nodes.append(
            helper.make_node(name, [current, *weights], [output], label, **attributes)
        )
        current = output
    if not nodes:
        nodes.append(helper.make_node("Identity", ["input"], [""], "Identity"))
    nodes[-1].output[0] = "output"
    return nodes, shape


def _steps(layer, prefix=""):
    """``(prefix of its parameters' names, layer)`` in the order of computation."""
    # one with a forward of its own may compute something else
    if _computes_as(layer, nn.Sequential):
        for name, child in layer._children():
            yield from _steps(child, f"{prefix}{name}.")
    else:
        yield prefix, layer


def _named(prefix, layer) -> str:
    kind = type(layer).__name__
    return f"layer {prefix.rstrip('.')} ({kind})" if prefix else f"the model, {kind},"


def _computes_as(layer, kind) -> bool:
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _operator(prefix, layer) -> tuple:
    """Name and attributes of the operator that computes what a layer does."""
    for kind, (name, attributes) in _OPERATORS.items():
        if _computes_as(layer, kind):
            return name, attributes(layer)
    known = ", ".join(kind.__name__ for kind in _OPERATORS)
    raise TypeError(
        f"{_named(prefix, layer)} cannot be written as ONNX, only {known} and "
        f"Sequential can. Export the layers in front of it, and those behind it, as "
        f"models of their own"
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
    nn.Linear: ("Gemm", lambda x: {"transB": 1}),
    nn.MaxPool2d: ("MaxPool", _window),
    nn.ReLU: ("Relu", lambda x: {}),
    nn.Sigmoid: ("Sigmoid", lambda x: {}),
    nn.Flatten: ("Flatten", lambda x: {"axis": 1}),
    nn.LogSoftmax: ("LogSoftmax", lambda x: {"axis": 1}),
}
