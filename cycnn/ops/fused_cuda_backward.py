"""Fused backward operations on a GPU: launches of ``cuda/templates/*_backward.cu``.

Weight gradients are made in parts, each from some of the pixels or images of a batch.
The ``..._partials`` functions return the parts as they are, for an update that adds
them itself (:class:`Updater`); the others add them and write dweight and dbias.

:mod:`cycnn.ops.conv_backward_plan` says how a convolution is cut into blocks.
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
from ..tensor import Tensor, empty_on_gpu
from . import conv_backward_plan
from .conv_backward_plan import THREADS
from .cuda_optim import log_of

_FLOAT32, _INT32 = np.dtype("float32"), np.dtype("int32")
_MODES = {"fp32": 0, "tf32": 1, "bf16": 2}
_get = gpu_device.get


class Partials(NamedTuple):
    """Weight and bias gradients in parts, to be added along the first axis."""

    weight: Tensor  # (splits, *shape of weight)
    bias: Tensor | None  # (splits, number of outputs)

    @property
    def splits(self) -> int:
        return self.weight.shape[0]


def _capable(index) -> bool:
    arch = _get(index).arch  # "sm_90"
    return int(arch[3:-1]) >= 8


def _unsupported(what, *given):
    return NotImplementedError(
        f"no fused kernel for the backward of {what} {', '.join(map(str, given))} on "
        f"this GPU: use the unfused layers"
    )


# Sums of partials


def _groups(splits: int) -> int:
    """Threads that share a sum; the kernels' ``groups_of``."""
    return 8 if splits > 16 else 4 if splits > 8 else 2 if splits > 4 else 1


def _sum_span(splits: int) -> int:
    """Numbers of a block."""
    return 4 * THREADS // _groups(splits)


def _sum_blocks(count: int, splits: int) -> int:
    return ceil_div(count, _sum_span(splits))


_reduce = Kernel("update", "reduce_partials", "PPiPPii")


def reduce_partials(partials: Partials, dweight, dbias) -> None:
    """Add partial gradients, in the same order whenever there are as many.

    Parameters
    ----------
    partials : Partials
    dweight : Tensor
        Written.
    dbias : Tensor or None
        Written.
    """
    splits = partials.splits
    n, m = dweight.size, 0 if dbias is None else dbias.size
    grid = _sum_blocks(n, splits) + _sum_blocks(m, splits)
    _reduce(
        _get(dweight.device.index).compute, grid, THREADS, partials.weight, dweight, n,
        partials.bias, dbias, m, splits, dependent=True,
    )  # fmt: skip


def _allocate(splits, weight, dweight, dbias) -> Partials:
    """Room for the parts; the gradients themselves where there is one part."""
    device = weight.device
    if splits == 1 and dweight is not None:
        one = (1, *weight.shape)
        return Partials(
            dweight.reshape(*one),
            None if dbias is None else dbias.reshape(1, dbias.size),
        )
    return Partials(
        empty_on_gpu((splits, *weight.shape), _FLOAT32, device),
        empty_on_gpu((splits, weight.shape[0]), _FLOAT32, device),
    )


def _finish(partials, dweight, dbias) -> None:
    if partials is None:  # an empty batch
        dweight.fill_(0.0)
        if dbias is not None:
            dbias.fill_(0.0)
    elif partials.splits > 1:
        reduce_partials(partials, dweight, dbias)


# Convolution block


class _Conv(NamedTuple):
    y_shape: tuple
    plan: conv_backward_plan.Plan
    kernel: Kernel


@lru_cache(512)
def _conv(
    x_shape, w_shape, relu, pool, stride, padding, need_dx, precision, settled=False
):
    n, k, p, q = shapes.conv2d_output_shape(x_shape, w_shape, stride, padding)
    y_shape = (n, k, p, q)
    if pool is not None:
        y_shape = shapes.pool2d_output_shape(y_shape, pool, pool)
    shape = conv_backward_plan.Shape(
        *x_shape[1:], k, w_shape[2:], stride, padding, pool or (0, 0), relu
    )
    plan = conv_backward_plan.plan(shape, precision, need_dx, settled)
    return _Conv(y_shape, plan, _conv_kernel(plan))


@lru_cache(None)
def _conv_kernel(plan):
    return Kernel(plan.library, plan.library, "PPPPPPPPiii", plan.options)


def conv_block_backward_supported(
    x_shape, w_shape, pool, stride, padding, index
) -> bool:
    """Whether :func:`conv_block_backward` can do it on GPU ``index``, in any precision.

    It asks for compute capability 8.0 or later and for tiles that fit shared memory.
    Dilation, groups and overlapping windows are for the unfused operations.
    """
    if not _capable(index):
        return False
    try:
        for precision in _MODES:
            _conv(x_shape, w_shape, True, pool, stride, padding, True, precision)
    except conv_backward_plan.NoPlan:
        return False
    return True


def conv_block_kernels(
    machine, precision, x_shape, w_shape, relu, pool, stride, padding, need_dx,
    settled=False,
) -> list:  # fmt: skip
    """The kernels of :func:`conv_block_backward`, none where it is not supported.

    Parameters
    ----------
    machine : forward_plan.Machine
    precision : {"fp32", "tf32", "bf16"}
    x_shape, w_shape : tuple of int
    relu, pool, stride, padding, need_dx
        As there.

    Returns
    -------
    list of Kernel
        One from the library of the sums of partials and of :class:`Updater` among them.
    """
    if machine.capability < (8, 0):
        return []
    block = pool, stride, padding
    try:
        for mode in _MODES:
            _conv(x_shape, w_shape, True, *block, True, mode)
        made = _conv(x_shape, w_shape, relu, *block, need_dx, precision, settled)
    except conv_backward_plan.NoPlan:
        return []
    return [made.kernel, _reduce]


def _check_conv(dy, y, code, x, weight, dweight, dbias, relu, pool, made):
    shapes.check_same(y=made.y_shape, dy=dy.shape)
    needed = ("code", code) if pool is not None else ("y", y) if relu else None
    if needed and needed[1] is None:
        raise TypeError(
            f"{needed[0]} is None: with relu={relu} and pool={pool} the backward needs "
            f"what the forward returned"
        )
    if pool is not None:
        shapes.check_same(y=made.y_shape, code=code.shape)
    elif relu:
        shapes.check_same(**{"x * weight": made.y_shape, "y": y.shape})
    if dweight is not None:
        shapes.check_same(weight=weight.shape, dweight=dweight.shape)
    if dbias is not None:
        shapes.check_same(
            **{"weight[:, 0, 0, 0]": weight.shape[:1], "dbias": dbias.shape}
        )


def _run_conv(
    dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx,
    settled,
):  # fmt: skip
    device = x.device
    if not _capable(device.index):
        raise _unsupported("a convolution of", x.shape, weight.shape)
    try:
        made = _conv(
            x.shape, weight.shape, relu, pool, stride, padding, need_dx,
            get_precision(), settled,
        )  # fmt: skip
    except conv_backward_plan.NoPlan:
        raise _unsupported("a convolution of", x.shape, weight.shape) from None
    _check_conv(dy, y, code, x, weight, dweight, dbias, relu, pool, made)
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    n = x.shape[0]
    if not n:
        return dx, None
    plan = made.plan
    gpu = _get(device.index)
    splits, stages = plan.splits(n, gpu.sm_count)
    partials = _allocate(splits, weight, dweight, dbias)
    data_blocks = plan.data_blocks(n)
    made.kernel(
        gpu.compute, data_blocks + plan.weight_tiles * splits, THREADS, dy,
        y if relu and pool is None else None, code, x, weight, dx, partials.weight,
        partials.bias, n, data_blocks, stages, shared=plan.shared, dependent=True,
    )  # fmt: skip
    return dx, partials


def conv_block_backward(
    dy, y, code, x, weight, dweight, dbias, relu, pool, stride=(1, 1), padding=(0, 0),
    need_dx=True, settled=False,
):  # fmt: skip
    """The backward of :func:`cycnn.ops.fused_cuda_forward.conv_block_forward`.

    Parameters
    ----------
    dy : Tensor, the shape of y
    y : Tensor (N, K, P, Q) or None
        Output of the forward; needed with ``relu`` and no ``pool``.
    code : uint8 Tensor or None
        The forward's; needed with ``pool``.
    x : Tensor (N, C, H, W)
    weight : Tensor (K, C, R, S)
    dweight : Tensor (K, C, R, S)
        Written.
    dbias : Tensor (K,) or None
        Written.
    relu, pool, stride, padding
        As in the forward. Where dy is 0 already wherever a ReLU let nothing through,
        ``relu`` may be False, and y is not read.
    need_dx : bool
    settled : bool
        Whether weight and x were complete before the kernel ahead of this one started,
        as they are in a training step; they may then be fetched while that one still
        runs.

    Returns
    -------
    Tensor (N, C, H, W), or None without ``need_dx``

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`conv_block_backward_supported` says no.
    """
    dx, partials = _run_conv(
        dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx,
        settled,
    )  # fmt: skip
    _finish(partials, dweight, dbias)
    return dx


def conv_block_backward_partials(
    dy, y, code, x, weight, relu, pool, stride=(1, 1), padding=(0, 0), need_dx=True,
    settled=False,
):  # fmt: skip
    """:func:`conv_block_backward`, but the weight gradient stays in parts.

    Returns
    -------
    dx : Tensor or None
    partials : Partials, or None for an empty batch
    """
    return _run_conv(
        dy, y, code, x, weight, None, None, relu, pool, stride, padding, need_dx,
        settled,
    )  # fmt: skip


# Linear block


class _Linear(NamedTuple):
    kernel: Kernel
    shared: int
    weight_tile: tuple  # outputs and inputs of a block
    data_tile: tuple  # images and inputs of a block
    depth: int  # images of a stage of the weight gradient


def _stride(size, residue):
    return size + (residue - size) % 32


_TILES = (2, 2, 2), (2, 1, 2), (2, 1, 1), (1, 1, 1)


def _tile(rows, columns, processors, choices=_TILES):
    """((warps along the rows, tiles of 16 rows and of 8 columns a warp), its size)."""
    for warps, m, k in choices:
        size = 16 * m * warps, 8 * k * (8 // warps)
        if ceil_div(rows, size[0]) * ceil_div(columns, size[1]) >= processors // 3:
            break
    return (warps, m, k), size


@lru_cache(512)
def _linear(n, inputs, outputs, relu, precision, processors):
    """Tiles for a batch of about n: as large as keeps every multiprocessor busy."""
    pairs = 2 if precision == "bf16" else 1
    words = 64
    dw, dw_size = _tile(outputs, inputs, processors)
    dx, dx_size = _tile(n, inputs, processors)
    if max(dw_size + dx_size) <= 64:
        words = 128 // pairs
    weight_words = words * (_stride(dw_size[0], 8) + _stride(dw_size[1], 8))
    data_words = dx_size[0] * _stride(words, 4) + words * _stride(dx_size[1], 8)
    shared = 4 * max(weight_words, data_words)
    macros = {
        "MODE": _MODES[precision], "I": inputs, "O": outputs, "RELU": int(relu),
        "WORDS": words, "SHARED": shared,
        "DW_WM": dw[0], "DW_MT": dw[1], "DW_NT": dw[2],
        "DX_WM": dx[0], "DX_MT": dx[1], "DX_NT": dx[2],
    }  # fmt: skip
    kernel = Kernel(
        "linear_block_backward", "linear_block_backward", "PPPPPPPiii",
        tuple(f"-D{name}={value}" for name, value in macros.items()),
    )  # fmt: skip
    return _Linear(kernel, shared, dw_size, dx_size, words * pairs)


def _linear_for(n, inputs, outputs, relu, precision, processors):
    # tiles are chosen for a power of two, so that a smaller last batch needs no others
    return _linear(
        1 << (n - 1).bit_length(), inputs, outputs, relu, precision, processors
    )


def linear_block_kernels(machine, precision, n, inputs, outputs, relu) -> list:
    """The kernels of :func:`linear_block_backward`; see :func:`conv_block_kernels`."""
    if machine.capability < (8, 0):
        return []
    made = _linear_for(n, inputs, outputs, relu, precision, machine.sm_count)
    return [made.kernel, _reduce]


def _split(n, depth, wanted) -> tuple:
    """(splits of a batch, images of each): whole stages of ``depth`` images."""
    stages = ceil_div(n, depth)
    images = ceil_div(stages, min(stages, max(1, wanted))) * depth
    return ceil_div(n, images), images


def _run_linear(dy, y, x, weight, dweight, dbias, relu, need_dx):
    device = x.device
    if not _capable(device.index):
        raise _unsupported("a linear layer of", x.shape, weight.shape)
    y_shape = n, outputs = shapes.linear_output_shape(x.shape, weight.shape)
    shapes.check_same(y=y_shape, dy=dy.shape)
    if relu:
        shapes.check_same(**{"x weight^T": y_shape, "y": y.shape})
    if dweight is not None:
        shapes.check_linear_backward(
            dy.shape, x.shape, weight.shape, dweight.shape,
            None if dbias is None else dbias.shape,
        )  # fmt: skip
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not n:
        return dx, None
    gpu = _get(device.index)
    inputs = x.shape[1]
    made = _linear_for(n, inputs, outputs, relu, get_precision(), gpu.sm_count)
    tiles = ceil_div(outputs, made.weight_tile[0]) * ceil_div(
        inputs, made.weight_tile[1]
    )
    splits, images = _split(n, made.depth, gpu.sm_count // tiles)
    partials = _allocate(splits, weight, dweight, dbias)
    blocks = tiles * splits
    grid = blocks
    if need_dx:
        grid += ceil_div(n, made.data_tile[0]) * ceil_div(inputs, made.data_tile[1])
    made.kernel(
        gpu.compute, grid, THREADS, dy, y if relu else None, x, weight, dx,
        partials.weight, partials.bias, n, blocks, images, shared=made.shared,
        dependent=True,
    )  # fmt: skip
    return dx, partials


def linear_block_backward(dy, y, x, weight, dweight, dbias, relu, need_dx=True):
    """The backward of :func:`cycnn.ops.fused_cuda_forward.linear_block_forward`.

    Parameters
    ----------
    dy : Tensor (N, O)
    y : Tensor (N, O) or None
        Output of the forward; needed with ``relu``.
    x : Tensor (N, I)
    weight : Tensor (O, I)
    dweight : Tensor (O, I)
        Written.
    dbias : Tensor (O,) or None
        Written.
    relu, need_dx : bool

    Returns
    -------
    Tensor (N, I), or None without ``need_dx``

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        Before compute capability 8.0.
    """
    dx, partials = _run_linear(dy, y, x, weight, dweight, dbias, relu, need_dx)
    _finish(partials, dweight, dbias)
    return dx


def linear_block_backward_partials(dy, y, x, weight, relu, need_dx=True):
    """:func:`linear_block_backward`, but the weight gradient stays in parts.

    Returns
    -------
    dx : Tensor or None
    partials : Partials, or None for an empty batch
    """
    return _run_linear(dy, y, x, weight, None, None, relu, need_dx)


def head_backward(dlogits, x, weight, dweight, dbias, need_dx=True):
    """The backward of :func:`cycnn.ops.fused_cuda_forward.head_forward`.

    Its forward made dlogits already, so a linear layer is left;
    see :func:`linear_block_backward`.
    """
    return linear_block_backward(
        dlogits, None, x, weight, dweight, dbias, False, need_dx
    )


def head_backward_partials(dlogits, x, weight, need_dx=True):
    """:func:`head_backward`, but the weight gradient stays in parts."""
    return linear_block_backward_partials(dlogits, None, x, weight, False, need_dx)


# The last two layers


class _Tail(NamedTuple):
    kernel: Kernel
    shared: int
    data_tile: tuple  # images and inputs of a block
    weight_tile: tuple  # hidden units and inputs of a block
    depth: int  # images of a stage of the weight gradients


_TAIL_HIDDEN, _TAIL_OUTPUTS = 256, 32
# hidden units of a block on dweight_out
_OUT_TILE = 64


@lru_cache(512)
def _tail(n, inputs, hidden, outputs, input_relu, settled, precision, processors):
    """As :func:`_linear` for the kernel of :func:`tail_backward`."""
    pairs = 2 if precision == "bf16" else 1
    depth = min(128, max(16, n))
    words = depth // pairs
    hidden_words = 8 * ceil_div(hidden, 8 * pairs)
    dw, dw_size = _tile(hidden, inputs, processors)

    def data_words(size):
        rows = size[0] * _stride(hidden_words, 4)
        return rows + hidden_words * _stride(size[1], 8)

    dx, dx_size = _tile(n, inputs, processors, ((2, 1, 2), (1, 1, 1)))
    if 4 * data_words(dx_size) > conv_backward_plan.SHARED_LIMIT:
        dx, dx_size = _tile(n, inputs, processors, ((1, 1, 1),))
    weight_words = words * (_stride(dw_size[0], 8) + _stride(dw_size[1], 8))
    out_rows = 16 * ceil_div(outputs, 16)
    out_words = words * (_stride(out_rows, 8) + _stride(_OUT_TILE, 8))
    shared = 4 * max(data_words(dx_size), weight_words, out_words)
    macros = {
        "MODE": _MODES[precision], "I": inputs, "H": hidden, "O": outputs,
        "INPUT_RELU": int(input_relu), "SETTLED": int(settled), "WORDS": words,
        "SHARED": shared,
        "DW_WM": dw[0], "DW_MT": dw[1], "DW_NT": dw[2],
        "DX_WM": dx[0], "DX_MT": dx[1], "DX_NT": dx[2],
    }  # fmt: skip
    kernel = Kernel(
        "tail_backward", "tail_backward", "PPPPPPPPPPiiii",
        tuple(f"-D{name}={value}" for name, value in macros.items()),
    )  # fmt: skip
    return _Tail(kernel, shared, dx_size, dw_size, depth)


def _tail_for(n, *shape):
    return _tail(1 << (n - 1).bit_length(), *shape)


def _is_tail(hidden, outputs) -> bool:
    return hidden <= _TAIL_HIDDEN and outputs <= _TAIL_OUTPUTS


def tail_backward_supported(hidden, outputs, index) -> bool:
    """Whether :func:`tail_backward` can do it on GPU ``index``, in any precision.

    It asks for compute capability 8.0 or later, up to 256 hidden units, since a block
    has the weights of all of them, and up to 32 outputs, since each block multiplies
    them again.
    """
    return _capable(index) and _is_tail(hidden, outputs)


def tail_backward_kernels(
    machine, precision, n, inputs, hidden, outputs, input_relu=False, settled=False
) -> list:
    """The kernels of :func:`tail_backward`; see :func:`conv_block_kernels`."""
    if machine.capability < (8, 0) or not _is_tail(hidden, outputs):
        return []
    made = _tail_for(
        n, inputs, hidden, outputs, input_relu, settled, precision, machine.sm_count
    )
    return [made.kernel, _reduce]


def _run_tail(
    dlogits, hidden, x, weight, weight_out, gradients, input_relu, settled, need_dx
):
    device, (n, inputs) = x.device, x.shape
    hidden_shape = shapes.linear_output_shape(x.shape, weight.shape)
    logits_shape = shapes.linear_output_shape(hidden_shape, weight_out.shape)
    shapes.check_same(**{"x weight^T": hidden_shape, "hidden": hidden.shape})
    shapes.check_same(**{"hidden weight_out^T": logits_shape, "dlogits": dlogits.shape})
    units, outputs = weight.shape[0], weight_out.shape[0]
    if not tail_backward_supported(units, outputs, device.index):
        raise _unsupported("a tail of", x.shape, weight.shape, weight_out.shape)
    for name, given, target in zip(
        ("dweight", "dbias", "dweight_out", "dbias_out"),
        (weight.shape, (units,), weight_out.shape, (outputs,)),
        gradients,
    ):
        if target is not None:
            shapes.check_same(**{name[1:]: given, name: target.shape})
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not n:
        return dx, None, None
    gpu = _get(device.index)
    made = _tail_for(
        n, inputs, units, outputs, input_relu, settled, get_precision(), gpu.sm_count
    )
    tiles = ceil_div(units, made.weight_tile[0]) * ceil_div(inputs, made.weight_tile[1])
    splits, images = _split(n, made.depth, gpu.sm_count // tiles)
    parts = _allocate(splits, weight, *gradients[:2])
    parts_out = _allocate(splits, weight_out, *gradients[2:])
    data_blocks = 0
    if need_dx:
        data_blocks = ceil_div(n, made.data_tile[0])
        data_blocks *= ceil_div(inputs, made.data_tile[1])
    blocks = data_blocks + splits * (tiles + ceil_div(units, _OUT_TILE))
    made.kernel(
        gpu.compute, blocks, THREADS, dlogits, hidden, x, weight, weight_out, dx,
        parts.weight, parts.bias, parts_out.weight, parts_out.bias, n, data_blocks,
        splits * tiles, images, shared=made.shared, dependent=True,
    )  # fmt: skip
    return dx, parts, parts_out


def tail_backward(
    dlogits, hidden, x, weight, weight_out, dweight, dbias, dweight_out, dbias_out,
    input_relu=False, settled=False, need_dx=True,
):  # fmt: skip
    """The backward of linear, ReLU and head in one launch.

    As :func:`head_backward` and then :func:`linear_block_backward` with its ReLU; the
    gradient between the two never exists in memory.

    Parameters
    ----------
    dlogits : Tensor (N, O)
    hidden : Tensor (N, H)
        relu(x weight^T + bias).
    x : Tensor (N, I)
    weight : Tensor (H, I)
    weight_out : Tensor (O, H)
    dweight : Tensor (H, I)
        Written.
    dbias : Tensor (H,) or None
        Written.
    dweight_out : Tensor (O, H)
        Written.
    dbias_out : Tensor (O,) or None
        Written.
    input_relu : bool
        x is what a ReLU let through, and the gradient that is returned is that at the
        ReLU's input: 0 where x is not positive.
    settled : bool
        Whether weight, weight_out and x were complete before the kernel ahead of this
        one started, as they are in a training step; they are then fetched while that
        one still runs.
    need_dx : bool

    Returns
    -------
    Tensor (N, I), or None without ``need_dx``

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`tail_backward_supported` says no.
    """
    gradients = dweight, dbias, dweight_out, dbias_out
    dx, parts, parts_out = _run_tail(
        dlogits, hidden, x, weight, weight_out, gradients, input_relu, settled, need_dx
    )
    _finish(parts, dweight, dbias)
    _finish(parts_out, dweight_out, dbias_out)
    return dx


def tail_backward_partials(
    dlogits, hidden, x, weight, weight_out, input_relu=False, settled=False,
    need_dx=True,
):  # fmt: skip
    """:func:`tail_backward`, but the weight gradients stay in parts.

    Returns
    -------
    dx : Tensor or None
    partials, partials_out : Partials, or None for an empty batch
        Of the linear layer, and of the head.
    """
    return _run_tail(
        dlogits, hidden, x, weight, weight_out, (None,) * 4, input_relu, settled,
        need_dx,
    )  # fmt: skip


# Update

# Entry of update.cu
_ENTRY = np.dtype(
    [("offset", "i8"), ("partials", "i8")]
    + [(name, "i4") for name in ("count", "splits", "first_block", "span")]
    + [("packed", "i8"), ("layout", "i4", 7), ("unused", "i4")]
)


def _update_span(splits, layout) -> int:
    """Numbers of a block; with a packed filter whole units of it, if one block can."""
    span = _sum_span(splits)
    piece = 1 if layout is None else layout.channels_of_unit * layout.taps
    return span // piece * piece or span


class Updater:
    """Sums of partial gradients and the optimizer's step, for a slab in one launch.

    Parameters
    ----------
    parameters : int
        Number of parameters in the slab.
    device : Device
    """

    _rmsprop = Kernel("update", "update_rmsprop", "PiPPPPPffff")
    _sgd = Kernel("update", "update_sgd", "PiPPPPffi")
    _adam = Kernel("update", "update_adam", "PiPPPPPiPffffffffi")
    _adagrad = Kernel("update", "update_adagrad", "PiPPPPiPfff")

    def __init__(self, parameters, device):
        self._entries, self._device = parameters, device
        self._table = empty_on_gpu((parameters, _ENTRY.itemsize // 4), _INT32, device)

    def plan(self, entries) -> None:
        """Say where the partial gradients are; :meth:`upload` tells the GPU.

        The two are apart since a copy from the host cannot be part of a recording.

        Parameters
        ----------
        entries : sequence of (int, Tensor, PackedFilter or None)
            For each parameter the offset of its first number in the slabs, a multiple
            of 4, and its partial gradients (splits, *shape). They must be in place
            whenever the step runs. A packed filter is written, too.
        """
        rows, first = [], 0
        for offset, partials, packed in entries:
            splits = partials.shape[0]
            count = partials.size // splits
            to, numbers, span = 0, (0,) * 7, _update_span(splits, None)
            if packed is not None:
                to, numbers = packed.data.ptr, packed.layout[:7]
                span = _update_span(splits, packed.layout)
            entry = offset, partials.ptr, count, splits, first, span, to, numbers, 0
            rows.append(entry)
            first += ceil_div(count, span)
        self._blocks = first
        self._rows = np.array(rows, _ENTRY).view(np.int32).reshape(self._table.shape)

    def upload(self) -> None:
        """Make what :meth:`plan` was told known to the GPU."""
        self._table.copy_(self._rows)

    def rmsprop(
        self, params, grads, squares, buffers, lr, alpha, eps, weight_decay, momentum
    ):
        """One step of RMSprop, as ``ops.rmsprop_step`` does it.

        Parameters
        ----------
        params, squares : Tensor
            The slabs of parameters and of mean squares; updated.
        grads : Tensor or None
            Where the gradients are written, if anybody wants to see them.
        buffers : Tensor or None
            The momentum, needed when ``momentum`` is not 0; updated.
        lr : Tensor of shape ()
        alpha, eps, weight_decay, momentum : float
        """
        self._rmsprop(
            _get(self._device.index).compute, self._blocks, THREADS, self._table,
            self._entries, params, grads, squares, buffers, lr, alpha, eps,
            weight_decay, momentum, dependent=True,
        )  # fmt: skip

    def sgd(self, params, grads, buffers, lr, momentum, weight_decay, nesterov):
        """One step of descent, as ``ops.sgd_step`` does it; see :meth:`rmsprop`."""
        self._sgd(
            _get(self._device.index).compute, self._blocks, THREADS, self._table,
            self._entries, params, grads, buffers, lr, weight_decay, momentum,
            int(nesterov), dependent=True,
        )  # fmt: skip

    def adam(
        self, params, grads, means, squares, steps, advance, lr, beta1, beta2, eps,
        weight_decay, decoupled,
    ):  # fmt: skip
        """One step of Adam or AdamW, as ``ops.adam_step`` does it without a largest
        mean square; see :meth:`rmsprop`.
        """
        self._adam(
            _get(self._device.index).compute, self._blocks, THREADS, self._table,
            self._entries, params, grads, squares, means, steps, int(advance), lr,
            beta1, 1 - beta1, log_of(beta1), beta2, 1 - beta2, log_of(beta2), eps,
            weight_decay, int(decoupled), dependent=True,
        )  # fmt: skip

    def adagrad(
        self, params, grads, sums, steps, advance, lr, lr_decay, eps, weight_decay
    ):
        """One step of Adagrad, as ``ops.adagrad_step`` does it; see :meth:`rmsprop`."""
        self._adagrad(
            _get(self._device.index).compute, self._blocks, THREADS, self._table,
            self._entries, params, grads, sums, steps, int(advance), lr, lr_decay, eps,
            weight_decay, dependent=True,
        )  # fmt: skip
