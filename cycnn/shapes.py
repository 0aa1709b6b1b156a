"""Shape rules of the operations.

Every operation asks here whether its arguments fit, so that the CPU and the GPU refuse
the same input with the same words. Only tuples come in: nothing here looks at numbers
or at memory.

Axis letters, everywhere in cycnn: N batch, C input channels, H W input height and
width, K output channels, R S filter height and width, P Q output height and width,
I O inputs and outputs of a linear layer, F features (classes).
"""

from __future__ import annotations

import math
import operator

from .errors import ShapeError

_INT32_MAX = 2**31 - 1


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for integers and ``b > 0``."""
    return -(-a // b)


def pair(value, name: str) -> tuple:
    """``value`` as (height, width): an integer stands for both.

    Raises
    ------
    ShapeError
        If it is neither an integer nor two of them.
    """
    try:
        if hasattr(value, "__len__"):
            high, wide = value
        else:
            high = wide = value
        return operator.index(high), operator.index(wide)
    except (TypeError, ValueError):
        raise ShapeError(
            f"{name} is {value!r}: expected an integer, or two of them "
            f"(height, width)"
        ) from None


def _axes(name: str, shape: tuple, letters: str) -> tuple:
    if len(shape) != len(letters):
        raise ShapeError(
            f"{name} has shape {tuple(shape)}: expected {len(letters)} axes "
            f"({', '.join(letters)})"
        )
    return shape


def _equal(name: str, shape: tuple, expected: tuple, why: str) -> None:
    if tuple(shape) != tuple(expected):
        raise ShapeError(
            f"{name} has shape {tuple(shape)}: expected {tuple(expected)}, {why}"
        )


def _at_least(name: str, values: tuple, least: int) -> None:
    if min(values) < least:
        raise ShapeError(f"{name} is {tuple(values)}: expected {least} or more")
    if max(values) > _INT32_MAX:
        raise ShapeError(f"{name} is {tuple(values)}: expected {_INT32_MAX} or less")


def check_same(**named) -> None:
    """All shapes are equal; an argument that is None is left out."""
    given = [(name, shape) for name, shape in named.items() if shape is not None]
    first, expected = given[0]
    for name, shape in given[1:]:
        _equal(name, shape, expected, f"the shape of {first}")


def check_scalar(name: str, shape: tuple) -> None:
    """The shape is ()."""
    _equal(name, shape, (), "a single number")


def check_period(name: str, shape: tuple, x_shape: tuple) -> None:
    """The shape is (period,), and x has a whole number of periods of elements."""
    size = math.prod(x_shape)
    if len(shape) != 1 or not shape[0] or size % shape[0]:
        raise ShapeError(
            f"{name} has shape {tuple(shape)}: expected one number, or some that "
            f"repeat a whole number of times over the {size} elements of {x_shape}"
        )


def check_count(count: int) -> int:
    """A number of elements that int32 can index, as an int."""
    try:
        count = operator.index(count)
    except TypeError:
        raise ShapeError(f"count is {count!r}: expected an integer") from None
    if not 0 <= count <= _INT32_MAX:
        raise ShapeError(
            f"count is {count}: expected 0 to {_INT32_MAX}, what int32 can number"
        )
    return count


# linear


def linear_output_shape(x_shape: tuple, w_shape: tuple, bias_shape=None) -> tuple:
    """(N, O) of x (N, I), weight (O, I) and bias (O,) or None.

    Raises
    ------
    ShapeError
        If they do not fit.
    """
    n, inputs = _axes("x", x_shape, "NI")
    outputs, expected = _axes("weight", w_shape, "OI")
    _at_least("the shape of weight", w_shape, 1)
    if inputs != expected:
        raise ShapeError(
            f"x has {inputs} features (shape {tuple(x_shape)}), the weight of shape "
            f"{tuple(w_shape)} expects {expected}"
        )
    if bias_shape is not None:
        _equal("bias", bias_shape, (outputs,), "one for each row of weight")
    return n, outputs


def check_linear_backward(dy_shape, x_shape, w_shape, dw_shape, db_shape) -> None:
    """The shapes of ``linear_backward`` fit; ``db_shape`` may be None."""
    y_shape = linear_output_shape(x_shape, w_shape)
    _equal("dy", dy_shape, y_shape, "the shape of y")
    _check_gradients(dw_shape, w_shape, db_shape)


def _check_gradients(dw_shape, w_shape, db_shape) -> None:
    _equal("dweight", dw_shape, w_shape, "the shape of weight")
    if db_shape is not None:
        _equal("dbias", db_shape, w_shape[:1], "one for each output of weight")


# convolution and pooling


def conv2d_output_shape(
    x_shape: tuple,
    w_shape: tuple,
    stride: tuple = (1, 1),
    padding: tuple = (0, 0),
    dilation: tuple = (1, 1),
    groups: int = 1,
    bias_shape=None,
) -> tuple:
    """(N, K, P, Q) of x (N, C, H, W) and weight (K, C / groups, R, S).

    P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, and Q likewise.

    Raises
    ------
    ShapeError
        If they do not fit, or no output position exists.
    """
    n, c, h, w = _axes("x", x_shape, "NCHW")
    k, c_group, r, s = _axes("weight", w_shape, "KCRS")
    _at_least("stride", stride, 1)
    _at_least("padding", padding, 0)
    _at_least("dilation", dilation, 1)
    _at_least("the shape of weight", w_shape, 1)
    if groups < 1 or c % groups or k % groups:
        raise ShapeError(
            f"groups is {groups}: it must divide the {c} channels of x and the {k} "
            f"of weight"
        )
    if c_group * groups != c:
        raise ShapeError(
            f"x has {c} channels (shape {tuple(x_shape)}), the weight of shape "
            f"{tuple(w_shape)} with groups={groups} expects {c_group * groups}"
        )
    if bias_shape is not None:
        _equal("bias", bias_shape, (k,), "one for each output channel of weight")
    sizes = []
    for size, filter_, step, pad, spread in zip(
        (h, w), (r, s), stride, padding, dilation
    ):
        reach = spread * (filter_ - 1) + 1
        if size + 2 * pad < reach:
            raise ShapeError(
                f"a filter of {(r, s)} with dilation {tuple(dilation)} does not fit "
                f"into an image of {(h, w)} with padding {tuple(padding)}: make the "
                f"image or the padding larger, or the filter smaller"
            )
        sizes.append((size + 2 * pad - reach) // step + 1)
    return n, k, *sizes


def check_conv2d_backward(
    dy_shape, x_shape, w_shape, dw_shape, db_shape, stride, padding, dilation, groups
) -> None:
    """The shapes of ``conv2d_backward`` fit; ``db_shape`` may be None."""
    y_shape = conv2d_output_shape(x_shape, w_shape, stride, padding, dilation, groups)
    _equal("dy", dy_shape, y_shape, "the shape of y")
    _check_gradients(dw_shape, w_shape, db_shape)


def conv_transpose2d_output_shape(
    x_shape: tuple,
    w_shape: tuple,
    stride: tuple = (1, 1),
    padding: tuple = (0, 0),
    output_padding: tuple = (0, 0),
    dilation: tuple = (1, 1),
    groups: int = 1,
    bias_shape=None,
) -> tuple:
    """(N, K, H, W) of x (N, C, P, Q) and weight (C, K / groups, R, S).

    H = (P - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1, W likewise:
    of the sizes that a convolution takes to P, the smallest and output_padding more.

    Raises
    ------
    ShapeError
        If they do not fit, or no output position exists.
    """
    n, c, p, q = _axes("x", x_shape, "NCPQ")
    c_weight, k_group, r, s = _axes("weight", w_shape, "CKRS")
    _at_least("stride", stride, 1)
    _at_least("padding", padding, 0)
    _at_least("output_padding", output_padding, 0)
    _at_least("dilation", dilation, 1)
    _at_least("the shape of weight", w_shape, 1)
    if c != c_weight:
        raise ShapeError(
            f"x has {c} channels (shape {tuple(x_shape)}), the weight of shape "
            f"{tuple(w_shape)} expects {c_weight}"
        )
    if groups < 1 or c % groups:
        raise ShapeError(f"groups is {groups}: it must divide the {c} channels of x")
    if any(extra >= step for extra, step in zip(output_padding, stride)):
        raise ShapeError(
            f"output_padding is {tuple(output_padding)}: expected less than the stride, "
            f"{tuple(stride)}; it chooses among the sizes that the stride rounds to one"
        )
    if bias_shape is not None:
        _equal("bias", bias_shape, (k_group * groups,), "one for each output channel")
    if p < 1 or q < 1:
        raise ShapeError(f"x has shape {tuple(x_shape)}: an image without pixels")
    sizes = []
    for size, filter_, step, pad, more, spread in zip(
        (p, q), (r, s), stride, padding, output_padding, dilation
    ):
        sizes.append((size - 1) * step - 2 * pad + spread * (filter_ - 1) + more + 1)
    if min(sizes) < 1:
        raise ShapeError(
            f"the output of an image of {(p, q)} would be {tuple(sizes)}: make the "
            f"padding, {tuple(padding)}, smaller"
        )
    return n, k_group * groups, *sizes


def check_conv_transpose2d_backward(
    dy_shape, x_shape, w_shape, dw_shape, db_shape, *settings
) -> None:
    """The shapes of ``conv_transpose2d_backward`` fit; ``db_shape`` may be None.

    ``settings``: stride, padding, output_padding, dilation, groups.
    """
    y_shape = conv_transpose2d_output_shape(x_shape, w_shape, *settings, db_shape)
    _equal("dy", dy_shape, y_shape, "the shape of y")
    _equal("dweight", dw_shape, w_shape, "the shape of weight")


def pooled_size(
    size: int, window: int, step: int, before: int, after: int, ceil_mode: bool
) -> int:
    """How many windows there are along an axis; less than 1 where none fits.

    With ``ceil_mode`` the last one may reach over the end of the padding. But none
    begins behind the elements: it would hold padding alone.
    """
    room = size + before + after - window
    if not ceil_mode:
        return room // step + 1
    count = ceil_div(room, step) + 1
    return count - ((count - 1) * step >= size + before)


def check_pool_padding(kernel_size: tuple, padding: tuple) -> None:
    """No window holds nothing but padding.

    Raises
    ------
    ShapeError
        If a padding (height, width) is more than half the window, or one (top, left,
        bottom, right) not less than the window.
    """
    if len(padding) == 4:
        if any(pad >= k for pad, k in zip(padding, (*kernel_size, *kernel_size))):
            raise ShapeError(
                f"padding={tuple(padding)} (top, left, bottom, right) must be less "
                f"than kernel_size={tuple(kernel_size)}: some windows would see no "
                f"number"
            )
    elif any(2 * pad > k for pad, k in zip(padding, kernel_size)):
        raise ShapeError(
            f"padding={tuple(padding)} is more than half of "
            f"kernel_size={tuple(kernel_size)}: make it at most "
            f"{tuple(k // 2 for k in kernel_size)}"
        )


def pool2d_output_shape(
    x_shape: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple = (0, 0),
    ceil_mode: bool = False,
) -> tuple:
    """(N, C, P, Q) of x (N, C, H, W): P = (H + 2 padding - kernel) // stride + 1.

    Padding is (height, width), or (top, left, bottom, right): so padding[:2] is that
    in front, and padding[-2:] that behind. With ceil_mode the division is rounded up,
    but no window begins behind the last element.

    Raises
    ------
    ShapeError
        If a window does not fit, if one could hold nothing but padding, or if a plane
        has more elements than the int32 positions of its maxima can number.
    """
    n, c, h, w = _axes("x", x_shape, "NCHW")
    _at_least("kernel_size", kernel_size, 1)
    _at_least("stride", stride, 1)
    _at_least("padding", padding, 0)
    if h * w > _INT32_MAX:
        raise ShapeError(
            f"a plane of {h} x {w} is too large: positions are int32, at most "
            f"{_INT32_MAX} elements"
        )
    sizes = []
    check_pool_padding(kernel_size, padding)
    ends = zip(padding[:2], padding[-2:])
    for size, window, step, pads in zip((h, w), kernel_size, stride, ends):
        count = pooled_size(size, window, step, *pads, ceil_mode)
        if size < 1 or count < 1:
            raise ShapeError(
                f"a window of {tuple(kernel_size)} does not fit into an image of "
                f"{(h, w)} with padding {tuple(padding)}"
            )
        if size + sum(pads) + window > _INT32_MAX:
            raise ShapeError(
                f"a window of {tuple(kernel_size)} in an image of {(h, w)} with "
                f"padding {tuple(padding)} is too large: rows and columns are int32"
            )
        sizes.append(count)
    return n, c, *sizes


def check_avgpool2d_backward(
    dy_shape, x_shape, kernel_size, stride, padding, ceil_mode
) -> None:
    """The shapes of ``avgpool2d_backward`` fit."""
    y_shape = pool2d_output_shape(x_shape, kernel_size, stride, padding, ceil_mode)
    _equal("dy", dy_shape, y_shape, "the shape of y")


def global_pool2d_output_shape(x_shape: tuple) -> tuple:
    """(N, C, 1, 1) of x (N, C, H, W).

    Raises
    ------
    ShapeError
        If x has other axes, or its planes have no element, or more than int32 numbers.
    """
    n, c, h, w = _axes("x", x_shape, "NCHW")
    if not 1 <= h * w <= _INT32_MAX:
        raise ShapeError(
            f"x has planes of {h} x {w}: expected 1 to {_INT32_MAX} elements"
        )
    return n, c, 1, 1


def check_global_pool2d_backward(dy_shape, x_shape) -> None:
    """The shapes of ``global_avgpool2d_backward`` fit."""
    y_shape = global_pool2d_output_shape(x_shape)
    _equal("dy", dy_shape, y_shape, "the shape of y")


def check_maxpool2d_backward(
    dy_shape, positions_shape, x_shape, kernel_size, stride, padding, ceil_mode
) -> None:
    """The shapes of ``maxpool2d_backward`` fit."""
    y_shape = pool2d_output_shape(x_shape, kernel_size, stride, padding, ceil_mode)
    _equal("dy", dy_shape, y_shape, "the shape of y")
    _equal("positions", positions_shape, y_shape, "the shape of y")


# layers side by side, padding


def concat_output_shape(*part_shapes: tuple) -> tuple:
    """(N, sum of C, ...) of parts (N, C, ...) that differ in C only.

    Raises
    ------
    ShapeError
        If they do not fit; both shapes are named.
    """
    first = part_shapes[0]
    for i, shape in enumerate(part_shapes):
        if len(shape) < 2:
            raise ShapeError(
                f"part {i} has shape {tuple(shape)}: expected (N, C) or more axes"
            )
        if (shape[0], *shape[2:]) != (first[0], *first[2:]):
            raise ShapeError(
                f"part 0 has shape {tuple(first)} and part {i} {tuple(shape)}: only "
                f"their channels, axis 1, may differ"
            )
    return first[0], sum(shape[1] for shape in part_shapes), *first[2:]


def check_concat_backward(dy_shape: tuple, channels) -> None:
    """Parts of so many channels make up dy (N, C, ...)."""
    if len(dy_shape) < 2 or sum(channels) != dy_shape[1]:
        raise ShapeError(
            f"dy has shape {tuple(dy_shape)}: expected {sum(channels)} channels, those "
            f"of parts with {', '.join(map(str, channels))}"
        )


def zero_pad2d_output_shape(x_shape: tuple, padding: tuple) -> tuple:
    """(N, C, top + H + bottom, left + W + right); padding: left, right, top, bottom.

    Raises
    ------
    ShapeError
        If a padding is negative.
    """
    n, c, h, w = _axes("x", x_shape, "NCHW")
    _at_least("padding", padding, 0)
    left, right, top, bottom = padding
    return n, c, top + h + bottom, left + w + right


def zero_pad2d_input_shape(y_shape: tuple, padding: tuple) -> tuple:
    """(N, C, H, W) of what was padded to ``y_shape``."""
    n, c, h, w = _axes("dy", y_shape, "NCHW")
    _at_least("padding", padding, 0)
    left, right, top, bottom = padding
    h, w = h - top - bottom, w - left - right
    if h < 0 or w < 0:
        raise ShapeError(
            f"dy has shape {tuple(y_shape)}: too small for a padding of "
            f"{tuple(padding)} (left, right, top, bottom)"
        )
    return n, c, h, w


# scores, labels, gathering


def check_scores(name: str, shape: tuple) -> tuple:
    """(N, F) with at least one feature; returned."""
    n, f = _axes(name, shape, "NF")
    if f < 1:
        raise ShapeError(f"{name} has shape {tuple(shape)}: expected 1 feature or more")
    return n, f


def check_labels(name: str, scores_shape: tuple, labels_shape: tuple) -> tuple:
    """Scores called ``name`` are (N, F) and labels are (N,); returns (N, F)."""
    n, f = check_scores(name, scores_shape)
    if tuple(labels_shape) != (n,):
        raise ShapeError(
            f"labels have shape {tuple(labels_shape)}: expected {(n,)}, one class "
            f"index for each row of {name}"
        )
    return n, f


def check_tally(losses_shape, scores_shape, labels_shape, *scalars) -> tuple:
    """Losses are () or (N,), scores (N, F), labels (N,), the rest (); returns (N, F)."""
    n, f = check_labels("scores", scores_shape, labels_shape)
    if tuple(losses_shape) not in ((), (n,)):
        raise ShapeError(
            f"losses have shape {tuple(losses_shape)}: expected () or {(n,)}, one for "
            f"each row of scores"
        )
    for name, shape in zip(("loss_sum", "hits"), scalars):
        check_scalar(name, shape)
    return n, f


def gather_output_shape(source_shape: tuple, index_shape: tuple) -> tuple:
    """(N, ...) of a source (M, ...) and an index (N,)."""
    if len(source_shape) < 1:
        raise ShapeError("cannot gather from a single number: expected shape (M, ...)")
    (n,) = _axes("index", index_shape, "N")
    return n, *source_shape[1:]


# normalisation and dropout


def check_batch_norm2d(x_shape: tuple, **of_channels) -> int:
    """x is (N, C, H, W) and the others (C,); returns N H W, the numbers of a channel.

    A shape that is None, or (), which is what NumPy says of None, is left out.
    """
    n, c, h, w = _axes("x", x_shape, "NCHW")
    for name, shape in of_channels.items():
        if shape:
            _equal(name, shape, (c,), "one for each channel of x")
    return n * h * w


def check_batch_statistics(x_shape: tuple) -> None:
    """A channel of x has numbers that vary: none, or more than one."""
    n, _, h, w = x_shape
    if n * h * w == 1:
        raise ShapeError(
            f"x has one value per channel (shape {tuple(x_shape)}), and a single "
            f"value has no variance: train with larger batches or images, or call "
            f"eval() to use the running statistics"
        )


def check_normalized_shape(x_shape: tuple, sizes: tuple) -> None:
    """x has at least one axis, and behind it axes of these sizes."""
    if len(x_shape) <= len(sizes) or x_shape[-len(sizes) :] != sizes:
        raise ShapeError(
            f"x has shape {x_shape}, expected (N, ..., {', '.join(map(str, sizes))})"
        )


def check_layer_norm(x_shape: tuple, **of_features) -> tuple:
    """x is (N, F), at least one feature, and the others (F,); returns (N, F).

    A shape that is None or () is left out.
    """
    n, f = check_scores("x", x_shape)
    for name, shape in of_features.items():
        if shape:
            _equal(name, shape, (f,), "one for each feature of x")
    return n, f


def check_dropout_state(shape: tuple) -> None:
    """The state of dropout's random numbers is (4,)."""
    _equal("state", shape, (4,), "seed (two halves), step, and 0")
