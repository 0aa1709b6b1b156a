"""From an ONNX file to layers."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter

import numpy as np

from .. import nn, shapes
from ..errors import DataError
from ..nn.output_shape import output_shape
from ..ops import reference
from .common import onnx_package

_OPSETS = range(9, 23)


def load(source) -> nn.Sequential:
    """Read a network from an ONNX file, to use it or, after ``train()``, to train it.

    Parameters
    ----------
    source : str, os.PathLike, bytes or onnx.ModelProto
        A path, the content of a file, or what the package onnx has read. Opset 9 to 22.
        Weights in files of their own, as PyTorch's exporter writes them, are read where
        a path is given, from the folder of the model and those inside of it only.

    Returns
    -------
    Sequential
        On the default device, in evaluation mode. Its output is that of the file, for
        batches of any size even where the file has a fixed one.

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    DataError
        If the file is damaged, or has something that no layer does. The message names
        the file and the node.
    FileNotFoundError
        If the file is not there, or one with its weights.

    Notes
    -----
    The graph has to be a chain, in which each value is used once, by the next node, or
    by several, the first ones of branches that are chains again and that one node
    joins: Add, for a Residual of two branches, or Concat along the channels. Of these
    operators, all in float32:

    - Conv and ConvTranspose (two-dimensional), Pad by zeros, MaxPool, AveragePool,
      GlobalAveragePool (or ReduceMean), Relu, LeakyRelu, Sigmoid, Tanh, Softmax,
      LogSoftmax, Gelu, LayerNormalization, Flatten, and Reshape where it does what
      Flatten does;
    - Gemm, MatMul by a constant, and Add of a constant behind these, a Conv, a
      ConvTranspose or a BatchNormalization;
    - BatchNormalization of images, and behind Gemm or MatMul, with whose weights it is
      merged;
    - GELU and SiLU where they are written in simpler operators, such as Erf;
    - Clip, which is ReLU, ReLU6 or Hardtanh;
    - Identity, Constant, and Dropout, which does nothing in a network that is used;
    - what rearranges a few constants, such as those of a Pad that PyTorch exported.

    Padding that is not the same on both sides, such as that of auto_pad, becomes the
    same on both sides where that gives the same output. Else Conv and ConvTranspose
    make up for it by zeros on one side of the filter.
    """
    onnx = onnx_package()
    from google.protobuf.message import DecodeError

    model, name, folder = source, "the given model", None
    if not isinstance(source, onnx.ModelProto):
        if isinstance(source, (bytes, bytearray, memoryview)):
            content, name = bytes(source), "the given bytes"
        else:
            name = os.fspath(source)
            folder = os.path.dirname(os.path.abspath(name))
            with open(name, "rb") as file:
                content = file.read()
        try:
            model = onnx.ModelProto.FromString(content)
        except DecodeError as error:
            raise DataError(f"{name}: damaged, or no ONNX file ({error})") from None
    try:
        # weights that are no numbers are not what a warning would be about
        with np.errstate(all="ignore"):
            return _Reader(onnx, model, folder).sequential()
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

    Parameters
    ----------
    onnx : module
    model : onnx.ModelProto
        Changed where weights are read from other files.
    folder : str or None
        Where these files are; None refuses them.

    Attributes
    ----------
    layers : list of Layer
        For the nodes of the chain, or of the branch, so far.
    current : str
        Name of the value that the last of these nodes gives.
    shape : tuple or None
        Its shape with 1 for N; None where the file leaves sizes open.
    axes : int or None
        How many axes the value in front of ``layers`` has, where that is known.
    batch : int or None
        N, where the file fixes it.
    constants : dict of str to ndarray
    uses : Counter
        How many nodes, or the output, take the value of a name.
    """

    def __init__(self, onnx, model, folder):
        self.onnx, self.graph = onnx, model.graph
        self.layers, self.constants = [], {}
        # first, because the checker would look for the files
        attributes = [a for node in model.graph.node for a in node.attribute]
        for tensor in (*model.graph.initializer, *(a.t for a in attributes)):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._read_external(tensor, folder)
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
        self.axes = len(sizes) or None
        known = len(sizes) > 1 and min(sizes[1:]) > 0
        self.shape = (1, *sizes[1:]) if known else None
        self.current, self.output = inputs[0].name, graph.output[0].name
        self.uses = Counter([self.output])
        for node in self.nodes:
            self.uses.update(node.inputs)

    def sequential(self) -> nn.Sequential:
        self._name_activations()
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
        return nn.Sequential(*self.layers).eval()

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
            for layer in self.layers[count:]:
                if self.shape is not None:
                    self.shape = output_shape(layer, self.shape)
        except DataError:
            raise
        except (ValueError, TypeError) as error:  # from the layer
            raise node.refused(error) from None
        self._pass(node)

    def _pass(self, node):
        self.left.remove(node)
        self.current = node.outputs[0]

    def _name_activations(self):
        """Let one node stand for those in which a GELU or SiLU is written.

        They are written in many ways. So what the nodes behind a value compute of one
        number is computed here for some numbers, up to each node whose output alone
        goes on.
        """
        starts = {
            name: None
            for node in self.nodes
            if node.operator in _OF_ONE_NUMBER
            for name in node.inputs
            if self.uses[name] > 1 and name not in self.constants
        }
        for start in starts:
            found = self._activation(start)
            if found is not None:
                taken, node = found
                at = self.nodes.index(taken[-1])
                self.nodes[at] = node
                self.nodes = [n for n in self.nodes if n not in taken]
                for old in taken:
                    self.uses.subtract(old.inputs)
                self.uses.update(node.inputs)

    def _activation(self, start):
        """The nodes of an activation that begins at a value, and the one for them."""
        values, taken, inside = {start: _SAMPLES}, [], Counter()
        for node in self.nodes:
            compute = _OF_ONE_NUMBER.get(node.operator)
            if compute is None or not any(name in values for name in node.inputs):
                continue
            given = [values.get(name, self._number(name)) for name in node.inputs]
            if any(value is None for value in given):
                continue
            (end,) = node.outputs
            taken.append(node)
            inside.update(node.inputs)
            made = compute(*given)
            if all(inside[n] == self.uses[n] for n in values if n != start):
                for operator, attributes, wanted in _activations():
                    if np.allclose(made, wanted, rtol=1e-6, atol=1e-6):
                        whole = copy.copy(node)
                        whole.operator, whole.inputs = operator, [start]
                        whole.attributes = attributes
                        return taken, whole
            if len(taken) == _LONGEST_ACTIVATION:
                break
            values[end] = made
        return None

    def _number(self, name):
        """A constant that is one number; None for any other value."""
        array = self.constants.get(name)
        if (
            array is None
            or array.size != 1
            or array.ndim > 1
            or array.dtype.kind != "f"
        ):
            return None
        return array.astype(np.float64).reshape(())

    def _joins(self, node) -> bool:
        if node.operator == "Concat":
            return True
        computed = [name for name in node.inputs if name not in self.constants]
        return node.operator == "Add" and len(computed) > 1

    def _fork(self, takers):
        """Read the branches behind ``current``, and the node that joins them."""
        start, shape, before = self.current, self.shape, self.layers
        outer, axes = self.axes, self._axes()
        self.axes = axes
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
                self.layers, self.axes = [*before, block], outer
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
            axes = _axes_behind(branches[0], self.axes)
            if axis != 1 and (axes is None or axis + axes != 1):
                raise node.refused(
                    f"axis is {axis} of {axes or 'unknown many'} axes, only 1, the "
                    f"channels, is supported"
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

    def _read_external(self, tensor, folder):
        """Fetch what a tensor says lies in another file, if that is in ``folder``.

        Nothing that the model says is believed: not that the file is inside, also
        behind links, nor how much of it there is.
        """
        what = f"tensor {tensor.name!r}"
        if folder is None:
            raise DataError(
                f"{what} lies in another file: give the path of the model, beside "
                f"which it is"
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            folder = os.path.realpath(folder)
            path = os.path.realpath(os.path.join(folder, location))
            inside = os.path.commonpath([folder, path]) == folder != path
        except ValueError:  # a zero byte
            inside = False
        if not inside or os.path.isabs(location):
            raise DataError(
                f"{what} lies in {location!r}, which is not inside the folder of the "
                f"model and is not read"
            )
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{what} lies in {location!r}, which is not beside the model: there is "
                f"no {path}"
            )
        if not os.path.isfile(path):
            raise DataError(f"{what} lies in {location!r}, which is no file")
        try:
            dtype = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            start = int(entries.get("offset", 0))
            size = math.prod(tensor.dims) * dtype.itemsize
            given = int(entries.get("length", size))
        except (KeyError, ValueError) as error:
            raise DataError(f"{what} is damaged ({error})") from None
        if min(start, *tensor.dims, 0) < 0 or given != size or dtype.hasobject:
            raise DataError(
                f"{what} is damaged: {given} bytes from {start} on, expected {size}"
            )
        with open(path, "rb") as file:
            there = os.fstat(file.fileno()).st_size
            if start + size > there:
                raise DataError(
                    f"{what} is {size} bytes from {start} on of {location!r}, which "
                    f"has {there}"
                )
            file.seek(start)
            tensor.raw_data = file.read(size)
        tensor.data_location = self.onnx.TensorProto.DEFAULT
        del tensor.external_data[:]

    def _array(self, tensor) -> np.ndarray:
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

    def _channels(self, node, position, count, shape=(1, -1)):
        """An input that has one number for each of ``count`` channels.

        It is broadcast to ``shape``, in which -1 stands for the channels.
        """
        array = self._weight(node, position)
        shape = tuple(count if size == -1 else size for size in shape)
        try:
            return np.broadcast_to(array, shape).reshape(count)
        except ValueError:
            raise node.refused(
                f"{node.inputs[position]!r} has shape {array.shape}: expected one "
                f"number for each of {count} channels"
            ) from None

    # layers with weights

    def _filters(self, node) -> np.ndarray:
        """The weight of a convolution, transposed or not."""
        weight = self._weight(node, 1)
        if weight.ndim != 4:
            raise node.refused(f"its weight of shape {weight.shape} has not 4 axes")
        if tuple(node("kernel_shape", weight.shape[2:])) != weight.shape[2:]:
            raise node.refused(f"kernel_shape differs from its weight, {weight.shape}")
        return weight

    def _longer(self, node, filters, axis, rows, dilation, pads) -> np.ndarray:
        """Filters that reach ``rows`` further: back for more than 0, forth for less.

        The zeros there make up for padding, ``pads``, that differs by so much.
        """
        taps, rest = divmod(abs(rows), dilation[axis])
        if rest or taps > filters.shape[2 + axis]:
            before, after = pads
            raise node.refused(f"its padding is too uneven, {before} and {after}")
        zeros = [(0, 0)] * 4
        zeros[2 + axis] = (taps, 0) if rows > 0 else (0, taps)
        return np.pad(filters, zeros)

    def _conv(self, node):
        weight = self._filters(node)
        stride, dilation, pads = self._windows(node, weight.shape[2:])
        for axis, (before, after) in enumerate(pads):
            # the larger padding then stands on both sides
            rows, pair = after - before, (before, after)
            weight = self._longer(node, weight, axis, rows, dilation, pair)
        outputs, inputs, *kernel = weight.shape
        groups, padding = node("group", 1), [max(pair) for pair in pads]
        bias = self._weight(node, 2, optional=True)
        layer = nn.Conv2d(
            inputs * groups,
            *(outputs, kernel, stride, padding, dilation, groups, bias is not None),
        )
        self.layers.append(_filled(layer, weight, bias))

    def _conv_transpose(self, node):
        weight = self._filters(node)
        kernel = weight.shape[2:]
        stride, dilation, pads, more, auto = self._geometry(node, kernel)
        cut = self._cut(node, kernel, stride, dilation, pads, more, auto)
        padding = []
        for axis, (before, after) in enumerate(cut):
            # Rows that the end has more than with ``before`` cut off on both sides.
            # Where output_padding cannot stand for them, longer filters do.
            rest = before - after + more[axis]
            more[axis] = 0
            if 0 <= rest < stride[axis]:
                more[axis] = rest
            else:
                pair = before, after
                weight = self._longer(node, weight, axis, -rest, dilation, pair)
                before += max(-rest, 0)
            padding.append(before)
        bias = self._weight(node, 2, optional=True)
        groups = node("group", 1)
        layer = nn.ConvTranspose2d(
            weight.shape[0],
            weight.shape[1] * groups,
            weight.shape[2:],
            stride,
            padding,
            more,
            groups,
            bias is not None,
            dilation,
        )
        self.layers.append(_filled(layer, weight, bias))

    def _cut(self, node, kernel, stride, dilation, pads, more, auto) -> list:
        """Rows and columns (before, after) that a ConvTranspose cuts off."""
        wanted = node("output_shape")
        if wanted is None and auto == "NOTSET":
            return list(zip(pads[:2], pads[2:]))
        if wanted is None and auto == "VALID":
            return [(0, 0), (0, 0)]
        if wanted is not None and len(wanted) not in (2, 4):
            raise node.refused(f"output_shape is {list(wanted)}, expected two sizes")
        if wanted is not None and self.shape is None:
            raise node.refused(
                "output_shape depends on the size of the image, which the file leaves "
                "open"
            )
        found = []
        for axis in range(2):
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            total = reach - stride[axis] + more[axis]  # for stride times the size
            if wanted is not None:
                total += stride[axis] * self.shape[2 + axis] - wanted[axis - 2]
            if total < 0 and wanted is None:
                raise node.refused(
                    f"auto_pad is {auto}, but its filters do not reach from one row to "
                    f"the next: give output_shape"
                )
            half = total // 2
            if total < 0:  # rows that no filter reaches, all at the end
                found.append((0, total))
            elif auto == "SAME_UPPER":
                found.append((half, total - half))
            else:
                found.append((total - half, half))
        return found

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
            bias = self._channels(node, 2, layer.out_features)
            bias = bias * np.float32(node("beta", 1.0))
        weight = weight * np.float32(node("alpha", 1.0))
        self.layers.append(_filled(layer, weight, bias))

    def _add(self, node):
        layer = self.layers[-1] if self.layers else None
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            added = self._channels(node, 1, layer.out_channels, (1, -1, 1, 1))
        elif isinstance(layer, nn.BatchNorm2d):
            added = self._channels(node, 1, layer.num_features, (1, -1, 1, 1))
        elif isinstance(layer, nn.Linear):
            added = self._channels(node, 1, layer.out_features)
        else:
            raise node.refused(
                "of a constant is supported behind Conv, ConvTranspose, Gemm, MatMul "
                "and BatchNormalization only"
            )
        bias = added if layer.bias is None else layer.bias.data.numpy() + added
        _filled(_with_bias(layer), layer.weight.data.numpy(), bias)

    def _batch_normalization(self, node):
        """y = gamma (x - mean) / sqrt(variance + epsilon) + beta."""
        if node("training_mode", 0):
            raise node.refused("training_mode is set: export the network for inference")
        last = self.layers[-1] if self.layers else None
        images = self._axes() == 4
        if not images and not isinstance(last, nn.Linear):
            raise node.refused(
                "is supported for images (N, C, H, W), and behind Gemm and MatMul only"
            )
        if images:
            count = self.shape[1] if self.shape else self._weight(node, 1).size
        else:
            count = last.out_features
        gamma, beta, mean, variance = (
            self._channels(node, i, count, (-1,)) for i in range(1, 5)
        )
        epsilon = _decimal(node("epsilon", 1e-5))
        if not (variance.astype(np.float64) + epsilon > 0).all():
            raise node.refused("a variance is negative or no number")
        if images:
            momentum = round(1 - node("momentum", 0.9), 7)
            layer = nn.BatchNorm2d(count, epsilon, momentum)
            layer.running_mean.data.copy_(mean)
            layer.running_var.data.copy_(variance)
            self.layers.append(_filled(layer, gamma, beta))
            return
        scale = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
        weight = last.weight.data.numpy() * scale[:, None]
        bias = 0 if last.bias is None else last.bias.data.numpy()
        bias = scale * (bias - mean.astype(np.float64)) + beta
        _filled(_with_bias(last), weight, bias)

    def _layer_normalization(self, node):
        axis, axes = node("axis", -1), self._axes()
        count = -axis if axis < 0 else (axes or 0) - axis
        if axes is None and axis >= 0 or not 0 < count < (axes or count + 1):
            raise node.refused(
                f"axis is {axis} of {axes or 'unknown many'} axes: only the last ones, "
                f"without the first, N, can be normalised"
            )
        scale = self._weight(node, 1)
        sizes = self.shape[-count:] if self.shape else scale.shape
        given = [scale, self._weight(node, 2, optional=True)]
        try:
            if len(sizes) != count:
                raise ValueError
            scale, bias = (a if a is None else np.broadcast_to(a, sizes) for a in given)
        except ValueError:
            raise node.refused(
                f"its scale has shape {scale.shape}, expected that of the last {count} "
                f"axes"
            ) from None
        epsilon = _decimal(node("epsilon", 1e-5))
        layer = nn.LayerNorm(sizes, epsilon, bias=bias is not None)
        self.layers.append(_filled(layer, scale, bias))

    def _axes(self):
        """How many axes ``current`` has, or None."""
        return len(self.shape) if self.shape else _axes_behind(self.layers, self.axes)

    # windows

    def _geometry(self, node, kernel) -> tuple:
        """Strides, dilations, pads, output_padding and auto_pad of two dimensions."""
        stride, dilation = node("strides", [1, 1]), node("dilations", [1, 1])
        pads, more = node("pads", [0] * 4), list(node("output_padding", [0, 0]))
        auto = node("auto_pad", b"NOTSET").decode()
        sizes = kernel, stride, dilation, more
        if any(len(size) != 2 for size in sizes) or len(pads) != 4:
            raise node.refused("only images of two dimensions are supported")
        numbers = *stride, *dilation, *kernel, node("group", 1)
        if min(numbers) < 1 or min(*pads, *more) < 0 or max(*numbers, *pads) >= 2**31:
            raise node.refused("a number in its attributes is out of range")
        if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise node.refused(f"auto_pad is {auto!r}")
        return stride, dilation, pads, more, auto

    def _image(self) -> tuple:
        """Height and width of ``current``, or None for each."""
        known = self.shape and len(self.shape) == 4
        return self.shape[2:] if known else (None, None)

    def _windows(self, node, kernel) -> tuple:
        """Stride, dilation and, for height and width, padding (before, after).

        The two are equal where that gives the same output.
        """
        stride, dilation, pads = self._padding(node, kernel)
        return stride, dilation, self._evened(pads, kernel, stride, dilation)

    def _evened(self, pads, kernel, stride, dilation) -> list:
        """Padding (before, after), the same where that gives as many windows."""
        axes = zip(self._image(), pads, kernel, stride, dilation)
        found = []
        for size, (before, after), window, step, spread in axes:
            reach = spread * (window - 1) + 1

            def windows(after):
                return shapes.pooled_size(size, reach, step, before, after, False)

            if size is not None and windows(before) == windows(after):
                after = before
            found.append((before, after))
        return found

    def _padding(self, node, kernel) -> tuple:
        """The same, as the node has it."""
        stride, dilation, pads, _, auto = self._geometry(node, kernel)
        image, found = self._image(), []
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
            found.append((before, after))
        return stride, dilation, found

    def _max_pool(self, node):
        kernel, settings, ceil_mode = self._pool_windows(node)
        self.layers.append(nn.MaxPool2d(kernel, *settings, ceil_mode=ceil_mode))

    def _average_pool(self, node):
        counts = bool(node("count_include_pad", 0))
        kernel, (stride, pads), ceil_mode = self._pool_windows(node)
        same = node("auto_pad", b"").startswith(b"SAME")
        if same and any(step > size for step, size in zip(stride, kernel)):
            raise node.refused(
                "auto_pad with strides larger than the window is not supported: "
                "programs differ in which numbers it leaves out"
            )
        # windows of padding alone, whose mean is 0
        if counts and not ceil_mode and any(p >= k for p, k in zip(pads, 2 * kernel)):
            top, left, bottom, right = pads
            self.layers.append(nn.ZeroPad2d((left, right, top, bottom)))
            pads = 0
        how = {"ceil_mode": ceil_mode, "count_include_pad": counts}
        self.layers.append(nn.AvgPool2d(kernel, stride, pads, **how))

    def _pool_windows(self, node) -> tuple:
        """Window, (stride, padding), and whether their number is rounded up.

        It is not, and padding is the same on both sides, where that gives the same
        output: such layers may be fused.
        """
        kernel, ceil_mode = list(node("kernel_shape")), bool(node("ceil_mode", 0))
        stride, dilation, pads = self._padding(node, kernel)
        if set(dilation) != {1}:
            raise node.refused("only dilations of 1 are supported")
        image = self._image()

        def number(ceil_mode):
            axes = zip(image, kernel, stride, pads)
            return [shapes.pooled_size(*axis, *p, ceil_mode) for *axis, p in axes]

        known = image[0] is not None
        if max(stride) == 1 or known and number(True) == number(False):
            ceil_mode = False
        if ceil_mode and node("auto_pad", b"") == b"VALID":
            raise node.refused(
                "auto_pad=VALID with ceil_mode is not supported: programs differ in "
                "whether a last window reaches over the edge"
            )
        if not ceil_mode:
            pads = self._evened(pads, kernel, stride, dilation)
        (top, bottom), (left, right) = pads
        return kernel, (stride, (top, left, bottom, right)), ceil_mode

    def _global_average(self, node):
        """The mean of the last two axes of images."""
        axes = node("axes")
        if axes is None:
            given = self._weight(node, 1, "int64", optional=True)
            axes = [] if given is None else given.ravel().tolist()
        if self._axes() != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise node.refused(
                f"over axes {list(axes)}: only over the last two of images "
                f"(N, C, H, W) is supported"
            )
        self.layers.append(nn.AdaptiveAvgPool2d(1))
        if not node("keepdims", 1):
            self.layers.append(nn.Flatten())

    # the others

    def _flatten(self, node):
        axis, axes = node("axis", 1), self._axes()
        if axis != 1 and (axis > 0 or axes is None or axis + axes != 1):
            raise node.refused(f"axis is {axis}, only 1 is supported")
        self.layers.append(nn.Flatten())

    def _reshape(self, node):
        shape = self._weight(node, 1, "int64").tolist()
        as_it_is = self.shape and shape[1:] == list(self.shape[1:])
        if as_it_is and len(shape) > 2 and shape[0] in (0, -1, self.batch):
            return
        rows, columns = shape if len(shape) == 2 else (-1, 0)
        keeps_n = rows == self.batch if rows else not node("allowzero", 0)
        rest = math.prod(self.shape[1:]) if self.shape else None
        if not (keeps_n and columns in (-1, rest) or rows == -1 and columns == rest):
            raise node.refused(
                f"to {shape}, only to (0, -1), or where the file says how large its "
                f"input is to (-1, features), is supported"
            )
        self.layers.append(nn.Flatten())

    def _softmax(self, node, kind):
        # On (N, F), what the layer takes, the old default (1) and the new one (-1)
        # are the same.
        if node("axis", 1) not in (1, -1):
            raise node.refused(f"axis is {node('axis')}, only 1 is supported")
        self.layers.append(kind())

    def _clip(self, node):
        ends = [node("min"), node("max")]  # before opset 11
        for i in (0, 1):
            if ends[i] is None:
                given = self._weight(node, 1 + i, optional=True)
                ends[i] = (-math.inf, math.inf)[i] if given is None else given.item()
        most = float(np.finfo(np.float32).max)
        low, high = map(_decimal, ends)
        low = -math.inf if low <= -most else low
        high = math.inf if high >= most else high
        if (low, high) == (0, math.inf):
            self.layers.append(nn.ReLU())
        elif (low, high) == (0, 6):
            self.layers.append(nn.ReLU6())
        elif (low, high) != (-math.inf, math.inf):
            self.layers.append(nn.Hardtanh(low, high))

    def _part_of_activation(self, node):
        raise node.refused("is supported as a part of GELU or SiLU only")

    def _dropout(self, node):
        training = self._weight(node, 2, "bool", optional=True)
        if training is not None and training.any():
            raise node.refused("training_mode is set: export the network for inference")


def _layer(make):
    """An operator without weights: ``make(node)`` is its layer."""
    return lambda reader, node: reader.layers.append(make(node))


_OPERATORS = {
    "Add": _Reader._add,
    "AveragePool": _Reader._average_pool,
    "BatchNormalization": _Reader._batch_normalization,
    "Clip": _Reader._clip,
    "Constant": None,
    "Conv": _Reader._conv,
    "ConvTranspose": _Reader._conv_transpose,
    "Dropout": _Reader._dropout,
    "Flatten": _Reader._flatten,
    "Gelu": _layer(lambda node: nn.GELU(node("approximate", b"none").decode())),
    "Gemm": _Reader._gemm,
    "GlobalAveragePool": _layer(lambda node: nn.AdaptiveAvgPool2d(1)),
    "Identity": lambda reader, node: None,
    "LayerNormalization": _Reader._layer_normalization,
    "LeakyRelu": _layer(lambda node: nn.LeakyReLU(_decimal(node("alpha", 0.01)))),
    "LogSoftmax": lambda reader, node: reader._softmax(node, nn.LogSoftmax),
    "MatMul": _Reader._gemm,
    "MaxPool": _Reader._max_pool,
    "Pad": _Reader._pad,
    "ReduceMean": _Reader._global_average,
    "Relu": _layer(lambda node: nn.ReLU()),
    "Reshape": _Reader._reshape,
    "Sigmoid": _layer(lambda node: nn.Sigmoid()),
    "Softmax": lambda reader, node: reader._softmax(node, nn.Softmax),
    "Swish": _layer(lambda node: nn.SiLU()),
    "Tanh": _layer(lambda node: nn.Tanh()),
    **dict.fromkeys(
        ("Div", "Erf", "Exp", "Mul", "Neg", "Pow", "Sub"), _Reader._part_of_activation
    ),
}

# what an activation may be written in
_OF_ONE_NUMBER = {
    "Add": np.add,
    "Div": np.divide,
    "Erf": np.vectorize(math.erf, otypes=[np.float64]),
    "Exp": np.exp,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Sub": np.subtract,
    "Tanh": np.tanh,
}
_SAMPLES = np.linspace(-8, 8, 65)
_LONGEST_ACTIVATION = 16  # nodes


def _activations():
    """Operator, attributes, and what it makes of the samples."""
    yield "Swish", {}, reference.silu_forward(_SAMPLES)
    for kind in ("none", "tanh"):
        made = reference.gelu_forward(_SAMPLES, kind)
        yield "Gelu", {"approximate": kind.encode()}, made


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


def _axes_behind(layers, axes):
    """How many axes the output of layers has, if it is known; ``axes``: their input."""
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            axes = _axes_behind(layer, axes)
        elif isinstance(layer, nn.Residual):
            axes = _axes_behind([layer.body], axes)
        elif isinstance(layer, nn.Concat):
            axes = _axes_behind([layer[0]], axes)
        elif isinstance(layer, _OF_IMAGES):
            axes = 4
        elif isinstance(layer, _OF_ROWS):
            axes = 2
    return axes


_OF_IMAGES = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.ConvTranspose2d,
    nn.MaxPool2d, nn.ZeroPad2d,
)  # fmt: skip
_OF_ROWS = nn.Flatten, nn.Linear, nn.LogSoftmax, nn.Softmax


def _decimal(number) -> float:
    """The shortest decimal that is this number in float32: 0.1, not 0.10000000149."""
    return float(str(np.float32(number)))


def _with_bias(layer):
    """The layer, with a bias if it had none."""
    if layer.bias is None:
        count = next(
            getattr(layer, name)
            for name in ("out_channels", "out_features")
            if hasattr(layer, name)
        )
        layer.bias = nn.Parameter(np.zeros(count, np.float32))
        layer.pack()
    return layer


def _filled(layer, weight, bias):
    layer.weight.data.copy_(np.asarray(weight, np.float32))
    if bias is not None:
        layer.bias.data.copy_(np.asarray(bias, np.float32))
    return layer
