import pytest

from cycnn import shapes
from cycnn.errors import ShapeError


@pytest.mark.parametrize("a, b, expected", [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_ceil_div(a, b, expected):
    assert shapes.ceil_div(a, b) == expected


@pytest.mark.parametrize("value", [(3, 4), [3, 4]])
def test_pair_of_two(value):
    assert shapes.pair(value, "stride") == (3, 4)


def test_pair_of_an_integer():
    assert shapes.pair(3, "stride") == (3, 3)


@pytest.mark.parametrize("value", [2.5, (1, 2, 3), (1,), "ab", None, (1.0, 2)])
def test_pair_names_what_it_refuses(value):
    with pytest.raises(ShapeError, match="stride is "):
        shapes.pair(value, "stride")


@pytest.mark.parametrize(
    "x, w, stride, padding, dilation, groups, expected",
    [
        ((128, 1, 28, 28), (32, 1, 5, 5), (1, 1), (0, 0), (1, 1), 1, (128, 32, 24, 24)),
        ((2, 4, 7, 9), (6, 2, 3, 3), (2, 3), (1, 0), (1, 1), 2, (2, 6, 4, 3)),
        ((0, 3, 8, 8), (5, 3, 2, 2), (3, 3), (0, 0), (1, 1), 1, (0, 5, 3, 3)),
        ((1, 1, 9, 9), (1, 1, 3, 3), (1, 1), (0, 0), (4, 3), 1, (1, 1, 1, 3)),
        ((1, 1, 1, 1), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_conv2d_output_shape(x, w, stride, padding, dilation, groups, expected):
    assert (
        shapes.conv2d_output_shape(x, w, stride, padding, dilation, groups) == expected
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x_shape": (2, 4, 7)},
            r"x has shape \(2, 4, 7\): expected 4 axes \(N, C, H, W",
        ),
        ({"w_shape": (6, 2, 3)}, "weight has shape"),
        ({"x_shape": (2, 6, 7, 7)}, "x has 6 channels .* expects 4"),
        ({"groups": 1}, "x has 4 channels .* groups=1 expects 2"),
        ({"groups": 3}, "groups is 3: it must divide the 4 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"stride": (0, 1)}, r"stride is \(0, 1\): expected 1 or more"),
        ({"padding": (0, -1)}, r"padding is \(0, -1\): expected 0 or more"),
        ({"dilation": (1, 0)}, "dilation is"),
        ({"dilation": (4, 1)}, "does not fit into an image of .7, 7."),
        ({"w_shape": (6, 2, 9, 3)}, "does not fit"),
        ({"w_shape": (6, 2, 0, 3)}, "the shape of weight"),
        ({"bias_shape": (5,)}, r"bias has shape \(5,\): expected \(6,\)"),
    ],
)
def test_conv2d_refuses(change, message):
    arguments = {"x_shape": (2, 4, 7, 7), "w_shape": (6, 2, 3, 3), "groups": 2}
    shapes.conv2d_output_shape(**arguments)
    with pytest.raises(ShapeError, match=message):
        shapes.conv2d_output_shape(**{**arguments, **change})


@pytest.mark.parametrize(
    "x, kernel, stride, padding, expected",
    [
        ((128, 32, 24, 24), (2, 2), (2, 2), (0, 0), (128, 32, 12, 12)),
        ((1, 1, 5, 7), (2, 3), (3, 4), (1, 1), (1, 1, 2, 2)),
        ((0, 1, 2, 2), (2, 2), (2, 2), (0, 0), (0, 1, 1, 1)),
        ((1, 1, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
        ((1, 1, 5, 7), (2, 3), (3, 4), (0, 1, 1, 0), (1, 1, 2, 2)),
        ((1, 1, 1, 8), (3, 3), (1, 2), (2, 0, 2, 0), (1, 1, 3, 3)),
    ],
)
def test_pool2d_output_shape(x, kernel, stride, padding, expected):
    assert shapes.pool2d_output_shape(x, kernel, stride, padding) == expected


@pytest.mark.parametrize(
    "size, window, step, before, after, expected",
    [
        (6, 3, 2, 0, 0, 3),
        (7, 3, 2, 0, 0, 3),
        (3, 4, 4, 0, 0, 1),  # no window fits, one reaches over the end
        (3, 9, 2, 0, 0, -2),
        (5, 1, 3, 0, 0, 2),  # a third would begin at 6
        (4, 2, 2, 1, 1, 3),
        (3, 2, 2, 1, 1, 2),  # a third would begin in the padding
        (5, 3, 2, 0, 1, 3),
    ],
)
def test_pooled_size_rounded_up(size, window, step, before, after, expected):
    assert shapes.pooled_size(size, window, step, before, after, True) == expected


@pytest.mark.parametrize(
    "x, kernel, stride, padding, message",
    [
        ((1, 1, 8, 8), (2, 2), (2, 2), (2, 0), "more than half of"),
        ((1, 1, 8, 8), (2, 2), (2, 2), (0, 0, 1, 2), "must be less than kernel_size"),
        ((1, 1, 8, 8), (2, 2), (2, 2), (-1, 0, 1, 1), "padding is"),
        ((1, 1, 2, 8), (2**30, 2), (1, 2), (2**29, 0), "too large: rows and columns"),
        ((1, 1, 8, 8), (9, 2), (2, 2), (0, 0), "does not fit into an image"),
        ((1, 1, 0, 8), (2, 2), (2, 2), (1, 1), "does not fit into an image"),
        ((1, 1, 8, 8), (2, 2), (0, 2), (0, 0), "stride"),
        ((1, 8, 8), (2, 2), (2, 2), (0, 0), "expected 4 axes"),
        ((1, 1, 65536, 65536), (2, 2), (2, 2), (0, 0), "int32"),
    ],
)
def test_pool2d_refuses(x, kernel, stride, padding, message):
    with pytest.raises(ShapeError, match=message):
        shapes.pool2d_output_shape(x, kernel, stride, padding)


def test_linear_output_shape():
    assert shapes.linear_output_shape((0, 5), (3, 5), (3,)) == (0, 3)


@pytest.mark.parametrize(
    "x, w, bias, message",
    [
        ((2, 5), (3, 4), None, r"x has 5 features .* expects 4"),
        ((2, 5, 1), (3, 5), None, r"expected 2 axes \(N, I\)"),
        ((2, 5), (3, 5), (2,), "bias has shape"),
        ((2, 0), (3, 0), None, "the shape of weight"),
    ],
)
def test_linear_refuses(x, w, bias, message):
    with pytest.raises(ShapeError, match=message):
        shapes.linear_output_shape(x, w, bias)


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: shapes.check_same(x=(2,), y=(3,)), r"y has .* the shape of x"),
        (lambda: shapes.check_scalar("lr", (1,)), r"lr has shape \(1,\)"),
        (lambda: shapes.check_scores("x", (2, 0)), "1 feature or more"),
        (lambda: shapes.check_labels("x", (2, 3), (3,)), r"labels have shape \(3,\)"),
        (lambda: shapes.check_count(-1), "count is -1"),
        (lambda: shapes.check_count(2**31), "count is 2147483648"),
        (lambda: shapes.check_count(1.5), "count is 1.5: expected an integer"),
        (lambda: shapes.gather_output_shape((), (2,)), "single number"),
        (lambda: shapes.gather_output_shape((2, 3), (2, 1)), "index has shape"),
        (
            lambda: shapes.check_linear_backward((2, 4), (2, 5), (3, 5), (3, 5), None),
            r"dy has shape \(2, 4\): expected \(2, 3\)",
        ),
        (
            lambda: shapes.check_linear_backward((2, 3), (2, 5), (3, 5), (5, 3), None),
            "dweight has shape",
        ),
        (
            lambda: shapes.check_linear_backward((2, 3), (2, 5), (3, 5), (3, 5), (5,)),
            "dbias has shape",
        ),
    ],
)
def test_checks_name_what_is_wrong(check, message):
    with pytest.raises(ShapeError, match=message):
        check()


def test_check_same_leaves_none_out():
    shapes.check_same(x=(2,), y=None, z=(2,))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_what_a_kernel_could_not_count_is_refused(name):
    given = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), name: (2**31, 1)}
    with pytest.raises(ShapeError, match=f"{name} is .*: expected 2147483647 or less"):
        shapes.conv2d_output_shape((1, 1, 8, 8), (1, 1, 1, 1), **given)
