"""Fused forward operations on a GPU: launches of ``cuda/templates/*_forward.cu``.

:mod:`cycnn.ops.forward_plan` says how the kernels are specialised for a layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import shapes
from ..gpu import device as gpu_device
from ..gpu.launch import Kernel
from ..precision import get_precision
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from .forward_plan import (
    ConvShape,
    Machine,
    Plan,
    conv_plan,
    head_plan,
    linear_plan,
    pair_plan,
    tail_plan,
)
from .fused import Gather

_FLOAT32, _UINT8 = np.dtype("float32"), np.dtype("uint8")
_MODES = {"fp32": 0, "tf32": 1, "bf16": 2}
_get = gpu_device.get


@lru_cache(None)
def _machine(index):
    gpu = _get(index)
    return Machine(gpu.arch, gpu.sm_count)


def _batch(n):
    """The batch that plans are made for: a power of two, so that few are made."""
    return 1 << max(n - 1, 0).bit_length()


class _Kernels(NamedTuple):
    plan: Plan
    run: Kernel
    pack: Kernel | None


@lru_cache(None)
def _kernels(plan, name, signature):
    definitions = plan.definitions
    run = Kernel(plan.library, name, signature, definitions, plan.specific)
    pack = None
    if plan.layout is not None:
        pack = Kernel(
            plan.library, "conv_pack_filter", "PP", definitions, plan.specific
        )
    return _Kernels(plan, run, pack)


def _conv_shape(x_shape, w_shape, bias_shape, relu, pool, stride, padding):
    """(ConvShape, shape of y); ShapeError where they do not fit."""
    y_shape = n, k, _, _ = shapes.conv2d_output_shape(
        x_shape, w_shape, stride, padding, bias_shape=bias_shape
    )
    if pool is not None:
        y_shape = shapes.pool2d_output_shape(y_shape, pool, pool)
    shape = ConvShape(
        *x_shape[1:],
        k,
        *w_shape[2:],
        stride,
        padding,
        pool or (1, 1),
        bool(relu),
        bias_shape is not None,
        pool is not None,
    )
    return shape, y_shape


def conv_output_shape(x_shape, block) -> tuple:
    """Shape of the y of a convolution block, given its ``ConvBlock.geometry``."""
    return _conv_shape(x_shape, *block)[1]


@lru_cache(512)
def _conv(x_shape, block, index, precision, gather=False):
    """(shape of y, kernels or None) of a convolution block.

    ``block``: shape of the weight, of the bias or None, relu, pool, stride, padding.
    """
    return _conv_on(_machine(index), x_shape, block, precision, gather)


def _conv_on(machine, x_shape, block, precision, gather=False):
    shape, y_shape = _conv_shape(x_shape, *block)
    plan = conv_plan(shape, _batch(x_shape[0]), machine, _MODES[precision], gather)
    if plan is None:
        return y_shape, None
    if plan.library == "conv_few_forward":
        signature = ("PPffP" if gather else "P") + "PPPP"
    else:
        signature = "PPPPPii"
    return y_shape, _kernels(plan, plan.library, signature)


def conv_block_supported(x_shape, w_shape, pool, stride, padding, index) -> bool:
    """Whether :func:`conv_block_forward` can do it on GPU ``index``, in any precision.

    It asks for an NVIDIA GPU of compute capability 8.0 or later and for a tile that
    fits its shared memory. Dilation, groups and overlapping windows are for the unfused
    operations.
    """
    block = w_shape, None, True, pool, stride, padding
    return all(_conv(x_shape, block, index, mode)[1] for mode in _MODES)


def gather_supported(x_shape, w_shape, pool, stride, padding, index) -> bool:
    """The same where x is a :class:`Gather`: for few channels."""
    block = w_shape, None, True, pool, stride, padding
    return all(_conv(x_shape, block, index, mode, True)[1] for mode in _MODES)


def conv_block_kernels(
    machine, precision, x_shape, w_shape, bias, relu, pool, stride, padding, gather
) -> list:
    """The kernels of :func:`conv_block_forward`, none where it is not supported.

    Parameters
    ----------
    machine : Machine
    precision : {"fp32", "tf32", "bf16"}
    x_shape, w_shape : tuple of int
    bias : bool
    relu, pool, stride, padding
        As there.
    gather : bool
        Whether x is a :class:`Gather`, if the kernel takes one.

    Returns
    -------
    list of Kernel
    """
    block = w_shape, None, True, pool, stride, padding
    if not all(_conv_on(machine, x_shape, block, mode)[1] for mode in _MODES):
        return []
    block = w_shape, w_shape[:1] if bias else None, relu, pool, stride, padding
    made = None
    if gather:
        made = _conv_on(machine, x_shape, block, precision, True)[1]
    made = made or _conv_on(machine, x_shape, block, precision)[1]
    return [made.run] if made.pack is None else [made.pack, made.run]


def _unsupported(what, *given):
    return NotImplementedError(
        f"no fused kernel for {what} {', '.join(map(str, given))} on this GPU: use the "
        f"unfused layers"
    )


class PackedFilter:
    """A filter as some kernels want it, kept beside the filter itself.

    A kernel that is given none packs the filter for itself, in a launch of its own.
    Whoever changes the filter packs it anew, with :meth:`refresh` or, as
    :class:`~cycnn.ops.fused_cuda_backward.Updater` does, where it writes the filter.

    Attributes
    ----------
    data : Tensor
    layout : FilterLayout
    settled : bool
        Whether some other kernel is queued between the one that wrote it last and the
        next one that reads it. That one may then fetch it before the kernel ahead has
        finished.
    """

    def __init__(self, kernels, weight):
        self._kernel, self._weight = kernels.pack, weight
        self.layout = kernels.plan.layout
        self.data = empty_on_gpu((self.layout.words,), _FLOAT32, weight.device)
        self.refresh()

    def refresh(self) -> None:
        """Pack the filter as it is now."""
        self.settled = False
        self._kernel(
            _get(self._weight.device.index).compute,
            ceil_div(self.layout.threads, 256),
            256,
            self._weight,
            self.data,
            dependent=True,
        )


def _packed(kernels, weight, kept):
    """``kept`` if it is what the kernels want, else the filter packed now."""
    if kept is not None and kept.layout == kernels.plan.layout:
        return kept
    return PackedFilter(kernels, weight)


def pack_filter(weight, x_shape, pool, stride=(1, 1), padding=(0, 0)):
    """The packed filter for :func:`conv_block_forward` of an x of this shape.

    Packing ahead takes a launch out of the forward pass.

    Returns
    -------
    PackedFilter or None
        None where the kernel takes the filter as it is.
    """
    block = weight.shape, None, True, pool, stride, padding
    _, kernels = _conv(x_shape, block, weight.device.index, get_precision())
    if kernels is None:
        raise _unsupported("a convolution of", x_shape, weight.shape)
    return None if kernels.pack is None else PackedFilter(kernels, weight)


def conv_block_forward(
    x, weight, bias, relu, pool, stride=(1, 1), padding=(0, 0), packed=None
):
    """Convolution, ReLU if ``relu`` and max pooling if ``pool``, in one kernel.

    Parameters
    ----------
    x : Tensor (N, C, H, W), or Gather where C is at most FEW_CHANNELS
    weight : Tensor (K, C, R, S)
    bias : Tensor (K,) or None
    relu : bool
    pool : tuple of int or None
        Height and width of the windows, which are also their distance. Rows and columns
        left over are dropped.
    stride, padding : tuple of int
    packed : PackedFilter or None
        The same filter, packed; used if it is packed for this precision and about this
        batch.

    Returns
    -------
    y : Tensor (N, K, P, Q), pooled
    code : uint8 Tensor like y, or None without ``pool``
        0 where no gradient passes (``relu`` and y <= 0), else 1 + the position of the
        first maximum in its window, row by row.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`conv_block_supported` says no.
    """
    device = weight.device
    gather = isinstance(x, Gather)
    bias_shape = None if bias is None else bias.shape
    block = weight.shape, bias_shape, relu, pool, stride, padding
    y_shape, kernels = _conv(x.shape, block, device.index, get_precision(), gather)
    if kernels is None:
        raise _unsupported("a convolution of", x.shape, weight.shape)
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    code = None if pool is None else empty_on_gpu(y_shape, _UINT8, device)
    n = y_shape[0]
    if n:
        plan = kernels.plan
        arguments = *(x.arguments if gather else (x,)), weight, bias, y, code
        if kernels.pack is not None:
            packed = _packed(kernels, weight, packed)
            arguments = x, packed.data, bias, y, code, n, packed.settled
        kernels.run(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            *arguments,
            shared=plan.shared,
            dependent=True,
        )
    return y, code


@lru_cache(512)
def _pair(x_shape, first, second, index, precision, gather):
    """(shape of y1, of y2, kernels or None); first and second as in _conv."""
    return _pair_on(_machine(index), x_shape, first, second, precision, gather)


def _pair_on(machine, x_shape, first, second, precision, gather):
    one, y1_shape = _conv_shape(x_shape, *first)
    two, y2_shape = _conv_shape(y1_shape, *second)
    plan = pair_plan(one, two, _batch(x_shape[0]), machine, _MODES[precision], gather)
    if plan is None:
        return y1_shape, y2_shape, None
    signature = ("PPffP" if gather else "P") + "PPPP" + "PPPPii"
    return y1_shape, y2_shape, _kernels(plan, plan.library, signature)


def conv_pair_supported(x_shape, first, second, index, gather=False) -> bool:
    """Whether :func:`conv_pair_forward` has a kernel, in the precision that is set."""
    given = x_shape, first.geometry, second.geometry, index, get_precision(), gather
    return bool(_pair(*given)[2])


def conv_pair_kernels(machine, precision, x_shape, first, second, gather) -> list:
    """The kernels of :func:`conv_pair_forward`; see :func:`conv_block_kernels`.

    ``first`` and ``second`` are the ``geometry`` of a :class:`ConvBlock`.
    """
    made = _pair_on(machine, x_shape, first, second, precision, gather)[2]
    return [] if made is None else [made.pack, made.run]


def pack_pair_filter(x_shape, first, second, gather=False):
    """The packed filter of ``second``, as :func:`pack_filter`."""
    index = second.weight.device.index
    given = x_shape, first.geometry, second.geometry, index, get_precision(), gather
    kernels = _pair(*given)[2]
    if kernels is None:
        raise _unsupported("convolutions of", x_shape, first.geometry, second.geometry)
    return PackedFilter(kernels, second.weight)


def conv_pair_forward(x, first, second, packed=None):
    """A first convolution block of few channels and the one behind it, in one kernel.

    The result is that of two calls of :func:`conv_block_forward`.

    Parameters
    ----------
    x : Tensor (N, C, H, W) or Gather
    first, second : ConvBlock
    packed : PackedFilter or None
        Of ``second``; see :func:`conv_block_forward`.

    Returns
    -------
    y1, code1, y2, code2 : Tensor or None

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`conv_pair_supported` says no.
    """
    device = first.weight.device
    gather = isinstance(x, Gather)
    y1_shape, y2_shape, kernels = _pair(
        x.shape,
        first.geometry,
        second.geometry,
        device.index,
        get_precision(),
        gather,
    )
    if kernels is None:
        raise _unsupported("convolutions of", x.shape, first.geometry, second.geometry)
    y1, y2 = (empty_on_gpu(shape, _FLOAT32, device) for shape in (y1_shape, y2_shape))
    code1, code2 = (
        None if block.pool is None else empty_on_gpu(shape, _UINT8, device)
        for block, shape in ((first, y1_shape), (second, y2_shape))
    )
    n = x.shape[0]
    if n:
        plan = kernels.plan
        packed = _packed(kernels, second.weight, packed)
        kernels.run(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            *(x.arguments if gather else (x,)),
            first.weight,
            first.bias,
            y1,
            code1,
            packed.data,
            second.bias,
            y2,
            code2,
            n,
            # a gather is what a step begins with, right behind the update
            packed.settled and not gather,
            shared=plan.shared,
            dependent=True,
        )
    return y1, code1, y2, code2


def _aligned(*tensors):
    """Whether they start at multiples of 16 bytes, as all do but foreign ones."""
    return not any(tensor.ptr % 16 for tensor in tensors)


def linear_block_forward(x, weight, bias, relu):
    """A linear layer, and ReLU if ``relu``, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight : Tensor (O, I)
    bias : Tensor (O,) or None
    relu : bool

    Returns
    -------
    Tensor (N, O)

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        Before compute capability 8.0.
    """
    device = x.device
    y_shape = n, outputs = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    plan = linear_plan(
        _batch(n),
        x.shape[1],
        outputs,
        bool(relu),
        bias is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a linear layer of", x.shape, weight.shape)
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    if n:
        _linear_kernel(plan)(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            x,
            weight,
            bias,
            y,
            n,
            dependent=True,
        )
    return y


def _linear_kernel(plan):
    return _kernels(plan, "linear_block_forward", "PPPPi").run


def linear_block_kernels(machine, precision, n, inputs, outputs, bias, relu) -> list:
    """The kernels of :func:`linear_block_forward`; see :func:`conv_block_kernels`."""
    plan = linear_plan(
        _batch(n), inputs, outputs, relu, bias, machine, _MODES[precision]
    )
    return [] if plan is None else [_linear_kernel(plan)]


def head_supported(inputs, classes, index) -> bool:
    """Whether :func:`head_forward` can do it on GPU ``index``; for few weights."""
    return head_plan(inputs, classes, True, _machine(index), 0) is not None


def _head_kernel(plan):
    return _kernels(plan, "head_forward", "PPPPPPPi").run


def head_kernels(machine, precision, inputs, classes, bias) -> list:
    """The kernels of :func:`head_forward`; see :func:`conv_block_kernels`."""
    plan = head_plan(inputs, classes, bias, machine, _MODES[precision])
    return [] if plan is None else [_head_kernel(plan)]


def head_forward(x, weight, bias, labels):
    """The last linear layer with log-softmax, mean NLL and its gradient, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight : Tensor (O, I)
    bias : Tensor (O,) or None
    labels : int32 Tensor (N,)

    Returns
    -------
    log_probs : Tensor (N, O)
    loss : Tensor ()
        Their mean at the labels, negated; NaN for a label that is no class, and for an
        empty batch.
    dlogits : Tensor (N, O)
        (softmax - onehot) / N, the gradient of the loss.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`head_supported` says no.
    """
    device = x.device
    y_shape = n, classes = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    shapes.check_labels("x weight^T", y_shape, labels.shape)
    plan = head_plan(
        x.shape[1],
        classes,
        bias is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a head of", x.shape, weight.shape)
    log_probs = empty_on_gpu(y_shape, _FLOAT32, device)
    dlogits = empty_on_gpu(y_shape, _FLOAT32, device)
    loss = empty_on_gpu((), _FLOAT32, device)
    _head_kernel(plan)(
        _get(device.index).compute,
        plan.channel_tiles,
        plan.block,
        x,
        weight,
        bias,
        labels,
        log_probs,
        loss,
        dlogits,
        n,
        shared=plan.shared,
        dependent=True,
    )
    return log_probs, loss, dlogits


def tail_supported(inputs, hidden, classes, index) -> bool:
    """Whether :func:`tail_forward` can do it on GPU ``index``: Hopper, a small tail."""
    machine = _machine(index)
    return tail_plan(inputs, hidden, classes, True, True, True, machine, 0) is not None


def _tail_kernel(plan):
    return _kernels(plan, "tail_forward", "PPPPPPPPPPi").run


def tail_kernels(
    machine, precision, inputs, hidden, classes, relu, bias, bias_out
) -> list:
    """The kernels of :func:`tail_forward`; see :func:`conv_block_kernels`."""
    given = inputs, hidden, classes, relu, bias, bias_out
    plan = tail_plan(*given, machine, _MODES[precision])
    return [] if plan is None else [_tail_kernel(plan)]


def tail_forward(x, weight, bias, relu, weight_out, bias_out, labels):
    """A linear layer, ReLU if ``relu``, and the head behind it, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight, bias : Tensor (H, I), Tensor (H,) or None
    relu : bool
    weight_out, bias_out : Tensor (O, H), Tensor (O,) or None
    labels : int32 Tensor (N,)

    Returns
    -------
    hidden : Tensor (N, H)
    log_probs : Tensor (N, O)
    losses : Tensor (N,)
        -log_probs at the labels, whose mean is the loss; NaN for a label that is no
        class.
    dlogits : Tensor (N, O)
        (softmax - onehot) / N, the gradient of the mean.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`tail_supported` says no.
    """
    device = x.device
    hidden_shape = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    y_shape = n, classes = shapes.linear_output_shape(
        hidden_shape, weight_out.shape, None if bias_out is None else bias_out.shape
    )
    shapes.check_labels("the scores", y_shape, labels.shape)
    plan = tail_plan(
        x.shape[1],
        hidden_shape[1],
        classes,
        bool(relu),
        bias is not None,
        bias_out is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a tail of", x.shape, weight.shape, weight_out.shape)
    hidden = empty_on_gpu(hidden_shape, _FLOAT32, device)
    log_probs = empty_on_gpu(y_shape, _FLOAT32, device)
    dlogits = empty_on_gpu(y_shape, _FLOAT32, device)
    losses = empty_on_gpu((n,), _FLOAT32, device)
    if n:
        _tail_kernel(plan)(
            _get(device.index).compute,
            plan.grid(n)[0],
            plan.block,
            x,
            weight,
            bias,
            weight_out,
            bias_out,
            labels,
            hidden,
            log_probs,
            losses,
            dlogits,
            n,
            dependent=True,
        )
    return hidden, log_probs, losses, dlogits
