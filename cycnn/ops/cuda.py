"""The operations on tensors of a GPU: launch shapes, arguments and workspace.

The functions are specified in :mod:`cycnn.ops.reference`; the arithmetic is in the
kernels (``cuda/*.cu``, overview in ``cuda/README.md``). Everything is queued on the
compute stream of the device, nothing waits for it.

Labels and row numbers are not read back to be checked, which would wait for the GPU:
a label out of range makes the loss NaN, a row number out of range a row of NaN (in
:func:`gather_labels` the label -1).
"""

from __future__ import annotations

from functools import lru_cache

from .. import shapes
from ..devices import device as as_device
from ..errors import ShapeError
from ..gpu.launch import Kernel
from ..precision import get_precision
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from .cuda_activation import (  # noqa: F401
    gelu_backward,
    gelu_forward,
    hardtanh_backward,
    hardtanh_forward,
    leaky_relu_backward,
    leaky_relu_forward,
    silu_backward,
    silu_forward,
    softmax_backward,
    softmax_forward,
    tanh_backward,
    tanh_forward,
)
from .cuda_augment import (  # noqa: F401
    augment_images,
    augment_key,
    samples_of_step,
)
from .cuda_batch_norm import (  # noqa: F401
    batch_norm2d_backward,
    batch_norm2d_forward,
    batch_norm2d_inference,
)
from .cuda_blocks import (  # noqa: F401
    add_relu,
    concat_backward,
    concat_forward,
    zero_pad2d_backward,
    zero_pad2d_forward,
)
from .cuda_common import (
    _BLOCK,
    _FLOAT32,
    _INT32,
    _INT32_MAX,
    _MAX_GRID,
    _UINT8,
    _WIDE,
    _get,
    _images,
    _int32,
    _map,
    _map_backward,
    _of_rows,
    _strided,
    _vectors,
)
from .cuda_dropout import dropout_backward, dropout_forward  # noqa: F401
from .cuda_layer_norm import (  # noqa: F401
    layer_norm_backward,
    layer_norm_forward,
)
from .cuda_loss import (  # noqa: F401
    bce_with_logits_backward,
    bce_with_logits_forward,
    mse_loss_backward,
    mse_loss_forward,
    smooth_l1_loss_backward,
    smooth_l1_loss_forward,
    weighted_cross_entropy_backward,
    weighted_cross_entropy_forward,
    weighted_nll_loss_backward,
    weighted_nll_loss_forward,
)
from .cuda_optim import (  # noqa: F401
    adagrad_step,
    adam_step,
    centered_rmsprop_step,
    clip_by_norm,
    damped_sgd_step,
    ema_step,
    square_sums,
    swap,
)
from .cuda_pooling import (  # noqa: F401
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool2d_backward,
    global_avgpool2d_forward,
)

_COLUMN_BYTES = 256 << 20  # a convolution unrolls as many images at once as fit
_PARTIAL = 8192  # numbers that one block sums

# elementwise

_fill_float32 = Kernel("elementwise", "fill_float32", "Pfq")
_fill_int32 = Kernel("elementwise", "fill_int32", "Piq")
_fill_uint8 = Kernel("elementwise", "fill_uint8", "Piq")
_copy = Kernel("elementwise", "copy", "PPq")
_add = Kernel("elementwise", "add", "PPPq")
_relu_forward = Kernel("elementwise", "relu_forward", "PPq")
_relu_backward = Kernel("elementwise", "relu_backward", "PPPq")
_sigmoid_forward = Kernel("elementwise", "sigmoid_forward", "PPq")
_sigmoid_backward = Kernel("elementwise", "sigmoid_backward", "PPPq")


def fill(x, value):
    n = x.size
    if not n:
        return
    if x.dtype == _FLOAT32:
        kernel, value = _fill_float32, float(value)
    else:
        kernel = _fill_int32 if x.dtype == _INT32 else _fill_uint8
        value = int(value)
    kernel(_get(x.device.index).compute, _strided(n), _BLOCK, x, value, n)


def copy(x, out):
    """out = x, by a kernel: sooner done than a copy to the host where it is small.

    Parameters
    ----------
    x, out : float32 Tensor
        Of one shape. ``out`` may lie in pinned memory of the host.
    """
    n = x.size
    if n:
        _copy(_get(x.device.index).compute, _vectors(n), _BLOCK, out, x, n)


def add(x, y, out):
    if not x.shape == y.shape == out.shape:
        shapes.check_same(x=x.shape, y=y.shape, out=out.shape)
    n = x.size
    if n:
        _add(_get(x.device.index).compute, _vectors(n), _BLOCK, out, x, y, n)


def relu_forward(x):
    return _map(_relu_forward, x)


def relu_backward(dy, y):
    return _map_backward(_relu_backward, dy, y)


def sigmoid_forward(x):
    return _map(_sigmoid_forward, x)


def sigmoid_backward(dy, y):
    return _map_backward(_sigmoid_backward, dy, y)


# matrix products

_GEMM_BLOCK = 256
_GEMM_STEP = 64  # splits of k are multiples of it
# bits of `flags`, as in gemm.cu
_ACCUMULATE, _BIAS_ON_ROWS, _A_TRANSPOSED, _B_TRANSPOSED = 1, 2, 4, 8

_gemm = {
    (precision, tile): Kernel(
        "gemm", f"gemm_{precision}_{tile}", "PPPPiiiiuiiqiiqiiqii"
    )
    for precision in ("fp32", "tf32", "bf16")
    for tile in (64, 128)
}
_gemm_finish = Kernel("gemm", "gemm_finish", "PPPiiiiiuiiqi")

_PLAIN = 1 << 30  # a segment that no row is longer than


def _segment_magic(length):
    """The factor that divides by ``length``; see Segment in gemm.cu."""
    return -(-(1 << (31 + (length - 1).bit_length())) // length)


class _Product:
    """The launches of C = A B + bias; gemm.cu explains how matrices lie.

    Parameters
    ----------
    precision : str
    sms : int
        Multiprocessors of the GPU.
    flags : int
    sizes : (m, n, k, batch)
    segment : int
        Columns of an image.
    of_a, of_b, of_c : (pitch, stack, batch stride), in elements
    """

    __slots__ = ("kernel", "grid", "numbers", "partial", "finish_grid", "finish")

    def __init__(self, precision, sms, flags, sizes, segment, of_a, of_b, of_c):
        m, n, k, batch = sizes
        tile = 128
        tiles = ceil_div(m, tile) * ceil_div(n, tile)
        if tiles * batch < sms or min(m, n) <= 64:
            tile = 64
            tiles = ceil_div(m, tile) * ceil_div(n, tile)
        splits = 1
        if 2 * tiles * batch <= sms:
            # fewer tiles than half of the SMs: aim at two blocks for each
            splits = max(1, min(2 * sms // (tiles * batch), k // _GEMM_STEP))
        k_a_split = max(ceil_div(k, splits * _GEMM_STEP), 1) * _GEMM_STEP
        splits = max(ceil_div(k, k_a_split), 1)
        self.kernel = _gemm[precision, tile]
        self.grid = tiles, batch, splits
        magic = _segment_magic(segment)
        self.partial = None
        if splits > 1:
            elements = batch * m * n
            self.partial = splits, elements
            self.finish_grid = ceil_div(elements, 32)
            self.finish = (batch, m, n, splits, segment, magic, *of_c, flags)
            of_c = n, segment, m * n
            flags &= _A_TRANSPOSED | _B_TRANSPOSED
        self.numbers = (
            m, n, k, segment, magic, *of_a, *of_b, *of_c, k_a_split, flags,
        )  # fmt: skip

    def run(self, gpu, c, a, b, bias=None):
        """Queue it. The arguments are the first elements of the matrices."""
        stream = gpu.compute
        if self.partial is None:
            self.kernel(stream, self.grid, _GEMM_BLOCK, c, a, b, bias, *self.numbers)
            return
        partial = empty_on_gpu(self.partial, _FLOAT32, c.device)
        self.kernel(stream, self.grid, _GEMM_BLOCK, partial, a, b, None, *self.numbers)
        _gemm_finish(stream, self.finish_grid, (32, 8), c, partial, bias, *self.finish)


# sums

_sum_rows = Kernel("reduce", "sum_rows", "PPiiii")
_sum_channels = Kernel("reduce", "sum_channels", "PPiiiii")


def _sum_over_rows(gpu, out, x, rows, columns, accumulate):
    """out (columns,) = or += the sum of x (rows, columns) over its rows."""
    blocks, lanes = ceil_div(columns, 32), (32, 8)
    rows_a_block = max(_PARTIAL // 32, ceil_div(rows, _MAX_GRID))
    parts = ceil_div(rows, rows_a_block)
    if parts > 1:
        partial = empty_on_gpu((parts, columns), _FLOAT32, x.device)
        _sum_rows(
            gpu.compute, (blocks, parts), lanes, partial, x, rows, columns,
            rows_a_block, 0,
        )  # fmt: skip
        x, rows = partial, parts
    _sum_rows(gpu.compute, blocks, lanes, out, x, rows, columns, rows, int(accumulate))


def _sum_over_pixels(gpu, out, dy, n, k, pixels, accumulate):
    """out (k,) = or += the sum of dy (n, k, pixels) over images and pixels."""
    images = max(1, _PARTIAL // pixels, ceil_div(n, _MAX_GRID))
    parts = ceil_div(n, images)
    if parts == 1:
        _sum_channels(
            gpu.compute, k, _BLOCK, out, dy, n, k, pixels, images, int(accumulate)
        )
        return
    partial = empty_on_gpu((parts, k), _FLOAT32, dy.device)
    _sum_channels(gpu.compute, (k, parts), _BLOCK, partial, dy, n, k, pixels, images, 0)
    _sum_over_rows(gpu, out, partial, parts, k, accumulate)


def _clear(dweight, dbias, dx, accumulate):
    """Gradients where there is nothing to sum."""
    if dx is not None:
        fill(dx, 0.0)
    if not accumulate:
        fill(dweight, 0.0)
        if dbias is not None:
            fill(dbias, 0.0)


def _parts(n, elements, most=_INT32_MAX):
    """The batch in parts whose elements the kernels can number.

    Parameters
    ----------
    n : int
        Samples.
    elements : int
        Of a sample, in the largest array.
    most : int
        Samples that a part may have.

    Returns
    -------
    list of (slice, int)
        Slice, or None for the whole batch, and number of samples.
    """
    if elements > _INT32_MAX:
        raise ShapeError(
            f"a sample of {elements} elements is too large: the GPU's kernels number "
            f"at most {_INT32_MAX}"
        )
    step = min(most, _INT32_MAX // max(elements, 1))
    if 0 < n <= step:
        return [(None, n)]
    return [(slice(i, min(i + step, n)), min(step, n - i)) for i in range(0, n, step)]


def _part(x, part):
    return x if part is None else x[part]


# linear


@lru_cache(256)
def _linear_forward_plan(x_shape, w_shape, bias_shape, precision, sms):
    """(shape of y, [(part, product)])"""
    n, outputs = y_shape = shapes.linear_output_shape(x_shape, w_shape, bias_shape)
    inputs = w_shape[1]
    of_inputs, of_outputs = (inputs, _PLAIN, 0), (outputs, _PLAIN, 0)
    steps = []
    for part, size in _parts(n, max(inputs, outputs)) if outputs else ():
        # y = x weight^T
        sizes = size, outputs, inputs, 1
        product = _Product(
            precision, sms, _B_TRANSPOSED, sizes, _PLAIN, of_inputs, of_inputs,
            of_outputs,
        )  # fmt: skip
        steps.append((part, product))
    return y_shape, steps


def linear_forward(x, weight, bias):
    device = x.device
    gpu = _get(device.index)
    y_shape, steps = _linear_forward_plan(
        x.shape,
        weight.shape,
        None if bias is None else bias.shape,
        get_precision(),
        gpu.sm_count,
    )
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    for part, product in steps:
        product.run(gpu, _part(y, part), _part(x, part), weight, bias)
    return y


@lru_cache(256)
def _linear_backward_plan(
    dy_shape, x_shape, w_shape, dw_shape, db_shape, accumulate, precision, sms
):
    """[(part, product for dweight, product for dx)]"""
    shapes.check_linear_backward(dy_shape, x_shape, w_shape, dw_shape, db_shape)
    outputs, inputs = w_shape
    of_inputs, of_outputs = (inputs, _PLAIN, 0), (outputs, _PLAIN, 0)
    steps = []
    parts = _parts(x_shape[0], max(inputs, outputs)) if inputs and outputs else ()
    for part, size in parts:
        # dweight = dy^T x
        flags = _A_TRANSPOSED | (_ACCUMULATE if accumulate or steps else 0)
        for_dweight = _Product(
            precision, sms, flags, (outputs, inputs, size, 1), _PLAIN, of_outputs,
            of_inputs, of_inputs,
        )  # fmt: skip
        # dx = dy weight
        for_dx = _Product(
            precision, sms, 0, (size, inputs, outputs, 1), _PLAIN, of_outputs,
            of_inputs, of_inputs,
        )  # fmt: skip
        steps.append((part, for_dweight, for_dx))
    return steps


def linear_backward(dy, x, weight, dweight, dbias, need_dx=True, accumulate=False):
    device = dy.device
    gpu = _get(device.index)
    steps = _linear_backward_plan(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        None if dbias is None else dbias.shape,
        accumulate,
        get_precision(),
        gpu.sm_count,
    )
    n, outputs = dy.shape
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not n or not outputs:
        _clear(dweight, dbias, dx, accumulate)
        return dx
    if dbias is not None:
        _sum_over_rows(gpu, dbias, dy, n, outputs, accumulate)
    for part, for_dweight, for_dx in steps:
        dy_part = _part(dy, part)
        for_dweight.run(gpu, dweight, dy_part, _part(x, part))
        if need_dx:
            for_dx.run(gpu, _part(dx, part), dy_part, weight)
    return dx


# convolution

_im2col = Kernel("conv", "im2col", "PPiiiiiiiiiiiiiiq")
_col2im = Kernel("conv", "col2im", "PPPiiiiiiiiiiiiiiq")


class _Unrolled:
    """How a convolution becomes products: its parts and where its matrices lie.

    A pointwise convolution (1 x 1, every pixel, no padding) is a product with x as it
    lies; for others x is unrolled, as many images at once as the workspace holds.

    Attributes
    ----------
    column_shape : tuple or None
        Of the workspace; None for a pointwise convolution.
    parts : list of (slice, int)
    """

    def __init__(self, x_shape, w_shape, y_shape, stride, padding, dilation, groups):
        n, c, h, w = x_shape
        _, k, p, q = y_shape
        r, s = w_shape[2:]
        self.pixels = pixels = p * q
        self.groups = groups
        self.group_k, self.group_rows = k // groups, c // groups * r * s
        rows = c * r * s
        largest = max(c * h * w, k * pixels)
        pointwise = r == s == 1 and stride == (1, 1) and padding == (0, 0)
        if pointwise or not c:
            self.column_shape = None
            self.parts = _parts(n, largest)
            pitch, stack = pixels, c * pixels
        else:
            most = max(1, _COLUMN_BYTES // (4 * rows * pixels))
            self.parts = _parts(n, max(largest, rows * pixels), most)
            # rows start at 16 bytes
            pitch = (max(size for _, size in self.parts) * pixels + 3) & ~3
            self.column_shape = rows, pitch
            stack = pixels
        self.numbers = (
            c, h, w, r, s, p, q, *stride, *padding, *dilation, pitch,
        )  # fmt: skip
        self.of_weight = self.group_rows, pixels, self.group_k * self.group_rows
        self.of_column = pitch, stack, self.group_rows * pitch
        self.of_y = pixels, k * pixels, self.group_k * pixels

    def unroll(self, images):
        """Grid and numbers of ``_im2col``, or None."""
        if self.column_shape is None:
            return None
        blocks = ceil_div(images * self.pixels, _BLOCK)
        return (blocks, min(self.numbers[0], _MAX_GRID)), (images, *self.numbers)

    def fold(self, images):
        """Grid and numbers of ``_col2im``, or None."""
        if self.column_shape is None:
            return None
        c, h, w = self.numbers[:3]
        return _images(images, c * h * w), (images, *self.numbers)


@lru_cache(256)
def _conv_forward_plan(
    x_shape, w_shape, bias_shape, stride, padding, dilation, groups, precision, sms
):
    """(shape of y, shape of the workspace, [(part, im2col, product)])"""
    y_shape = shapes.conv2d_output_shape(
        x_shape, w_shape, stride, padding, dilation, groups, bias_shape
    )
    if not y_shape[0] or not y_shape[1]:
        return y_shape, None, ()
    how = _Unrolled(x_shape, w_shape, y_shape, stride, padding, dilation, groups)
    steps = []
    for part, size in how.parts:
        # y[n] = weight column[n], a product for each group
        sizes = how.group_k, size * how.pixels, how.group_rows, groups
        product = _Product(
            precision, sms, _BIAS_ON_ROWS, sizes, how.pixels, how.of_weight,
            how.of_column, how.of_y,
        )  # fmt: skip
        steps.append((part, how.unroll(size), product))
    return y_shape, how.column_shape, steps


def conv2d_forward(
    x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    if _depthwise.is_depthwise(weight.shape, groups):
        return _depthwise.forward(x, weight, bias, stride, padding, dilation, groups)
    device = x.device
    gpu = _get(device.index)
    y_shape, column_shape, steps = _conv_forward_plan(
        x.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
        get_precision(),
        gpu.sm_count,
    )
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    if column_shape is not None:
        column = empty_on_gpu(column_shape, _FLOAT32, device)
    for part, unroll, product in steps:
        source = _part(x, part)
        if unroll is not None:
            grid, numbers = unroll
            _im2col(gpu.compute, grid, _BLOCK, column, source, *numbers)
            source = column
        product.run(gpu, _part(y, part), weight, source, bias)
    return y


@lru_cache(256)
def _conv_backward_plan(
    dy_shape,
    x_shape,
    w_shape,
    dw_shape,
    db_shape,
    stride,
    padding,
    dilation,
    groups,
    accumulate,
    precision,
    sms,
):
    """(shape of the workspace, [(part, im2col, for dweight, for dcolumn, col2im)])"""
    shapes.check_conv2d_backward(
        dy_shape,
        x_shape,
        w_shape,
        dw_shape,
        db_shape,
        stride,
        padding,
        dilation,
        groups,
    )
    if not dy_shape[0] or not dy_shape[1] or not x_shape[1]:
        return None, ()
    how = _Unrolled(x_shape, w_shape, dy_shape, stride, padding, dilation, groups)
    steps = []
    for part, size in how.parts:
        columns = size * how.pixels
        # dweight = sum over n of dy[n] column[n]^T
        flags = _B_TRANSPOSED | (_ACCUMULATE if accumulate or steps else 0)
        for_dweight = _Product(
            precision, sms, flags, (how.group_k, how.group_rows, columns, groups),
            how.pixels, how.of_y, how.of_column, how.of_weight,
        )  # fmt: skip
        # dcolumn[n] = weight^T dy[n]
        for_dcolumn = _Product(
            precision, sms, _A_TRANSPOSED,
            (how.group_rows, columns, how.group_k, groups), how.pixels, how.of_weight,
            how.of_y, how.of_column,
        )  # fmt: skip
        steps.append((part, how.unroll(size), for_dweight, for_dcolumn, how.fold(size)))
    return how.column_shape, steps


def conv2d_backward(
    dy,
    x,
    weight,
    dweight,
    dbias,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    need_dx=True,
    accumulate=False,
):
    if _depthwise.is_depthwise(weight.shape, groups):
        return _depthwise.backward(
            dy, x, weight, dweight, dbias, stride, padding, dilation, groups, need_dx,
            accumulate,
        )  # fmt: skip
    device = x.device
    gpu = _get(device.index)
    column_shape, steps = _conv_backward_plan(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        None if dbias is None else dbias.shape,
        stride,
        padding,
        dilation,
        groups,
        accumulate,
        get_precision(),
        gpu.sm_count,
    )
    n, k, p, q = dy.shape
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not n or not k:
        _clear(dweight, dbias, dx, accumulate)
        return dx
    if dbias is not None:
        _sum_over_pixels(gpu, dbias, dy, n, k, p * q, accumulate)
    if column_shape is not None:
        column = empty_on_gpu(column_shape, _FLOAT32, device)
    for part, unroll, for_dweight, for_dcolumn, fold in steps:
        dy_part, source = _part(dy, part), _part(x, part)
        if unroll is not None:
            grid, numbers = unroll
            _im2col(gpu.compute, grid, _BLOCK, column, source, *numbers)
            source = column
        for_dweight.run(gpu, dweight, dy_part, source)
        if not need_dx:
            continue
        dx_part = _part(dx, part)
        if fold is None:
            for_dcolumn.run(gpu, dx_part, weight, dy_part)
        else:
            # the column matrix has been used, its gradient takes its place
            for_dcolumn.run(gpu, column, weight, dy_part)
            grid, numbers = fold
            _col2im(gpu.compute, grid, _BLOCK, dx_part, column, None, *numbers)
    return dx


# pooling

_maxpool2d_forward = Kernel("maxpool", "maxpool2d_forward", "PPPiiiiiiiiiiii")
_maxpool2d_backward = Kernel("maxpool", "maxpool2d_backward", "PPPiiiiiiiiiiii")

_pool_shape = lru_cache(256)(shapes.pool2d_output_shape)
_check_pool = lru_cache(256)(shapes.check_maxpool2d_backward)


def maxpool2d_forward(
    x, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    x_shape = x.shape
    y_shape = _pool_shape(x_shape, kernel_size, stride, padding, ceil_mode)
    device = x.device
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    positions = empty_on_gpu(y_shape, _INT32, device)
    n, c, p, q = y_shape
    if n and c:
        _maxpool2d_forward(
            _get(device.index).compute, _images(n, c * p * q), _BLOCK, y, positions, x,
            n, c, x_shape[2], x_shape[3], p, q, *kernel_size, *stride, *padding[:2],
        )  # fmt: skip
    return y, positions


def maxpool2d_backward(
    dy, positions, x_shape, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    y_shape = dy.shape
    _check_pool(
        y_shape, positions.shape, x_shape, kernel_size, stride, padding, ceil_mode
    )
    _int32("positions", positions)
    device = dy.device
    dx = empty_on_gpu(x_shape, _FLOAT32, device)
    n, c, h, w = x_shape
    if n and c:
        _maxpool2d_backward(
            _get(device.index).compute, _images(n, c * h * w), _BLOCK, dx, dy,
            positions, n, c, h, w, y_shape[2], y_shape[3], *kernel_size, *stride,
            *padding[:2],
        )  # fmt: skip
    return dx


# softmax and losses

_log_softmax_forward = (
    Kernel("softmax", "log_softmax_forward_rows", "PPii"),
    Kernel("softmax", "log_softmax_forward_wide", "PPii"),
)
_log_softmax_backward = (
    Kernel("softmax", "log_softmax_backward_rows", "PPPii"),
    Kernel("softmax", "log_softmax_backward_wide", "PPPii"),
)
_nll_loss_forward = Kernel("softmax", "nll_loss_forward", "PPPii")
_nll_loss_backward = Kernel("softmax", "nll_loss_backward", "PPii")
_cross_entropy_backward = Kernel("softmax", "cross_entropy_backward", "PPPii")


def log_softmax_forward(x):
    n, f = shapes.check_scores("x", x.shape)
    device = x.device
    y = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        wide = f >= _WIDE
        _log_softmax_forward[wide](
            _get(device.index).compute, n if wide else _of_rows(n), _BLOCK, y, x, n, f
        )
    return y


def log_softmax_backward(dy, y):
    n, f = shapes.check_scores("y", y.shape)
    if dy.shape != y.shape:
        shapes.check_same(y=y.shape, dy=dy.shape)
    device = y.device
    dx = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        wide = f >= _WIDE
        _log_softmax_backward[wide](
            _get(device.index).compute, n if wide else _of_rows(n), _BLOCK, dx, dy, y,
            n, f,
        )  # fmt: skip
    return dx


def nll_loss_forward(log_probs, labels):
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    _int32("labels", labels)
    device = log_probs.device
    loss = empty_on_gpu((), _FLOAT32, device)
    _nll_loss_forward(
        _get(device.index).compute, 1, _BLOCK, loss, log_probs, labels, n, f
    )
    return loss


def nll_loss_backward(log_probs, labels):
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    _int32("labels", labels)
    device = log_probs.device
    dlog_probs = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        _nll_loss_backward(
            _get(device.index).compute, _of_rows(n), _BLOCK, dlog_probs, labels, n, f
        )  # fmt: skip
    return dlog_probs


def cross_entropy_forward(logits, labels):
    shapes.check_labels("logits", logits.shape, labels.shape)
    log_probs = log_softmax_forward(logits)
    return nll_loss_forward(log_probs, labels), log_probs


def cross_entropy_backward(log_probs, labels):
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    _int32("labels", labels)
    device = log_probs.device
    dlogits = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        _cross_entropy_backward(
            _get(device.index).compute, _of_rows(n), _BLOCK, dlogits, log_probs, labels,
            n, f,
        )  # fmt: skip
    return dlogits


_argmax = Kernel("data", "argmax", "PPii")
_tally = Kernel("data", "tally", "PPPPPiii")


def argmax(x):
    n, f = shapes.check_scores("x", x.shape)
    device = x.device
    out = empty_on_gpu((n,), _INT32, device)
    if n:
        _argmax(_get(device.index).compute, _of_rows(n), _BLOCK, out, x, n, f)
    return out


def _tally_arguments(losses, scores, labels, loss_sum, hits):
    n, f = shapes.check_tally(
        losses.shape, scores.shape, labels.shape, loss_sum.shape, hits.shape
    )
    _int32("labels", labels)
    _int32("hits", hits)
    return loss_sum, hits, losses, scores, labels, losses.size, n, f


def tally(losses, scores, labels, loss_sum, hits):
    arguments = _tally_arguments(losses, scores, labels, loss_sum, hits)
    _tally(
        _get(scores.device.index).compute,
        max(1, min(_of_rows(len(labels)), _MAX_GRID)),
        _BLOCK,
        *arguments,
    )


# optimizer steps

_rmsprop_step = Kernel("optim", "rmsprop_step", "PPPPPffffq")
_sgd_step = Kernel("optim", "sgd_step", "PPPPffiq")


def _check_step(param, grad, momentum_buffer, lr, momentum, square_avg=None):
    if momentum and momentum_buffer is None:
        raise ValueError(
            f"momentum is {momentum} and needs a momentum_buffer, got None"
        )
    shapes.check_scalar("lr", lr.shape)
    given = {"grad": grad, "square_avg": square_avg, "momentum_buffer": momentum_buffer}
    shape = param.shape
    for name, slab in given.items():
        if slab is not None and slab.shape != shape:
            shapes.check_same(param=shape, **{name: slab.shape})


def rmsprop_step(
    param, grad, square_avg, momentum_buffer, lr, alpha, eps, weight_decay, momentum
):
    _check_step(param, grad, momentum_buffer, lr, momentum, square_avg)
    n = param.size
    if n:
        _rmsprop_step(
            _get(param.device.index).compute, _strided(n), _BLOCK, param, grad,
            square_avg, momentum_buffer if momentum else None, lr, alpha, eps,
            weight_decay, momentum, n,
        )  # fmt: skip


def sgd_step(param, grad, momentum_buffer, lr, momentum, weight_decay, nesterov):
    _check_step(param, grad, momentum_buffer, lr, momentum)
    n = param.size
    if n:
        _sgd_step(
            _get(param.device.index).compute, _strided(n), _BLOCK, param, grad,
            momentum_buffer if momentum else None, lr, momentum, weight_decay,
            int(nesterov), n,
        )  # fmt: skip


# data

_permutation = Kernel("data", "permutation", "PiQui")
_gather_uint8 = Kernel("data", "gather_images_uint8", "PPPiiiff")
_gather_float32 = Kernel("data", "gather_images_float32", "PPPiiiff")
_gather_labels = Kernel("data", "gather_labels", "PPPii")


def permutation(count, seed, epoch, device):
    count = shapes.check_count(count)
    device = as_device(device)
    order = empty_on_gpu((count,), _INT32, device)
    if count:
        half_bits = max(1, ceil_div((count - 1).bit_length(), 2))
        _permutation(
            _get(device.index).compute, _strided(count), _BLOCK, order, count,
            int(seed) & (2**64 - 1), int(epoch) & (2**32 - 1), half_bits,
        )  # fmt: skip
    return order


def gather_images(images, index, scale, shift):
    shape = shapes.gather_output_shape(images.shape, index.shape)
    _int32("index", index)
    device = images.device
    out = empty_on_gpu(shape, _FLOAT32, device)
    size = out.size
    if size:
        n = shape[0]
        elements = size // n
        kernel = _gather_uint8 if images.dtype == _UINT8 else _gather_float32
        kernel(
            _get(device.index).compute, _images(n, elements), _BLOCK, out, images,
            index, n, elements, images.shape[0], scale, shift,
        )  # fmt: skip
    return out


def gather_labels(labels, index):
    shape = shapes.gather_output_shape(labels.shape, index.shape)
    _int32("labels", labels)
    _int32("index", index)
    device = labels.device
    out = empty_on_gpu(shape, _INT32, device)
    n = shape[0]
    if n:
        _gather_labels(
            _get(device.index).compute, _strided(n), _BLOCK, out, labels, index, n,
            labels.shape[0],
        )  # fmt: skip
    return out


_end_step = Kernel("data", "end_step", "PPPPPiiiPPPPPPPiiiii")
_END_STEP = 1024  # threads
_NO_TALLY = (None,) * 5 + (0,) * 3
_TALLY_OF_A_BLOCK = 1 << 16  # scores that a single block looks through in no time


def begin_step(feed):
    _lay_out(feed, _NO_TALLY, rate_of=0)


def end_step(losses, scores, labels, loss_sum, hits, feed):
    if scores is None:
        add(loss_sum, losses, loss_sum)
        _lay_out(feed, _NO_TALLY, rate_of=-1)
        return
    given = losses, scores, labels, loss_sum, hits
    if scores.size > _TALLY_OF_A_BLOCK:
        tally(*given)
        _lay_out(feed, _NO_TALLY, rate_of=-1)
    else:
        _lay_out(feed, _tally_arguments(*given), rate_of=-1, dependent=True)


def _lay_out(feed, tally_arguments, rate_of, dependent=False):
    for name in ("order", "position", "classes", "index", "labels"):
        _int32(name, getattr(feed, name))
    _end_step(
        _get(feed.order.device.index).compute, 1, _END_STEP, *tally_arguments,
        *feed, feed.index.size, feed.order.size,
        0 if feed.rates is None else feed.rates.shape[0], rate_of,
        1 if feed.lr is None else feed.lr.size, dependent=dependent,
    )  # fmt: skip


# operations of other modules, which take their helpers from this one

from . import cuda_depthwise as _depthwise
from .cuda_conv_transpose import (  # noqa: F401
    conv_transpose2d_backward,
    conv_transpose2d_forward,
)
