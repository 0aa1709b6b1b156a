"""From an ONNX file to layers."""

from __future__ import annotations

import math
import os
from collections import Counter

import numpy as np

from .. import nn
from ..errors import DataError
from .common import onnx_package, output_shape

_OPSETS = range(9, 23)


def load(source) -> nn.Sequential:
    """Read a network from an ONNX file, to use it or to train it on.

    Parameters
    ----------
    source : str, os.PathLike, bytes or onnx.ModelProto
        A path, the content of a file, or what the package onnx has read. Opset 9 to 22.

    Returns
    -------
    Sequential
        On the default device. Its output is that of the file, for batches of any size
        even where the file has a fixed one.

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    DataError
        If the file is damaged, or has something that no layer does. The message names
        the file and the node.
    FileNotFoundError

    Notes
    -----
    The graph has to be a chain, in which each value is used once, by the next node, or
    by several, the first ones of branches that are chains again and that one node
    joins: Add, for a Residual of two branches, or Concat along the channels. Of these
    operators, all in float32:

    - Conv and ConvTranspose (two-dimensional), Pad by zeros, MaxPool, Relu, Sigmoid,
      LogSoftmax, Flatten, and Reshape where it does what Flatten does;
    - Gemm, MatMul by a constant, and Add of a constant behind these or a Conv;
    - BatchNormalization behind Conv, Gemm or MatMul, with whose weights it is merged;
    - Identity, Constant, and Dropout, which does nothing in a network that is used;
    - what rearranges a few constants, such as those of a Pad that PyTorch exported.

    Padding that is not the same on both sides is read where the same on both sides
    gives the same output, and for Conv also by zeros on one side of the filter.
    """
    onnx = onnx_package()
    from google.protobuf.message import DecodeError

    model, name = source, "the given model"
    if not isinstance(source, onnx.ModelProto):
        if isinstance(source, (bytes, bytearray, memoryview)):
            content, name = bytes(source), "the given bytes"
        else:
            name = os.fspath(source)
            with open(name, "rb") as file:
                content = file.read()
        try:
            model = onnx.ModelProto.FromString(content)
        except DecodeError as error:
            raise DataError(f"{name}: damaged, or no ONNX file ({error})") from None
    try:
        # weights that are no numbers are not what a warning would be about
        with np.errstate(all="ignore"):
            return _Reader(onnx, model).sequential()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


class _Node:
    """A node: called with the name of an attribute, it returns that."""

    def __init__(self, onnx, proto):
        self.proto = proto
        self.operator = proto.op_type
        if proto.domain not in ("", "ai.onnx"):
            self.operator = f"{proto.domain}.{proto.op_type}"
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.name = proto.name or next(iter(proto.output), "")
        self.attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute
        }

    def __call__(self, name, default=None):
        return self.attributes.get(name, default)

    def __str__(self):
        return f"node {self.name!r} ({self.operator})"

    def refused(self, why) -> DataError:
        return DataError(f"{self}: {why}")


class _Reader:
    """Walks along the chain, and along each branch of it.

    Attributes
    ----------
    layers : list of Layer
        For the nodes of the chain, or of the branch, so far.
    current : str
        Name of the value that the last of these nodes gives.
    shape : tuple or None
        Its shape with 1 for N; None where the file leaves sizes open.
    batch : int or None
        N, where the file fixes it.
    constants : dict of str to ndarray
    uses : Counter
        How many nodes, or the output, take the value of a name.
    """

    def __init__(self, onnx, model):
        self.onnx, self.graph = onnx, model.graph
        self.layers, self.constants = [], {}
        # first, because the checker would look for the files
        for tensor in model.graph.initializer:
            self._refuse_external(tensor)
        try:
            onnx.checker.check_model(model)
            self.nodes = [_Node(onnx, proto) for proto in model.graph.node]
        except (onnx.checker.ValidationError, ValueError, TypeError) as error:
            raise DataError(f"damaged, or no valid model ({error})") from None
        opsets = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
        if not opsets or opsets[0] not in _OPSETS:
            raise DataError(
                f"opset {', '.join(map(str, opsets)) or 'missing'}: expected "
                f"{_OPSETS[0]} to {_OPSETS[-1]}; onnx.version_converter converts files"
            )
        for tensor in model.graph.initializer:
            self.constants[tensor.name] = self._array(tensor)
        self.opset = opsets[0]
        self.nodes = [node for node in self.nodes if not self._is_constant(node)]
        known = *_OPERATORS, *_JOINS
        unknown = [str(n) for n in self.nodes if n.operator not in known]
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise DataError(
                f"there are no layers for {', '.join(unknown[:8])}{more}, but for "
                f"{', '.join(known)}"
            )
        self._begin()

    def _begin(self):
        """Start at the input."""
        graph = self.graph
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise DataError(
                f"the graph has {len(inputs)} inputs and {len(graph.output)} outputs, "
                f"expected one of each"
            )
        kind = inputs[0].type.tensor_type
        if kind.elem_type != self.onnx.TensorProto.FLOAT:
            raise DataError(f"input {inputs[0].name!r} is not float32")
        # 0 for a size that is open or has a name
        sizes = [size.dim_value for size in kind.shape.dim]
        self.batch = sizes[0] if sizes and sizes[0] > 0 else None
        known = len(sizes) > 1 and min(sizes[1:]) > 0
        self.shape = (1, *sizes[1:]) if known else None
        self.current, self.output = inputs[0].name, graph.output[0].name
        self.uses = Counter([self.output])
        for node in self.nodes:
            self.uses.update(node.inputs)

    def sequential(self) -> nn.Sequential:
        self.takers = {}
        for node in self.nodes:
            for name in node.inputs:
                if name and name not in self.constants:
                    self.takers.setdefault(name, []).append(node)
        self.left = list(self.nodes)
        join = self._chain()
        if join is not None:
            raise self._no_chain(join)
        if self.current != self.output:
            if self.left:
                raise self._no_chain(self.left[0])
            raise DataError(
                f"output {self.output!r} is not that of the last node, {self.current!r}"
            )
        if self.left:
            raise self._no_chain(self.left[0])
        return nn.Sequential(*self.layers)

    def _is_constant(self, node) -> bool:
        """Whether the node gives a constant, which is then known."""
        if node.operator == "Constant":
            found = self._constant(node)
        elif not all(name in self.constants for name in node.inputs if name):
            return False
        elif node.operator == "Identity":
            found = self.constants[node.inputs[0]]
        elif node.operator in _OF_CONSTANTS and len(node.outputs) == 1:
            found = self._computed(node)
        else:
            return False
        self.constants[node.outputs[0]] = found
        return True

    def _computed(self, node) -> np.ndarray:
        """What a node makes of constants, such as PyTorch's exporter of a padding."""
        from onnx.reference import ReferenceEvaluator

        given = {name: self.constants[name] for name in node.inputs if name}
        # a file of a few bytes must not ask for an array that fills the memory
        numbers = sum(array.size for array in given.values())
        if node.operator == "ConstantOfShape":
            shape = self.constants[node.inputs[0]].ravel().tolist()
            numbers += math.prod(map(abs, map(int, shape)))
        if numbers > _FEW and node.operator != "Transpose":
            raise node.refused(
                f"of {numbers} constant numbers, only {_FEW} are supported"
            )
        try:
            found = ReferenceEvaluator(node.proto, opsets={"": self.opset})
            return np.asarray(found.run(None, given)[0])
        except _FAILURES as error:
            raise node.refused(f"cannot be computed ({error})") from None

    def _chain(self):
        """Read nodes from ``current`` on, up to one that joins branches: returned.

        None where the chain ends.
        """
        while self.current != self.output or self.current in self.takers:
            takers = self.takers.get(self.current, ())
            if not takers:
                return None
            if self.uses[self.current] > 1:
                self._fork(takers)
            elif self._joins(takers[0]):
                return takers[0]
            else:
                self._step(takers[0])
        return None

    def _step(self, node):
        self._check_step(node)
        count = len(self.layers)
        try:
            _OPERATORS[node.operator](self, node)
            if self.shape is not None and len(self.layers) > count:
                self.shape = output_shape(self.layers[-1], self.shape)
        except DataError:
            raise
        except (ValueError, TypeError) as error:  # from the layer
            raise node.refused(error) from None
        self._pass(node)

    def _pass(self, node):
        self.left.remove(node)
        self.current = node.outputs[0]

    def _joins(self, node) -> bool:
        if node.operator == "Concat":
            return True
        computed = [name for name in node.inputs if name not in self.constants]
        return node.operator == "Add" and len(computed) > 1

    def _fork(self, takers):
        """Read the branches behind ``current``, and the node that joins them."""
        start, shape, before = self.current, self.shape, self.layers
        if self.uses[start] != len(takers):  # it is the output, too
            raise self._no_chain(takers[0])
        ends = []  # of branches: (joined by, value, layers)
        for taker in takers:
            if not self._joins(taker) and takers.count(taker) > 1:
                raise self._no_chain(taker)
            self.current, self.shape, self.layers = start, shape, []
            join = taker
            if not self._joins(taker):
                self._step(taker)
                join = self._chain()
            ends.append((join, self.current, self.layers))
        while True:
            self.current = start
            node, branches = self._joined(ends, takers)
            block = self._block(node, branches)
            try:
                self.shape = None if shape is None else output_shape(block, shape)
            except ValueError as error:
                raise node.refused(error) from None
            self._pass(node)
            if not ends:
                self.layers = [*before, block]
                return
            # a block that is the first of a longer branch
            self.layers = [block]
            join = self._chain()
            ends.append((join, self.current, self.layers))

    def _joined(self, ends, takers):
        """A node whose inputs are ends of branches; these are taken out of ``ends``.

        Returns the node, and its branches in the order in which it joins them.
        """
        for node in [join for join, _, _ in ends if join is not None]:
            here = [end for end in ends if end[0] is node]
            if sorted(value for _, value, _ in here) != sorted(node.inputs):
                continue
            branches = []
            for name in node.inputs:
                end = next(end for end in here if end[1] == name)
                here.remove(end)
                ends.remove(end)
                branches.append(nn.Sequential(*end[2]))
            return node, branches
        raise self._no_chain(takers[0])

    def _block(self, node, branches):
        if node.operator == "Concat":
            axis = node("axis", 1)
            if axis != 1:
                raise node.refused(
                    f"axis is {axis}, only 1, the channels, is supported"
                )
            return nn.Concat(*branches)
        if not any(map(len, branches)):
            raise self._no_chain(node)
        # an empty way is the shortcut, whichever comes first
        body, shortcut = sorted(branches, key=lambda branch: not len(branch))
        return nn.Residual(body, shortcut if len(shortcut) else None)

    def _no_chain(self, node) -> DataError:
        return node.refused(
            f"its input is {node.inputs[0] if node.inputs else ''!r}; the node in "
            f"front of it gives {self.current!r}, which is used "
            f"{self.uses[self.current]} times: only chains are supported, each value "
            f"used once, by the next node, and branches of chains that one Add or "
            f"Concat joins"
        )

    def _check_step(self, node):
        if node.operator == "Add" and node.inputs[0] in self.constants:
            node.inputs.reverse()
        if not node.inputs or node.inputs[0] != self.current:
            raise self._no_chain(node)
        for name in node.outputs[1:]:
            if self.uses[name] or name and node.operator == "BatchNormalization":
                raise node.refused(f"its output {name!r} is not supported")

    # constants

    def _refuse_external(self, tensor):
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise DataError(
                f"tensor {tensor.name!r} lies in another file. To read both: "
                f"cycnn.onnx.load(onnx.load(path)). torch.onnx.export makes one file "
                f"with external_data=False"
            )

    def _array(self, tensor) -> np.ndarray:
        self._refuse_external(tensor)
        try:
            array = self.onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"tensor {tensor.name!r} is damaged ({error})") from None
        if array.shape != tuple(tensor.dims):
            raise DataError(f"tensor {tensor.name!r} has a negative size")
        return array

    def _constant(self, node) -> np.ndarray:
        if "value" in node.attributes:
            return self._array(node("value"))
        for kind, dtype in (("float", np.float32), ("int", np.int64)):
            for name in (f"value_{kind}", f"value_{kind}s"):
                if name in node.attributes:
                    return np.array(node(name), dtype)
        raise node.refused("only tensors and numbers are supported")

    def _weight(self, node, position, dtype="float32", optional=False):
        """The constant that is an input of the node, or None where it is left out."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        if optional and not name:
            return None
        array = self.constants.get(name)
        if array is None or array.dtype != dtype:
            kind = "computed" if array is None else array.dtype
            raise node.refused(
                f"tensor {name!r} is {kind}, only constants of {dtype} are supported"
            )
        return array

    def _channels(self, node, position, layer):
        """An input that has one number for each channel of the output of ``layer``."""
        array, count = self._weight(node, position), layer.weight.shape[0]
        shape = (1, count, 1, 1) if isinstance(layer, nn.Conv2d) else (1, count)
        if node.operator == "BatchNormalization":
            shape = (count,)
        try:
            return np.broadcast_to(array, shape).reshape(count)
        except ValueError:
            raise node.refused(
                f"{node.inputs[position]!r} has shape {array.shape}: expected one "
                f"number for each of {count} channels"
            ) from None

    # layers with weights

    def _conv(self, node):
        weight = self._weight(node, 1)
        if weight.ndim != 4:
            raise node.refused(f"its weight of shape {weight.shape} has not 4 axes")
        if tuple(node("kernel_shape", weight.shape[2:])) != weight.shape[2:]:
            raise node.refused(f"kernel_shape differs from its weight, {weight.shape}")
        stride, dilation, pads = self._windows(node, weight.shape[2:])
        for axis, (before, after) in enumerate(pads):
            # With the larger padding on both sides, zeros at one end of the filter make
            # up for the difference.
            taps, rest = divmod(abs(before - after), dilation[axis])
            if rest or taps > weight.shape[2 + axis]:
                raise node.refused(f"its padding is too uneven, {before} and {after}")
            zeros = [(0, 0)] * 4
            zeros[2 + axis] = (taps, 0) if before < after else (0, taps)
            weight = np.pad(weight, zeros)
        outputs, inputs, *kernel = weight.shape
        groups, padding = node("group", 1), [max(pair) for pair in pads]
        bias = self._weight(node, 2, optional=True)
        layer = nn.Conv2d(
            inputs * groups,
            *(outputs, kernel, stride, padding, dilation, groups, bias is not None),
        )
        self.layers.append(_filled(layer, weight, bias))

    def _conv_transpose(self, node):
        weight = self._weight(node, 1)
        if weight.ndim != 4:
            raise node.refused(f"its weight of shape {weight.shape} has not 4 axes")
        kernel = weight.shape[2:]
        if tuple(node("kernel_shape", kernel)) != kernel:
            raise node.refused(f"kernel_shape differs from its weight, {weight.shape}")
        stride, dilation = node("strides", [1, 1]), node("dilations", [1, 1])
        pads, more = node("pads", [0] * 4), list(node("output_padding", [0, 0]))
        groups, auto = node("group", 1), node("auto_pad", b"NOTSET").decode()
        if not len(stride) == len(dilation) == len(more) == len(pads) / 2 == 2:
            raise node.refused("only images of two dimensions are supported")
        numbers = *stride, *dilation, *kernel, groups
        if min(numbers) < 1 or min(*pads, *more) < 0 or max(*numbers, *pads) >= 2**31:
            raise node.refused("a number in its attributes is out of range")
        wanted = node("output_shape")
        if wanted is not None or auto not in ("NOTSET", "VALID"):
            raise node.refused(
                "output_shape and auto_pad are not supported: give pads and "
                "output_padding"
            )
        padding = []
        for axis in range(2):
            before, after = pads[axis], pads[2 + axis]
            if auto == "VALID":
                before = after = 0
            # what is not cut off behind is as many more
            more[axis] += before - after
            padding.append(before)
        if any(not 0 <= m < s for m, s in zip(more, stride)):
            raise node.refused(
                f"pads {list(pads)} and output_padding come to {more} more rows and "
                f"columns at the end: expected 0 or more, less than the stride"
            )
        bias = self._weight(node, 2, optional=True)
        layer = nn.ConvTranspose2d(
            weight.shape[0],
            weight.shape[1] * groups,
            kernel,
            stride,
            padding,
            more,
            groups,
            bias is not None,
            dilation,
        )
        self.layers.append(_filled(layer, weight, bias))

    def _pad(self, node):
        if node("mode", b"constant") != b"constant":
            raise node.refused(
                f"mode is {node('mode').decode()!r}, only 'constant' is supported"
            )
        pads, value = node("pads"), node("value", 0.0)
        if pads is None:
            pads = self._weight(node, 1, "int64").tolist()
            given = self._weight(node, 2, optional=True)
            value = 0.0 if given is None else given.item()
            axes = self._weight(node, 3, "int64", optional=True)
            if axes is not None and axes.tolist() not in ([0, 1, 2, 3], [2, 3]):
                raise node.refused(
                    f"axes are {axes.tolist()}, only all, or the last two, "
                    f"are supported"
                )
            if axes is not None and len(axes) == 2 and len(pads) == 4:
                pads = [0, 0, *pads[:2], 0, 0, *pads[2:]]
        if value != 0 or len(pads) != 8 or any((*pads[:2], *pads[4:6])):
            raise node.refused(
                f"pads {list(pads)} with {value}: only zeros around images "
                f"(N, C, H, W) are supported"
            )
        _, _, top, left, _, _, bottom, right = pads
        self.layers.append(nn.ZeroPad2d((left, right, top, bottom)))

    def _gemm(self, node):
        weight = self._weight(node, 1)
        if weight.ndim != 2 or node("transA", 0):
            raise node.refused(
                f"only products (N, inputs) x (inputs, outputs) are supported: its "
                f"weight has shape {weight.shape}, transA is {node('transA', 0)}"
            )
        weight = weight if node("transB", 0) else weight.T
        bias = self._weight(node, 2, optional=True)
        layer = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        if bias is not None:
            bias = self._channels(node, 2, layer) * np.float32(node("beta", 1.0))
        weight = weight * np.float32(node("alpha", 1.0))
        self.layers.append(_filled(layer, weight, bias))

    def _add(self, node):
        layer = self._last(node)
        added = self._channels(node, 1, layer)
        bias = added if layer.bias is None else layer.bias.data.numpy() + added
        self.layers[-1] = _filled(_with_bias(layer), layer.weight.data.numpy(), bias)

    def _batch_normalization(self, node):
        """y = gamma (x - mean) / sqrt(variance + epsilon) + beta, in float64."""
        if node("training_mode", 0):
            raise node.refused("training_mode is set: export the network for inference")
        layer = self._last(node)
        gamma, beta, mean, variance = (
            self._channels(node, i, layer).astype(np.float64) for i in range(1, 5)
        )
        variance += node("epsilon", 1e-5)
        if not (variance > 0).all():
            raise node.refused("a variance is negative or no number")
        scale = gamma / np.sqrt(variance)
        weight = layer.weight.data.numpy()
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = 0 if layer.bias is None else layer.bias.data.numpy()
        bias = scale * (bias - mean) + beta
        self.layers[-1] = _filled(_with_bias(layer), weight, bias)

    def _last(self, node):
        layer = self.layers[-1] if self.layers else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            raise node.refused("is supported behind Conv, Gemm and MatMul only")
        return layer

    # windows

    def _windows(self, node, kernel) -> tuple:
        """Stride, dilation and, for height and width, padding (before, after).

        The two are equal where that gives the same output.
        """
        stride, dilation = node("strides", [1, 1]), node("dilations", [1, 1])
        pads, auto = node("pads", [0] * 4), node("auto_pad", b"NOTSET").decode()
        if not len(kernel) == len(stride) == len(dilation) == len(pads) / 2 == 2:
            raise node.refused("only images of two dimensions are supported")
        sizes = *stride, *dilation, *kernel, node("group", 1)
        if min(sizes) < 1 or min(pads) < 0 or max(*sizes, *pads) >= 2**31:
            raise node.refused("a number in its attributes is out of range")
        if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise node.refused(f"auto_pad is {auto!r}")
        image = self.shape[2:] if self.shape and len(self.shape) == 4 else (None, None)
        found = []
        for axis, (step, size) in enumerate(zip(stride, image)):
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            before, after = pads[axis], pads[2 + axis]
            if auto == "VALID":
                before = after = 0
            elif auto != "NOTSET":  # as much as ceil(size / step) windows need
                if step > 1 and size is None:
                    raise node.refused(
                        f"auto_pad={auto} with a stride depends on the size of the "
                        f"image, which the file leaves open"
                    )
                last = (-(-size // step) - 1) * step + 1 - size if step > 1 else 0
                total = max(last + reach - 1, 0)
                before, after = total // 2, total - total // 2
                if auto == "SAME_LOWER":
                    before, after = after, before
            if node("ceil_mode", 0):
                after += step - 1
            if size is not None:
                room = size + before - reach
                if (room + before) // step == (room + after) // step:
                    after = before
            found.append((before, after))
        return stride, dilation, found

    def _max_pool(self, node):
        kernel = node("kernel_shape")
        stride, dilation, pads = self._windows(node, kernel)
        if set(dilation) != {1}:
            raise node.refused("only dilations of 1 are supported")
        if any(before != after for before, after in pads):
            raise node.refused(
                f"its padding on the two sides, {pads} with what auto_pad or ceil_mode "
                f"add, must be the same or give the same"
            )
        self.layers.append(nn.MaxPool2d(kernel, stride, [pair[0] for pair in pads]))

    # the others

    def _flatten(self, node):
        if node("axis", 1) != 1:
            raise node.refused(f"axis is {node('axis')}, only 1 is supported")
        self.layers.append(nn.Flatten())

    def _reshape(self, node):
        shape = self._weight(node, 1, "int64").tolist()
        rows, columns = shape if len(shape) == 2 else (-1, 0)
        keeps_n = rows == self.batch if rows else not node("allowzero", 0)
        rest = math.prod(self.shape[1:]) if self.shape else None
        if not (keeps_n and columns in (-1, rest) or rows == -1 and columns == rest):
            raise node.refused(
                f"to {shape}, only to (0, -1), or where the file says how large its "
                f"input is to (-1, features), is supported"
            )
        self.layers.append(nn.Flatten())

    def _log_softmax(self, node):
        # On (N, F), what the layer takes, the old default (1) and the new one (-1)
        # are the same.
        if node("axis", 1) not in (1, -1):
            raise node.refused(f"axis is {node('axis')}, only 1 is supported")
        self.layers.append(nn.LogSoftmax())

    def _dropout(self, node):
        training = self._weight(node, 2, "bool", optional=True)
        if training is not None and training.any():
            raise node.refused("training_mode is set: export the network for inference")


_OPERATORS = {
    "Add": _Reader._add,
    "BatchNormalization": _Reader._batch_normalization,
    "Constant": None,
    "Conv": _Reader._conv,
    "ConvTranspose": _Reader._conv_transpose,
    "Dropout": _Reader._dropout,
    "Flatten": _Reader._flatten,
    "Gemm": _Reader._gemm,
    "Identity": lambda reader, node: None,
    "LogSoftmax": _Reader._log_softmax,
    "MatMul": _Reader._gemm,
    "MaxPool": _Reader._max_pool,
    "Pad": _Reader._pad,
    "Relu": lambda reader, node: reader.layers.append(nn.ReLU()),
    "Reshape": _Reader._reshape,
    "Sigmoid": lambda reader, node: reader.layers.append(nn.Sigmoid()),
}


# what is computed where all inputs are constants, of so many numbers at most
_OF_CONSTANTS = (
    "Cast", "Concat", "ConstantOfShape", "Gather", "Mul", "Reshape", "Shape", "Slice",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
)  # fmt: skip
_FEW = 1 << 10
# what wrong attributes lead to there
_FAILURES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_JOINS = ("Concat",)  # beside Add, which may also add a constant


def _with_bias(layer):
    """A layer of the same settings, with a bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features)
    settings = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return nn.Conv2d(layer.in_channels, layer.out_channels, *settings, layer.groups)


def _filled(layer, weight, bias):
    layer.weight.data.copy_(np.asarray(weight, np.float32))
    if bias is not None:
        layer.bias.data.copy_(np.asarray(bias, np.float32))
    return layer
