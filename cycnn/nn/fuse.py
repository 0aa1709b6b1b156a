"""Runs of layers replaced by one kernel each.

A small network spends its time between kernels: writing an activation to memory and
reading it back costs more than computing it. ``fuse`` puts a convolution, its ReLU and
its pooling into one kernel, and a linear layer and its ReLU into another;
:class:`Objective` does so with the last linear layer, log-softmax and the loss. Forward
and backward have the same contract as those of the layers that they replace.
"""

from __future__ import annotations

import math

from .. import shapes
from ..errors import ShapeError
from ..ops import for_device, fused
from ..ops.forward_plan import FEW_CHANNELS
from ..ops.fused import ConvBlock, Gather, Tail
from ..precision import get_precision
from ..tensor import empty
from .activation import (
    LogSoftmax,
    ReLU,
)
from .blocks import Concat, Residual
from .conv import Conv2d
from .layer import Layer, as_gradient, as_input
from .linear import Linear
from .loss import NLLLoss
from .normalisation import BatchNorm2d
from .output_shape import output_shape
from .parameter import Parameter
from .pooling import MaxPool2d
from .reshape import Flatten
from .sequential import Sequential


def fuse(model) -> Layer:
    """A model that computes the same with fewer kernels.

    Parameters
    ----------
    model : Layer
        Stays as it is; both share their parameters. Save, load and move ``model``.

    Returns
    -------
    Layer
        For a Sequential, its layers with these runs replaced: Conv2d (of one group,
        without dilation), ReLU and MaxPool2d (of windows that do not overlap, without
        padding), the last two if they are there; two of these, the first of few input
        channels; BatchNorm2d and ReLU; Linear and ReLU; Residual and ReLU. The same
        inside of Residual and Concat. Any other model comes back unchanged, a
        Sequential with a forward of its own among them.

    Notes
    -----
    What a device has no fused kernel for, all of the CPU among it, runs as the layers
    that were replaced.
    """
    if type(model) in (Residual, Concat):
        return FusedSequential(model, _fused([model]))
    if not isinstance(model, Sequential) or (
        (type(model).forward, type(model).backward)
        != (Sequential.forward, Sequential.backward)
    ):
        return model
    return FusedSequential(model, _fused(_flat(model)))


def _fused(layers) -> list:
    """The layers with runs of them replaced; ``layers`` is used up."""
    result = []
    while layers:
        run = _conv_run(layers) or _norm_run(layers) or _linear_run(layers)
        if run is None:
            layer = layers.pop(0)
            if type(layer) is Residual:
                relu = bool(layers) and type(layers[0]) is ReLU
                del layers[:relu]
                layer = FusedResidual(layer, relu)
            elif type(layer) is Concat:
                layer = FusedConcat(layer)
            result.append(layer)
            continue
        del layers[: len(run.parts)]
        if result and _is_pair(result[-1], run):
            run = FusedConvPair(result.pop(), run)
        result.append(run)
    return result


def _flat(model) -> list:
    """The layers of a Sequential, and of the Sequentials in it, in order."""
    layers = []
    for layer in model:
        layers += _flat(layer) if type(layer) is Sequential else [layer]
    return layers


# Only the library's own classes are replaced: one that derives from them may differ.


def _conv_run(layers):
    conv = layers[0]
    if type(conv) is not Conv2d or conv.groups != 1 or conv.dilation != (1, 1):
        return None
    parts = [conv]
    for kind in (ReLU, MaxPool2d):
        following = layers[len(parts)] if len(parts) < len(layers) else None
        if type(following) is not kind:
            continue
        if kind is MaxPool2d and (
            following.stride != following.kernel_size
            or following.padding != (0, 0)
            or following.ceil_mode
        ):
            continue
        parts.append(following)
    return FusedConv2d(parts)


def _is_pair(first, second) -> bool:
    if not type(first) is type(second) is FusedConv2d:
        return False
    first, second = first.parts[0].weight.shape, second.parts[0].weight.shape
    return first[1] <= FEW_CHANNELS and first[0] == second[1]


def _norm_run(layers):
    if [type(layer) for layer in layers[:2]] == [BatchNorm2d, ReLU]:
        return FusedBatchNorm2d(layers[:2])
    return None


def _linear_run(layers):
    if type(layers[0]) is not Linear:
        return None
    if len(layers) > 1 and type(layers[1]) is ReLU:
        return FusedLinear(layers[:2])
    return FusedLinear(layers[:1])


def _branch(layer) -> FusedSequential:
    """A branch of a block; a layer alone may be a run, too."""
    found = fuse(layer)
    if isinstance(found, FusedSequential):
        return found
    return FusedSequential(layer, _fused([layer]))


class FusedSequential(Sequential):
    """What :func:`fuse` makes of a Sequential: its parameters, under their old names."""

    def __init__(self, original, layers):
        # no pack(): the parameters belong to the original, and stay where they are
        self._original = original
        self._layers = tuple(layers)
        self._first = next(
            (i for i, layer in enumerate(layers) if layer._walk()),
            max(len(layers) - 1, 0),
        )

    def _walk(self, prefix="", kind=Parameter):
        return self._original._walk(prefix, kind)

    def forward(self, x):
        """As of a Sequential, which also takes a :class:`~cycnn.ops.fused.Gather`."""
        if not isinstance(x, Gather):
            return super().forward(x)
        if not self._layers or not isinstance(self._layers[0], _Run):
            x = x.made()
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def runs(self) -> list:
        """The layers in it, at any depth, that a fused kernel may stand for."""
        found = []
        for layer in self._layers:
            if isinstance(layer, _Run):
                found.append(layer)
            elif isinstance(layer, _Block):
                for branch in layer.branches():
                    found += branch.runs()
        return found

    def pack_filters(self, x_shape, gather=False) -> dict:
        """See :meth:`Objective.pack_filters`."""
        packed = {}
        for i, layer, shape, _ in _placed(self._layers, x_shape):
            if isinstance(layer, (_Run, _Block)):
                packed |= layer.pack_filters(shape, gather and i == 0)
        return packed

    def kernels(self, x_shape, input_grad, machine, precision, gather=False) -> list:
        """The kernels of its layers, as of one of them."""
        found = []
        for i, layer, shape, _ in _placed(self._layers, x_shape):
            if isinstance(layer, (_Run, _Block)):
                wanted = input_grad or i > self._first
                found += layer.kernels(
                    shape, wanted, machine, precision, gather and i == 0
                )
        return found


def _placed(layers, x_shape):
    """``(index, layer, shape of its input, of its output)`` of layers in a row.

    As far as shapes are known: up to the first layer whose output only the layer itself
    knows the shape of (None), or that the shape does not fit, which it says itself when
    it runs.
    """
    for i, layer in enumerate(layers):
        try:
            y_shape = _output_shape(layer, x_shape)
        except ShapeError:
            return
        yield i, layer, x_shape, y_shape
        if y_shape is None:
            return
        x_shape = y_shape


class _Run(Layer):
    """Layers in a row that a fused kernel may stand for.

    Attributes
    ----------
    partials : dict or None
        Where backward puts the gradients of parameters, in parts that are still to be
        added up: ``{Parameter: Tensor (splits, *shape)}``. None: it writes them.
    settled : bool
        Whether a kernel ran between forward and backward, that of the loss at least.
    """

    partials = None
    settled = False

    def __init__(self, parts):
        self.parts = parts

    def _walk(self, prefix="", kind=Parameter):
        return [found for part in self.parts for found in part._walk(prefix, kind)]

    def _children(self):
        return [(str(i), part) for i, part in enumerate(self.parts)]

    def forward(self, x):
        parameters = self.parts[0].weight.data, self.parts[0].bias
        if isinstance(x, Gather) and not self._gathers(x):
            x = x.made()
        if not isinstance(x, Gather):
            x = as_input(self.parts[0], x, parameters[0].device)
        if not self._is_fused(x.device, x.shape):
            for part in self.parts:
                x = part.forward(x)
            self._saved = None
            return x
        bias = parameters[1]
        return self._fused_forward(
            x, parameters[0], None if bias is None else bias.data
        )

    def backward(self, dy, input_grad=True, accumulate=False):
        if self._saved is None:
            for part in self.parts[:0:-1]:
                dy = part.backward(dy)
            return self.parts[0].backward(dy, input_grad, accumulate)
        weight, bias = self.parts[0].weight, self.parts[0].bias
        if self.partials is not None:
            dx, made = self._fused_partials(dy, input_grad)
            _collect(self.partials, self.parts[0], made)
            return dx
        targets = [weight.grad, None if bias is None else bias.grad]
        if not accumulate:
            return self._fused_backward(dy, *targets, input_grad)
        # the fused kernels write, so let them write elsewhere and add that
        made = [t if t is None else empty(t.shape, device=t.device) for t in targets]
        dx = self._fused_backward(dy, *made, input_grad)
        for target, more in zip(targets, made):
            if target is not None:
                for_device(target.device).add(target, more, target)
        return dx

    def _is_fused(self, device, x_shape) -> bool:
        """Whether there is a kernel for an input of this shape."""
        raise NotImplementedError

    def _gathers(self, batch) -> bool:
        """Whether the kernel can make its input, a :class:`Gather`."""
        return False

    def pack_filters(self, x_shape, gather) -> dict:
        """See :meth:`Objective.pack_filters`."""
        return {}

    def kernels(self, x_shape, input_grad, machine, precision, gather=False) -> list:
        """The kernels that stand for the layers, forward and backward.

        Parameters
        ----------
        x_shape : tuple of int
            One that fits.
        input_grad : bool
            Whether backward is to return the gradient by the input.
        machine
            What :func:`cycnn.ops.fused.machine` returns.
        precision : {"fp32", "tf32", "bf16"}
        gather : bool
            Whether the input is a :class:`Gather`.

        Returns
        -------
        list of Kernel
            Empty where the layers run as they are.
        """
        raise NotImplementedError

    def _forget(self):
        self._saved = None
        for part in self.parts:
            part._forget()

    def __repr__(self):
        return " + ".join(map(repr, self.parts))


class FusedConv2d(_Run):
    """y = pool(relu(conv(x))) in one kernel; ReLU and pooling may be missing.

    Of each window forward remembers one byte: which position was the maximum, or that
    no gradient passes because it was not positive.
    """

    _packed = None  # the filter packed ahead, which somebody keeps up to date

    def __init__(self, parts):
        super().__init__(parts)
        kinds = [type(part) for part in parts]
        self._relu = ReLU in kinds
        self._pool = parts[-1].kernel_size if MaxPool2d in kinds else None

    def _is_fused(self, device, x_shape):
        conv = self.parts[0]
        shape = conv.weight.shape
        # what does not fit is refused by the layer itself, in its own words
        return (
            len(x_shape) == 4
            and x_shape[1] == shape[1]
            and fused.conv_block_supported(
                device, x_shape, shape, self._pool, conv.stride, conv.padding
            )
        )

    def _gathers(self, batch):
        conv = self.parts[0]
        return (
            batch.images.dtype == "uint8"
            and self._is_fused(batch.device, batch.shape)
            and fused.gather_supported(
                batch.device,
                batch.shape,
                conv.weight.shape,
                self._pool,
                conv.stride,
                conv.padding,
            )
        )

    def geometry(self) -> tuple:
        """(shape of the weight, pool, stride, padding)."""
        conv = self.parts[0]
        return conv.weight.shape, self._pool, conv.stride, conv.padding

    def block(self) -> ConvBlock:
        """What the operations are given, but for the input."""
        conv = self.parts[0]
        bias = None if conv.bias is None else conv.bias.data
        return ConvBlock(
            conv.weight.data, bias, self._relu, self._pool, conv.stride, conv.padding
        )

    def pack_filters(self, x_shape, gather):
        conv, self._packed = self.parts[0], None
        weight = conv.weight
        if self._is_fused(weight.device, x_shape):
            self._packed = fused.pack_filter(
                weight.data, x_shape, self._pool, conv.stride, conv.padding
            )
        return {} if self._packed is None else {weight: self._packed}

    def kernels(self, x_shape, input_grad, machine, precision, gather=False):
        conv = self.parts[0]
        return fused.conv_block_kernels(
            machine,
            precision,
            x_shape,
            conv.weight.shape,
            conv.bias is not None,
            self._relu,
            self._pool,
            conv.stride,
            conv.padding,
            input_grad,
            gather,
        )

    def _fused_forward(self, x, weight, bias):
        conv = self.parts[0]
        x, batch = _with_batch(x)
        geometry = self._relu, self._pool, conv.stride, conv.padding
        y, code = fused.conv_block_forward(x, weight, bias, *geometry, self._packed)
        self._saved = batch, y, code
        return y

    def _fused_backward(self, dy, dweight, dbias, input_grad):
        x, y, code = self._remembered()
        conv = self.parts[0]
        dx = fused.conv_block_backward(
            as_gradient(self, dy, y.shape, y.device),
            y,
            code,
            x,
            conv.weight.data,
            dweight,
            dbias,
            self._relu,
            self._pool,
            conv.stride,
            conv.padding,
            input_grad,
        )
        self._saved = None
        return dx

    def _fused_partials(self, dy, input_grad):
        x, y, code = self._remembered()
        conv = self.parts[0]
        self._saved = None
        return fused.conv_block_backward_partials(
            as_gradient(self, dy, y.shape, y.device),
            y,
            code,
            x,
            conv.weight.data,
            self._relu,
            self._pool,
            conv.stride,
            conv.padding,
            input_grad,
        )


def _with_batch(x):
    """The input of a kernel, and the batch in memory, which it then writes."""
    if not isinstance(x, Gather):
        return x, x
    batch = empty(x.shape, device=x.device)
    return x._replace(x=batch), batch


class FusedConvPair(_Run):
    """Two FusedConv2d, the first of few input channels, with one kernel forward.

    Where there is no such kernel each runs for itself.
    """

    _packed = None  # the second filter, as of FusedConv2d

    def __init__(self, first, second):
        super().__init__([*first.parts, *second.parts])
        self._runs = first, second

    @property
    def partials(self):
        return self._runs[0].partials

    @partials.setter
    def partials(self, partials):
        for run in self._runs:
            run.partials = partials

    def _children(self):
        return [(str(i), run) for i, run in enumerate(self._runs)]

    def _is_fused(self, device, x_shape, gather=False):
        first, second = self._runs
        return first._is_fused(device, x_shape) and fused.conv_pair_supported(
            device,
            get_precision(),
            x_shape,
            first.block().geometry,
            second.block().geometry,
            gather,
        )

    def pack_filters(self, x_shape, gather):
        first, second = self._runs
        weight = second.parts[0].weight
        if self._is_fused(weight.device, x_shape, gather):
            blocks = first.block(), second.block()
            self._packed = fused.pack_pair_filter(x_shape, *blocks, gather)
            return {weight: self._packed}
        self._packed = None
        y_shape = _output_shape(first, x_shape)
        return first.pack_filters(x_shape, gather) | second.pack_filters(y_shape, False)

    def kernels(self, x_shape, input_grad, machine, precision, gather=False):
        first, second = self._runs
        made = fused.conv_pair_kernels(
            machine,
            precision,
            x_shape,
            first.block().geometry,
            second.block().geometry,
            input_grad,
            gather,
        )
        if not made:
            y_shape = _output_shape(first, x_shape)
            apart = (
                first.kernels(x_shape, input_grad, machine, precision, gather),
                second.kernels(y_shape, True, machine, precision),
            )
            made = apart[0] + apart[1]
            if not all(apart):
                return made
        if input_grad:
            return made
        back = fused.conv_pair_backward_kernels(
            machine, precision, x_shape, first.geometry(), second.geometry()
        )
        forward = [kernel for kernel in made if kernel.library.endswith("_forward")]
        return forward + back if back else made

    def forward(self, x):
        first, second = self._runs
        if isinstance(x, Gather) and not first._gathers(x):
            x = x.made()
        if not isinstance(x, Gather):
            x = as_input(first.parts[0], x, first.parts[0].weight.data.device)
        if not self._is_fused(x.device, x.shape, isinstance(x, Gather)):
            return second.forward(first.forward(x))
        x, batch = _with_batch(x)
        y1, code1, y2, code2 = fused.conv_pair_forward(
            x, first.block(), second.block(), self._packed
        )
        first._saved, second._saved = (batch, y1, code1), (y1, y2, code2)
        return y2

    def backward(self, dy, input_grad=True, accumulate=False):
        first, second = self._runs
        if not (input_grad or accumulate) and self._is_fused_backward():
            return self._fused_backward(dy)
        dy = second.backward(dy, True, accumulate)
        return first.backward(dy, input_grad, accumulate)

    def _is_fused_backward(self):
        first, second = self._runs
        if first._saved is None or second._saved is None:
            return False
        x = first._saved[0]
        return fused.conv_pair_backward_supported(
            x.device, x.shape, first.geometry(), second.geometry()
        )

    def _fused_backward(self, dy):
        first, second = self._runs
        (x, y1, code1), (_, y2, code2) = first._remembered(), second._remembered()
        first._saved = second._saved = None
        convs = second.parts[0], first.parts[0]
        dy = as_gradient(self, dy, y2.shape, y2.device)
        given = dy, code2, y1, code1, x, convs[0].weight.data
        if self.partials is None:
            grads = []
            for conv in convs:
                bias = None if conv.bias is None else conv.bias.grad
                grads += [conv.weight.grad, bias]
            fused.conv_pair_backward(*given, *grads, self.settled)
            return
        parts = fused.conv_pair_backward_partials(*given, self.settled)
        for conv, made in zip(convs, parts):
            _collect(self.partials, conv, made)

    def _forget(self):
        for run in self._runs:
            run._forget()


class FusedBatchNorm2d(_Run):
    """y = relu(batch_norm(x)), on every device; ReLU takes no pass of its own.

    The layer remembers its input, out of which backward finds where y was positive.
    """

    def forward(self, x):
        x = x.made() if isinstance(x, Gather) else x
        return self.parts[0]._normalised(x, relu=True)

    def backward(self, dy, input_grad=True, accumulate=False):
        return self.parts[0].backward(dy, input_grad, accumulate)

    def kernels(self, x_shape, input_grad, machine, precision, gather=False):
        return []  # they are compiled with the package


class FusedLinear(_Run):
    """y = relu(x W^T + b) in one kernel; ReLU may be missing."""

    def _is_fused(self, device, x_shape):
        # what does not fit is refused by the layer itself, in its own words
        return len(x_shape) == 2 and fused.linear_block_supported(device)

    def kernels(self, x_shape, input_grad, machine, precision, gather=False):
        linear = self.parts[0]
        return fused.linear_block_kernels(
            machine,
            precision,
            x_shape[0],
            *linear.weight.shape[::-1],
            linear.bias is not None,
            len(self.parts) > 1,
        )

    def _fused_forward(self, x, weight, bias):
        relu = len(self.parts) > 1
        y = fused.linear_block_forward(x, weight, bias, relu)
        self._saved = x, y
        return y

    def _fused_backward(self, dy, dweight, dbias, input_grad):
        x, y = self._remembered()
        dx = fused.linear_block_backward(
            as_gradient(self, dy, y.shape, y.device),
            y,
            x,
            self.parts[0].weight.data,
            dweight,
            dbias,
            len(self.parts) > 1,
            input_grad,
        )
        self._saved = None
        return dx

    def _fused_partials(self, dy, input_grad):
        x, y = self._remembered()
        self._saved = None
        return fused.linear_block_backward_partials(
            as_gradient(self, dy, y.shape, y.device),
            y,
            x,
            self.parts[0].weight.data,
            len(self.parts) > 1,
            input_grad,
        )


class _Block:
    """Branches that get the same input, each fused for itself."""

    def branches(self) -> list:
        return [branch for _, branch in self._children()]

    def pack_filters(self, x_shape, gather):
        packed = {}
        for branch in self.branches():
            packed |= branch.pack_filters(x_shape)
        return packed

    def kernels(self, x_shape, input_grad, machine, precision, gather=False):
        found = []
        for branch in self.branches():
            found += branch.kernels(x_shape, input_grad, machine, precision)
        return found

    def output_shape(self, x_shape):
        """None where a branch does not know it."""
        made = [_output_shape(branch, x_shape) for branch in self.branches()]
        return None if None in made else self._joined(x_shape, made)


class FusedResidual(_Block, Residual):
    """A Residual with fused ways: y = relu(body(x) + shortcut(x)).

    ReLU, which stands behind the block, may be missing.
    """

    def __init__(self, block, relu):
        # no pack(): the parameters belong to the block, and stay where they are
        self.body = _branch(block.body)
        self.shortcut = None if block.shortcut is None else _branch(block.shortcut)
        self._relu = relu

    def _sum(self, y, other):
        if not self._relu:
            return super()._sum(y, other)
        out = empty(y.shape, device=y.device)
        for_device(y.device).add_relu(y, other, out)
        self._saved = out
        return out

    def _gradient_of_sum(self, dy):
        if not self._relu:
            return super()._gradient_of_sum(dy)
        y = self._remembered()
        dy = as_gradient(self, dy, y.shape, y.device)
        return for_device(y.device).relu_backward(dy, y)

    def __repr__(self):
        return super().__repr__() + (" + ReLU()" if self._relu else "")

    def _joined(self, x_shape, made):
        shapes.check_same(body=made[0], shortcut=[*made, x_shape][1])
        return made[0]


class FusedConcat(_Block, Concat):
    """A Concat with fused branches."""

    def __init__(self, block):
        self._branches = tuple(map(_branch, block))

    def _joined(self, x_shape, made):
        return shapes.concat_output_shape(*made)


def _collect(partials, layer, made) -> None:
    """Note the partial gradients of a layer's parameters; none for an empty batch."""
    if made is None:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.grad.fill_(0)
        return
    partials[layer.weight] = made.weight
    if layer.bias is not None:
        partials[layer.bias] = made.bias


class Objective:
    """A model and its loss as one: what training makes small.

    Parameters
    ----------
    model : Layer
    loss : Loss
    fused : bool
        Whether to :func:`fuse` the model, and a final Linear and LogSoftmax with an
        NLLLoss without options, and with a small Linear and ReLU ahead of them, and
        with a small Conv2d and ReLU ahead of those.
    """

    def __init__(self, model, loss, fused=False):
        self.model = fuse(model) if fused else model
        self.loss = loss
        self._body, self._hidden, self._linear = self.model, None, None
        # the body in three: layers ahead, a convolution that the tail may take with it,
        # and what is between that and the tail
        self._ahead, self._conv, self._between = None, None, ()
        self._took_conv = False  # in the last forward
        plain = type(loss) is NLLLoss and loss.is_plain
        if fused and isinstance(self.model, FusedSequential) and plain:
            layers = self.model._layers
            if len(layers) > 1 and _is_head(layers[-2:]):
                self._linear = layers[-2].parts[0]
                layers = layers[:-2]
                if layers and type(layers[-1]) is FusedLinear:
                    self._hidden = layers[-1]
                    layers = layers[:-1]
                self._body = FusedSequential(self.model._original, layers)
                at = _last_conv(layers) if self._hidden is not None else None
                if at is not None:
                    self._ahead = FusedSequential(self.model._original, layers[:at])
                    self._conv, *self._between = layers[at:]
        self._saved = None

    def forward(self, x, labels):
        """The model's output (N, F) and the loss, on the device.

        The loss is one number, of shape (), or (N,) terms that it is the mean of.

        Parameters
        ----------
        x : Tensor (N, ...) or Gather
            A :class:`~cycnn.ops.fused.Gather` is made where the first layer cannot.
        labels : int32 Tensor (N,)
        """
        if isinstance(x, Gather) and not isinstance(self.model, FusedSequential):
            x = x.made()
        hidden, linear = self._hidden, self._linear
        if self._conv is None:
            features = self._body(x)
        else:
            conv = self._conv.parts[0]
            x = as_input(conv, self._ahead(x), conv.weight.data.device)
            # only a foreign array starts elsewhere
            aligned = x.ptr % 16 == 0
            self._took_conv = aligned and self._is_conv_tail(x.device, x.shape)
            if self._took_conv:
                return self._conv_tail(x, labels)
            features = self._flattened(self._conv(x))
        if hidden is not None:
            if self._is_tail(features):
                return self._tail(features, labels)
            features = hidden(features)
        if linear is None or not (
            features.shape[1:] == linear.weight.shape[1:]
            and fused.head_supported(features.device, *linear.weight.shape[::-1])
        ):
            self._saved = None
            scores = features
            if linear is not None:
                for layer in self.model._layers[-2:]:
                    scores = layer(scores)
            return scores, self.loss(scores, labels)
        bias = None if linear.bias is None else linear.bias.data
        log_probs, value, dlogits = fused.head_forward(
            features, linear.weight.data, bias, labels
        )
        self._saved = features, dlogits
        return log_probs, value

    def _is_tail(self, features) -> bool:
        first, last = self._hidden.parts[0].weight.shape, self._linear.weight.shape
        return (
            features.shape[1:] == first[1:]
            and first[0] == last[1]
            and fused.tail_supported(features.device, first[1], *last[::-1])
        )

    def _tail(self, features, labels):
        y, log_probs, losses, dlogits = fused.tail_forward(
            features, *self._last_two(), labels, self._settled()
        )
        self._hidden._saved = features, y
        self._saved = y, dlogits
        return log_probs, losses

    def _last_two(self) -> Tail:
        """What the operations are given of the last two layers."""
        first, last = self._hidden.parts[0], self._linear
        return Tail(
            first.weight.data,
            None if first.bias is None else first.bias.data,
            len(self._hidden.parts) > 1,
            last.weight.data,
            None if last.bias is None else last.bias.data,
        )

    def _flattened(self, y):
        """The input of the last two layers, given that of the layers in between."""
        for layer in self._between:
            y = layer(y)
        return y

    def _is_conv_tail(self, device, x_shape) -> bool:
        if not self._conv._is_fused(device, x_shape):
            return False
        given = self._conv_tail_geometry(x_shape)
        return given is not None and fused.conv_tail_supported(
            device, get_precision(), *given
        )

    def _conv_tail_geometry(self, x_shape):
        """Shapes of the convolution and the tail; None where they do not fit."""
        first, last = self._hidden.parts[0].weight.shape, self._linear.weight.shape
        y_shape = _output_shape(self._conv, x_shape)
        if math.prod(y_shape[1:]) != first[1] or first[0] != last[1]:
            return None
        return x_shape, self._conv.block().geometry, self._last_two().geometry

    def _conv_tail(self, x, labels):
        conv = self._conv
        # settled: a run of the layers ahead is a kernel at least
        y, hidden, log_probs, losses, dlogits = fused.conv_tail_forward(
            x, conv.block(), self._last_two(), labels, conv._packed, True
        )
        conv._saved = x, y, None
        self._hidden._saved = self._flattened(y), hidden
        self._saved = hidden, dlogits
        return log_probs, losses

    def _settled(self) -> bool:
        """Whether a kernel is queued between an update and the last layers.

        Every run of the body is one at least.
        """
        return any(isinstance(layer, _Run) for layer in self._body)

    def backward(self, partials=None):
        """Fill the gradients of all parameters.

        Parameters
        ----------
        partials : dict, optional
            Filled with ``{Parameter: Tensor (splits, *shape)}`` instead, for those
            parameters whose gradient comes in parts that are still to be added up.
        """
        runs = []
        if isinstance(self.model, FusedSequential):
            runs = self.model.runs()
        for run in runs:
            run.partials, run.settled = partials, True
        try:
            self._backward(partials)
        finally:
            for run in runs:
                run.partials, run.settled = None, False

    def pack_filters(self, x_shape, gather=False) -> dict:
        """Have the filters of convolutions packed ahead, for batches of a shape.

        A forward pass then needs no launches to pack them. Whoever changes a filter
        must see to it that its packed copy is renewed: :meth:`PackedFilter.refresh`, or
        a step of :meth:`cycnn.optim.Optimizer.partial_step`.

        Parameters
        ----------
        x_shape : tuple of int
        gather : bool
            As in :meth:`kernels`.

        Returns
        -------
        dict
            ``{Parameter: PackedFilter}``, of the precision that is set.
        """
        if not isinstance(self.model, FusedSequential):
            return {}
        packed = self.model.pack_filters(x_shape, gather)
        for _, layer, shape, _ in _placed(self.model, x_shape):
            if layer is self._conv and self._is_conv_tail(self.model.device, shape):
                packed |= self._pack_conv_filter(shape)
        return packed

    def _pack_conv_filter(self, x_shape) -> dict:
        conv = self._conv
        conv._packed = fused.pack_conv_tail_filter(x_shape, conv.block())
        return {conv.parts[0].weight: conv._packed}

    def kernels(self, x_shape, machine=None, precision=None, gather=False) -> list:
        """The kernels that the fused layers run in a step, found without running any.

        Parameters
        ----------
        x_shape : tuple of int
            (N, ...) of a batch.
        machine : optional
            A GPU, from :func:`cycnn.ops.fused.machine`. Default: the model's.
        precision : {"fp32", "tf32", "bf16"}, optional
            Default: what is set.
        gather : bool
            Whether the batch comes as a :class:`~cycnn.ops.fused.Gather` of bytes.

        Returns
        -------
        list of Kernel
            Those up to the first layer whose output only the layer itself knows the
            shape of, or that ``x_shape`` does not fit. None of the CPU's.
        """
        if machine is None:
            machine = fused.machine_of(self.model.device)
        if machine is None or not isinstance(self.model, FusedSequential):
            return []
        precision = precision or get_precision()
        layers = self.model._layers
        head = None if self._linear is None else layers[-2]
        tail, conv_tail = [], []
        found = []
        for i, layer, shape, y_shape in _placed(self.model, x_shape):
            made = []
            if (
                layer is self._hidden
                and y_shape is not None
                and y_shape[1] == self._linear.weight.shape[1]
            ):
                tail = self._tail_kernels(shape, machine, precision, not conv_tail)
                if conv_tail:
                    tail = conv_tail + _backward_of(tail)
                made = tail
            elif layer is head:
                made = tail or fused.head_kernels(
                    machine,
                    precision,
                    *shape,
                    y_shape[1],
                    self._linear.bias is not None,
                )
            if isinstance(layer, (_Run, _Block)) and not made:
                input_grad = i > self.model._first
                made = layer.kernels(
                    shape, input_grad, machine, precision, gather and i == 0
                )
            if layer is self._conv and made:
                given = self._conv_tail_geometry(shape)
                if given is not None:
                    conv_tail = fused.conv_tail_kernels(machine, precision, *given)
                made = _backward_of(made) if conv_tail else made
            found += made
        return list(dict.fromkeys(found))

    def _tail_kernels(self, x_shape, machine, precision, x_settled):
        first, last = self._hidden.parts[0], self._linear
        return fused.tail_kernels(
            machine,
            precision,
            *x_shape,
            *last.weight.shape[::-1],
            len(self._hidden.parts) > 1,
            first.bias is not None,
            last.bias is not None,
            x_settled,
        )

    def _backward(self, partials):
        if self._saved is None:
            dy = self.loss.backward()
            if self._linear is not None:
                for layer in self.model._layers[:-3:-1]:
                    dy = layer.backward(dy)
        elif self._is_tail_backward():
            self._tail_backward(partials)
            return
        else:
            (features, dlogits), self._saved = self._saved, None
            weight, bias = self._linear.weight, self._linear.bias
            if partials is not None:
                dy, made = fused.head_backward_partials(
                    dlogits, features, weight.data, True
                )
                _collect(partials, self._linear, made)
            else:
                dy = fused.head_backward(
                    dlogits,
                    features,
                    weight.data,
                    weight.grad,
                    None if bias is None else bias.grad,
                    True,
                )
        if self._hidden is not None:
            dy = self._hidden.backward(dy, input_grad=self._body_learns())
        self._end_backward(dy)

    def _body_learns(self) -> bool:
        return any(layer._walk() for layer in self._body)

    def _end_backward(self, dy):
        if self._hidden is not None and not self._body_learns():
            self._body._forget()
        else:
            self._body.backward(dy, input_grad=False)

    def _is_tail_backward(self) -> bool:
        """Whether there is a kernel for the last two layers together."""
        hidden = self._hidden
        return (
            hidden is not None
            and len(hidden.parts) > 1
            and hidden._saved is not None
            and hidden._saved[1] is self._saved[0]
            and fused.tail_backward_supported(
                self._linear.weight.device, *self._linear.weight.shape[::-1]
            )
        )

    def _tail_backward(self, partials):
        (y, dlogits), self._saved = self._saved, None
        (features, _), self._hidden._saved = self._hidden._saved, None
        layers = self._hidden.parts[0], self._linear
        given = dlogits, y, features, *(layer.weight.data for layer in layers)
        # the kernel ahead made the features too, if it took the convolution with it
        learns, x_settled = self._body_learns(), not self._took_conv
        if partials is None:
            grads = []
            for layer in layers:
                bias = None if layer.bias is None else layer.bias.grad
                grads += [layer.weight.grad, bias]
            dy = fused.tail_backward(*given, *grads, learns, x_settled)
        else:
            dy, *made = fused.tail_backward_partials(*given, learns, x_settled)
            for layer, parts in zip(layers, made):
                _collect(partials, layer, parts)
        self._end_backward(dy)


def _last_conv(layers):
    """Where the convolution is that a tail may take with it; None if there is none.

    It has no pooling, is right before the tail but for a Flatten, and a kernel runs
    ahead of it.
    """
    at = len(layers) - 2
    if at < 1 or type(layers[-1]) is not Flatten:
        return None
    conv = layers[at]
    if type(conv) is not FusedConv2d or conv._pool is not None:
        return None
    return at if any(isinstance(layer, _Run) for layer in layers[:at]) else None


def _backward_of(kernels) -> list:
    return [k for k in kernels if not k.library.endswith("_forward")]


def forward_kernels(layers, x_shape, machine, precision) -> list:
    """The kernels of fused layers' forward pass alone; see :meth:`Objective.kernels`."""
    found = []
    for _, layer, shape, _ in _placed(layers, x_shape):
        if isinstance(layer, (_Run, _Block)):
            made = layer.kernels(shape, False, machine, precision)
            found += [kernel for kernel in made if kernel.library.endswith("_forward")]
    return list(dict.fromkeys(found))


def _output_shape(layer, shape):
    """As :func:`output_shape`, of fused layers as well."""
    if isinstance(layer, _Block):
        return layer.output_shape(shape)
    if not isinstance(layer, (_Run, FusedSequential)):
        return output_shape(layer, shape)
    for part in layer.parts if isinstance(layer, _Run) else layer:
        shape = None if shape is None else _output_shape(part, shape)
    return shape


def _is_head(layers) -> bool:
    linear, softmax = layers
    return (
        isinstance(linear, FusedLinear)
        and len(linear.parts) == 1
        and type(softmax) is LogSoftmax
    )
