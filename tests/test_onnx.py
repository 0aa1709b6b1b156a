"""ONNX files, written and read, against onnxruntime."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cycnn
from cycnn import DataError, ShapeError, devices, nn

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

# of models that have a meaning but no implementation there, such as large windows
REFUSED = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_default", devices.CPU)
        yield


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(proto, x):
    """The output by onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it refuses is an exception as well
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (value,) = session.get_inputs()
    return session.run(None, {value.name: x})[0]


def value_info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(nodes, weights=(), shape=("N", 1, 6, 6), opset=17, **changes):
    """A model of nodes between x and y; ``weights`` are (name, array)."""
    flat = len(shape) == 2 or nodes[-1].op_type in ("Flatten", "Reshape")
    ends = {
        "inputs": [value_info("x", shape)],
        "outputs": [value_info("y", "NF" if flat else "NKPQ")],
        **changes,
    }
    arrays = {name: np.asarray(array) for name, array in dict(weights).items()}
    return helper.make_model(
        helper.make_graph(
            nodes,
            "made",
            **ends,
            initializer=[numpy_helper.from_array(a, n) for n, a in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("own", 1)],
        ir_version=10,
    )


def node(operator, inputs="x", outputs="y", **attributes):
    return helper.make_node(
        operator, inputs.split(), outputs.split(), name=f"the {operator}", **attributes
    )


def check(proto, x, layers=None):
    """The loaded network gives what onnxruntime does; returns it."""
    model = cycnn.onnx.load(proto)
    np.testing.assert_allclose(model(x).numpy(), run(proto, x), rtol=1e-4, atol=1e-5)
    if layers is not None:
        assert [type(layer).__name__ for layer in model] == layers.split()
    return model


def refuse(proto, *words):
    """The file is refused, with these words."""
    with pytest.raises(DataError) as caught:
        cycnn.onnx.load(proto)
    for word in words:
        assert word in str(caught.value)


# export


class Renamed(nn.Sequential):
    """A class of one's own that computes as its base does."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(36, 3))


MODELS = {
    "reference": (nn.reference_network, (None, 1, 28, 28)),
    "settings": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), (2, 1), groups=2),
            nn.Sigmoid(),
            nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
            nn.Conv2d(6, 6, 1, groups=6, bias=False),
            nn.Flatten(),
            nn.Linear(6 * 4 * 4, 5, bias=False),
            nn.LogSoftmax(),
        ),
        (2, 4, 9, 10),
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU())),
            nn.Sequential(nn.Flatten(), nn.Linear(32, 3)),
        ),
        ("N", 1, 6, 6),
    ),
    "derived": (Renamed, (None, 1, 6, 6)),
    "one layer": (lambda: nn.Conv2d(1, 2, 3), (None, 1, 6, 6)),
    "one activation": (lambda: nn.ReLU(), (None, 4)),
    "flat": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Flatten()), (None, 4)),
    "nothing": (lambda: nn.Sequential(), (None, 4)),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
@pytest.mark.parametrize("name", MODELS)
def test_export_and_load_again(tmp_path, name, opset):
    make, shape = MODELS[name]
    model, path = make(), tmp_path / "model.onnx"
    proto = cycnn.onnx.export(model, path, shape, opset=opset)
    assert proto.SerializeToString() == onnx.load(path).SerializeToString()
    again = cycnn.onnx.load(path)
    for batch in (1, 3):
        x = numbers(batch, *shape[1:])
        y = model(x).numpy()
        np.testing.assert_allclose(run(proto, x), y, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(again(x).numpy(), y)


def test_names_and_versions(tmp_path):
    model, shape = MODELS["nested"][0](), (None, 1, 6, 6)
    proto = cycnn.onnx.export(model, tmp_path / "model.onnx", shape)
    assert [w.name for w in proto.graph.initializer] == list(model.state_dict())
    assert [n.name for n in proto.graph.node] == ["0.0", "0.1.0", "1.0", "1.1"]
    assert proto.ir_version == 8 and proto.opset_import[0].version == 17
    assert (proto.producer_name, proto.producer_version) == ("cycnn", cycnn.__version__)
    assert str(tmp_path) not in str(proto)
    ends = [
        (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*proto.graph.input, *proto.graph.output)
    ]
    assert ends == [("input", ["N", 1, 6, 6]), ("output", ["N", 3])]
    newer = cycnn.onnx.export(model, tmp_path / "newer.onnx", shape, opset=22)
    assert newer.ir_version == 10


class Own(nn.Layer):
    def forward(self, x):
        return x


class OwnForward(nn.Sequential):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "model, shape, opset, error, words",
    [
        (nn.Sequential(nn.ReLU(), nn.Sequential(Own())), (None, 4), 17, TypeError,
         "layer 1.0 (Own) cannot be written"),
        (OwnForward(nn.ReLU()), (None, 4), 17, TypeError, "the model, OwnForward,"),
        (nn.fuse(nn.Sequential(nn.Linear(4, 2))), (None, 4), 17, TypeError, "Fused"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 6, 6), 17, ShapeError, "layer 0 (Conv"),
        (nn.Sequential(nn.LogSoftmax()), (1, 2, 6), 17, ShapeError, "LogSoftmax"),
        (nn.Linear(4, 2), (None, 5), 17, ShapeError, "5 features"),
        (nn.ReLU(), (None,), 17, ShapeError, "(None, 1, 28, 28)"),
        (nn.ReLU(), 4, 17, ShapeError, "(None, 1, 28, 28)"),
        (nn.ReLU(), (1, None), 17, ShapeError, "(None, 1, 28, 28)"),
        (nn.ReLU(), (1, 0), 17, ShapeError, "(None, 1, 28, 28)"),
        (nn.ReLU(), (1, 4), 10, ValueError, "11 to 22"),
        (nn.ReLU(), (1, 4), 23, ValueError, "11 to 22"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(tmp_path, model, shape, opset, error, words):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(error, match=re.escape(words)):
        cycnn.onnx.export(model, path, shape, opset=opset)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_without_the_package(run_python):
    code = """
import sys
sys.modules["onnx"] = None
import cycnn
for call in (lambda: cycnn.onnx.export(cycnn.nn.ReLU(), "x", (1, 2)),
             lambda: cycnn.onnx.load("x")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    assert run_python(code).count("pip install 'cycnn[onnx]'") == 2
    code = "import sys, cycnn; cycnn.onnx.load; print('onnx' in sys.modules)"
    assert run_python(code).strip() == "False"


# import: sources


def tiny():
    return graph([node("Relu")])


def test_every_kind_of_source(tmp_path):
    content = tiny().SerializeToString()
    path = tmp_path / "tiny.onnx"
    path.write_bytes(content)
    for source in (path, str(path), content, bytearray(content), tiny()):
        assert isinstance(cycnn.onnx.load(source)[0], nn.ReLU)
    with pytest.raises(FileNotFoundError):
        cycnn.onnx.load(tmp_path / "none")
    path.write_bytes(content[:-3])
    refuse(path, str(path))
    refuse(b"GIF89a", "the given bytes")
    refuse(b"", "ir_version")
    refuse(onnx.ModelProto(), "the given model")


# import: operators that have weights

W, B = numbers(2, 1, 3, 3, seed=1), numbers(2, seed=2)
IMAGE = numbers(3, 1, 6, 6)
V, C = numbers(36, 4, seed=3), numbers(4, seed=4)
ROWS = numbers(3, 36, seed=5)


def conv(weights=None, shape=("N", 1, 6, 6), inputs="x w", opset=17, **attributes):
    weights = {"w": W, "b": B} if weights is None else weights
    return graph([node("Conv", inputs, **attributes)], weights, shape, opset)


@pytest.mark.parametrize("opset", [9, 10, 11, 17, 22])
def test_conv(opset):
    check(conv(opset=opset), IMAGE, "Conv2d")
    model = check(
        conv(inputs="x w b", opset=opset, strides=[2, 1], pads=[1, 0, 1, 0]), IMAGE
    )
    assert model[0].stride == (2, 1) and model[0].padding == (1, 0)
    np.testing.assert_array_equal(model[0].weight.data.numpy(), W)
    grouped = {"w": numbers(4, 1, 2, 3)}
    proto = conv(
        grouped,
        (3, 2, 6, 6),
        group=2,
        dilations=[2, 1],
        kernel_shape=[2, 3],
        opset=opset,
    )
    assert check(proto, numbers(3, 2, 6, 6))[0].groups == 2


def test_conv_refused():
    refuse(conv({"w": W[..., 0]}), "node 'the Conv' (Conv)", "4 axes")
    refuse(conv(kernel_shape=[2, 2]), "kernel_shape")
    refuse(conv(group=2, weights={"w": W[:1]}), "Conv", "groups=2")
    refuse(conv(group=0), "out of range")
    refuse(conv(strides=[1]), "two dimensions")
    refuse(conv(strides=[0, 1]), "out of range")
    refuse(conv(pads=[-1, 0, 0, 0]), "out of range")
    refuse(conv(pads=[0, 0, 9, 0]), "too uneven, 0 and 9")
    refuse(conv(pads=[0, 0, 1, 0], dilations=[2, 1]), "too uneven")
    refuse(conv(auto_pad="SAME"), "auto_pad is 'SAME'")
    refuse(conv({"w": W, "b": B[:1]}, inputs="x w b"), "Conv", "shape")
    refuse(conv(shape=("N", 2, 6, 6)), "Conv", "2 channels")
    refuse(
        conv({"w": W.astype("float16")}),
        "tensor 'w' is float16, only constants of float32",
    )
    refuse(
        conv({"w": W.astype("float64")}),
        "tensor 'w' is float64, only constants of float32",
    )
    same = {"auto_pad": "SAME_UPPER", "strides": [2, 2]}
    refuse(conv(shape=("N", 1, "H", "W"), **same), "auto_pad=SAME_UPPER", "open")
    # without a stride the size does not matter
    check(conv(shape=("N", 1, "H", "W"), auto_pad="SAME_LOWER"), IMAGE)


sizes = st.integers(1, 3)
windows = st.fixed_dictionaries(
    {
        "strides": st.tuples(sizes, sizes),
        "dilations": st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]),
    },
    optional={
        "auto_pad": st.sampled_from(["VALID", "SAME_UPPER", "SAME_LOWER", "NOTSET"]),
        "pads": st.tuples(*[st.integers(0, 2)] * 4),
    },
)


def equal_or_refused(proto, x):
    """What onnxruntime gives, or DataError."""
    try:
        model = cycnn.onnx.load(proto)
    except DataError as error:
        assert "the given model: node 'the " in str(error)
        return
    try:
        y = run(proto, x)
    except REFUSED:
        return
    np.testing.assert_allclose(model(x).numpy(), y, rtol=1e-4, atol=1e-5)
    return True


@settings(max_examples=150, deadline=None)
@given(attributes=windows, kernel=st.tuples(sizes, sizes), size=st.integers(4, 9))
def test_conv_of_any_window(attributes, kernel, size):
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        attributes.pop("pads", None)
    x = numbers(2, 1, size, size + 1)
    proto = conv({"w": numbers(2, 1, *kernel)}, (2, 1, size, size + 1), **attributes)
    equal_or_refused(proto, x)


@settings(max_examples=150, deadline=None)
@given(
    attributes=windows,
    kernel=st.tuples(sizes, sizes),
    size=st.integers(4, 9),
    ceil_mode=st.integers(0, 1),
)
def test_max_pool_of_any_window(attributes, kernel, size, ceil_mode):
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        attributes.pop("pads", None)
    x = numbers(2, 1, size, size + 1)
    proto = graph(
        [node("MaxPool", kernel_shape=kernel, ceil_mode=ceil_mode, **attributes)],
        shape=(2, 1, size, size + 1),
    )
    equal_or_refused(proto, x)


def test_uneven_padding_that_can_be_read():
    """The usual first layers of a network with "same" padding and even images."""
    model = check(
        conv(shape=(3, 1, 6, 6), strides=[2, 2], auto_pad="SAME_UPPER"), IMAGE
    )
    assert model[0].padding == (1, 1) and model[0].weight.shape == (2, 1, 4, 4)
    check(conv(pads=[1, 0, 0, 2], shape=("N", 1, "H", "W")), IMAGE, "Conv2d")
    pool = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}
    model = check(graph([node("MaxPool", **pool)]), IMAGE, "MaxPool2d")
    assert model[0].padding == (0, 0)
    for shape in (("N", 1, 5, 5), ("N", 1, "H", "W")):
        for size in (5, 6):
            proto = graph([node("MaxPool", **pool)], shape=shape)
            if shape[2] in (size, "H"):
                model = check(proto, numbers(3, 1, size, size), "MaxPool2d")
                assert model[0].padding == (0, 0, 1, 1)


@pytest.mark.parametrize("opset", [9, 10, 12, 17, 22])
def test_max_pool(opset):
    def pool(operator="MaxPool", outputs="y", **attributes):
        attributes = {"kernel_shape": [3, 2], **attributes}
        return graph([node(operator, "x", outputs, **attributes)], opset=opset)

    assert check(pool(), IMAGE, "MaxPool2d")[0].stride == (1, 1)
    check(pool(strides=[2, 3], pads=[1, 1, 1, 1]), IMAGE)
    check(pool(auto_pad="VALID", strides=[2, 2]), IMAGE)
    check(pool(outputs="y positions"), IMAGE)
    refuse(pool(kernel_shape=[2]), "two dimensions")
    check(pool(pads=[2, 1, 2, 1]), IMAGE, "MaxPool2d")
    refuse(pool(kernel_shape=[2, 2], pads=[2, 2, 2, 2]), "must be less than")
    if opset > 9:
        refuse(pool(dilations=[2, 1]), "dilations")
        # of 6 rows windows of 3 in steps of 2 leave one over
        (layer,) = check(pool(strides=[2, 2], ceil_mode=1), IMAGE, "MaxPool2d")
        assert layer.ceil_mode
        even = pool(kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        assert not check(even, IMAGE)[0].ceil_mode


def gemm(inputs="x v c", weights=None, opset=17, **attributes):
    weights = {"v": V, "c": C} if weights is None else weights
    return graph([node("Gemm", inputs, **attributes)], weights, ("N", 36), opset)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 22])
def test_gemm(opset):
    model = check(gemm(opset=opset), ROWS, "Linear")
    np.testing.assert_array_equal(model[0].weight.data.numpy(), V.T)
    check(gemm(opset=opset, alpha=0.5, beta=-2.0), ROWS)
    turned = {"v": np.ascontiguousarray(V.T), "c": C[None]}
    check(gemm(weights=turned, opset=opset, transB=1), ROWS)
    for one in (C[:1], C[:1, None], C[0]):
        check(gemm(weights={"v": V, "c": one}, opset=opset), ROWS)
    if opset > 9:
        assert check(gemm("x v", opset=opset), ROWS)[0].bias is None


def test_gemm_refused():
    refuse(gemm(transA=1), "node 'the Gemm' (Gemm)", "transA is 1")
    refuse(gemm(weights={"v": V[0], "c": C}), "(4,)")
    refuse(
        gemm(weights={"v": V, "c": ROWS[:, :4]}), "'c' has shape (3, 4)", "4 channels"
    )
    refuse(gemm(weights={"v": V[:5], "c": C}), "Gemm", "36 features")
    refuse(gemm(weights={"v": V[:, :0], "c": C[:0]}), "Gemm", "out_features")
    refuse(gemm("v x c"), "its input is 'v'")
    refuse(gemm("x x c"), "used 2 times")


@pytest.mark.parametrize("added", [C, C[None], C[:1], C[0]])
@pytest.mark.parametrize("inputs", ["a c", "c a"])
def test_matmul_and_add(inputs, added):
    nodes = [node("MatMul", "x v", "a"), node("Add", inputs)]
    proto = graph(nodes, {"v": V, "c": added}, ("N", 36), opset=9)
    check(proto, ROWS, "Linear")


def test_add():
    nodes = [node("Conv", "x w b", "a"), node("Add", "a c")]
    weights = {"w": W, "b": B, "c": B.reshape(2, 1, 1)}
    check(graph(nodes, weights), IMAGE, "Conv2d")
    # along the columns of the image, not the channels
    refuse(graph(nodes, weights | {"c": B}), "node 'the Add' (Add)", "2 channels")
    refuse(graph([node("Add", "x c")], {"c": B[:1]}), "behind Conv")
    residual = [node("Conv", "x w", "a"), node("Add", "a x")]
    check(graph(residual, {"w": W[:1, :, :1, :1]}), IMAGE, "Residual")
    refuse(graph([node("Sigmoid", "x", "a"), node("Add", "a a")]), "used 2 times")


STATISTICS = {
    "gamma": numbers(2, seed=6),
    "beta": numbers(2, seed=7),
    "mean": numbers(2, seed=8),
    "var": np.abs(numbers(2, seed=9)),
}


def normalised(front="x w b", statistics=STATISTICS, opset=17, **attributes):
    nodes = [
        node("Conv", front, "a"),
        node("BatchNormalization", "a gamma beta mean var", **attributes),
    ]
    return graph(nodes, {"w": W, "b": B, **statistics}, opset=opset)


@pytest.mark.parametrize("opset", [9, 14, 15, 22])
def test_batch_normalization(opset):
    check(normalised(opset=opset), IMAGE, "Conv2d BatchNorm2d")
    proto = normalised("x w", opset=opset, epsilon=0.1, momentum=0.75)
    norm = check(proto, IMAGE, "Conv2d BatchNorm2d")[1]
    assert (norm.eps, norm.momentum) == (0.1, 0.25)
    nodes = [
        node("MatMul", "x v", "a"),
        node("BatchNormalization", "a s s s s", "b"),
        node("Add", "b s"),
    ]
    weights = {"v": V, "s": np.abs(C)}
    check(graph(nodes, weights, ("N", 36), opset=opset), ROWS, "Linear")


@pytest.mark.parametrize("front", ["MatMul", "Gemm"])
def test_a_large_epsilon_is_merged_into_a_product(front):
    small = {"v": V, "s": np.full_like(C, 0.05)}
    nodes = [
        node(front, "x v", "a"),
        node("BatchNormalization", "a s s s s", epsilon=0.1),
    ]
    check(graph(nodes, small, ("N", 36)), ROWS, "Linear")


def test_batch_normalization_refused():
    what = "node 'the BatchNormalization' (BatchNormalization)"
    refuse(normalised(training_mode=1), what, "training_mode")
    refuse(
        normalised(statistics=STATISTICS | {"var": -np.ones(2, "f")}), what, "variance"
    )
    three = STATISTICS | {"mean": np.ones(3, "f")}
    refuse(normalised(statistics=three), what, "'mean' has shape (3,)")
    proto = graph([node("BatchNormalization", "x s s s s")], {"s": C[:1]})
    refuse(proto, what, "a variance is negative")
    rows = graph([node("BatchNormalization", "x s s s s")], {"s": V[:, 0]}, ("N", 36))
    refuse(rows, what, "behind Gemm and MatMul only")
    outputs = node("BatchNormalization", "a b b b b", "y m v sm sv")
    nodes = [node("Conv", "x w", "a"), outputs]
    refuse(graph(nodes, {"w": W, "b": B}, opset=9), what, "output 'm'")


# import: the others


@pytest.mark.parametrize("opset", [9, 13, 17, 22])
def test_activations(opset):
    for operator, layer in (("Relu", "ReLU"), ("Sigmoid", "Sigmoid")):
        check(graph([node(operator)], opset=opset), IMAGE, layer)
    for axes in ({"axis": 1}, {"axis": -1} if opset > 9 else {}, {}):
        proto = graph([node("LogSoftmax", **axes)], shape=("N", 36), opset=opset)
        check(proto, ROWS, "LogSoftmax")
    refuse(graph([node("LogSoftmax", axis=0)], shape=("N", 36)), "axis is 0")
    refuse(graph([node("LogSoftmax")]), "node 'the LogSoftmax' (LogSoftmax)")


@pytest.mark.parametrize("opset", [9, 11, 13, 21])
def test_flatten(opset):
    check(graph([node("Flatten")], opset=opset), IMAGE, "Flatten")
    check(graph([node("Flatten", axis=1)], opset=opset), IMAGE, "Flatten")
    refuse(graph([node("Flatten", axis=2)], opset=opset), "axis is 2")


def reshape(to, shape=("N", 1, 6, 6), opset=17, **attributes):
    weights = {"to": np.array(to, "int64")}
    return graph([node("Reshape", "x to", **attributes)], weights, shape, opset)


@pytest.mark.parametrize("opset", [9, 13, 14, 21])
def test_reshape(opset):
    for to, n in (((0, -1), "N"), ((0, 36), "N"), ((-1, 36), "N"), ((3, -1), 3)):
        check(reshape(to, (n, 1, 6, 6), opset=opset), IMAGE, "Flatten")
    # a file of a fixed batch is read for any
    assert cycnn.onnx.load(reshape((3, 36), (3, 1, 6, 6)))(IMAGE[:2]).shape == (2, 36)
    assert cycnn.onnx.load(reshape((0, -1), ("N", 1, "H", "W")))(IMAGE).shape == (3, 36)


@pytest.mark.parametrize(
    "to, shape",
    [
        ((1, -1), ("N", 1, 6, 6)),
        ((-1, 18), ("N", 1, 6, 6)),
        ((-1, 36), ("N", 1, "H", "W")),
        ((2, -1), (1, 1, 6, 6)),
        ((0, 6, -1), ("N", 1, 6, 6)),
        ((-1,), ("N", 1, 6, 6)),
        ((-1,), ("N", 1, "H", "W")),
    ],
)
def test_reshape_refused(to, shape):
    refuse(reshape(to, shape), "node 'the Reshape' (Reshape)", str(list(to)))


def test_reshape_to_no_rows():
    refuse(reshape((0, -1), allowzero=1), "Reshape")


@pytest.mark.parametrize("opset", [9, 10, 12, 13, 22])
def test_what_does_nothing(opset):
    old = {"ratio": 0.3} if opset < 12 else {}
    nodes = [node("Dropout", "x", "a mask", **old), node("Identity", "a")]
    check(graph(nodes, opset=opset), IMAGE, "")
    if opset >= 12:
        weights = {"ratio": np.float32(0.5), "mode": np.bool_(False)}
        check(graph([node("Dropout", "x ratio mode")], weights, opset=opset), IMAGE, "")
        weights["mode"] = np.bool_(True)
        dropout = node("Dropout", "x ratio mode")
        refuse(graph([dropout], weights, opset=opset), "training_mode")
    used = [node("Dropout", "x", "a mask"), node("Cast", "mask", "z", to=1)]
    refuse(graph([*used, node("Identity", "a")]), "Cast")


# import: constants


def test_constants():
    value = numpy_helper.from_array(V)
    listed = helper.make_tensor("c", TensorProto.FLOAT, [4], C.tolist())  # no raw_data
    nodes = [
        node("Constant", "", "v", value=value),
        node("Constant", "", "c", value=listed),
        node("Identity", "v", "w"),
        node("Gemm", "x w c"),
    ]
    check(graph(nodes, shape=("N", 36)), ROWS, "Linear")
    for name, value, to in (
        ("value_ints", [0, -1], "Reshape"),
        ("value_floats", C.tolist(), "Add"),
        ("value_float", 0.25, "Add"),
    ):
        nodes = [node("Constant", "", "c", **{name: value})]
        if to == "Reshape":
            check(graph([*nodes, node(to, "x c")]), IMAGE, "Flatten")
        else:
            nodes += [node("MatMul", "x v", "a"), node(to, "a c")]
            check(graph(nodes, {"v": V}, ("N", 36)), ROWS, "Linear")
    words = [node("Constant", "", "c", value_string="x"), node("Relu")]
    refuse(graph(words), "node 'the Constant' (Constant)")


def test_weights_that_are_inputs_too():
    """As files before IR 4 have them."""
    proto = conv(opset=9)
    proto.ir_version = 3
    for name, array in (("w", W), ("b", B)):
        proto.graph.input.append(value_info(name, array.shape))
    check(proto, IMAGE, "Conv2d")


def external(path, location="weights", **changes):
    """Writes a model whose weights lie in another file; ``changes``: of "w"'s place."""
    proto = conv()
    with open(path.parent / "weights", "wb") as file:
        for tensor in proto.graph.initializer:
            start, length = file.tell(), file.write(tensor.raw_data)
            entries = {"location": location, "offset": start, "length": length}
            if tensor.name == "w":
                entries |= changes
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                if value is not None:
                    tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())
    return proto


def test_external_data(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    proto = external(path)
    want = check(conv(), IMAGE)(IMAGE).numpy()
    for source in (path, onnx.load(path)):
        np.testing.assert_array_equal(cycnn.onnx.load(source)(IMAGE).numpy(), want)
    # the folder is that of the model, wherever one is
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(cycnn.onnx.load(path.name)(IMAGE).numpy(), want)
    external(path, length=None)
    np.testing.assert_array_equal(cycnn.onnx.load(path)(IMAGE).numpy(), want)
    for source in (proto, proto.SerializeToString()):
        refuse(source, "'w' lies in another file", "give the path")
    (tmp_path / "weights").unlink()
    with pytest.raises(FileNotFoundError, match="'w' lies in 'weights', .* is no"):
        cycnn.onnx.load(path)


def test_a_constant_in_another_file(tmp_path):
    path = tmp_path / "model.onnx"
    (tmp_path / "c").write_bytes(W.tobytes())
    tensor = numpy_helper.from_array(W)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="c")
    nodes = [node("Constant", "", "w", value=tensor), node("Conv", "x w b")]
    path.write_bytes(graph(nodes, {"b": B}).SerializeToString())
    (layer,) = cycnn.onnx.load(path)
    np.testing.assert_array_equal(layer.weight.data.numpy(), W)


@pytest.mark.parametrize("inside", [False, True])
def test_external_data_is_in_the_folder_of_the_model(tmp_path, inside):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.onnx"
    external(path)
    outside = tmp_path / "outside"
    (folder / "weights").rename(outside)
    (folder / "link").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    wrong = ["../outside", "link", "up/outside", str(outside), "", ".", "..", "a\0b"]
    for location in [str(folder / "weights")] if inside else wrong:
        external(path, location)
        refuse(path, "tensor 'w' lies in", "not inside the folder of the model")
    (folder / "there").mkdir()
    external(path, "there")
    refuse(path, "'there', which is no file")
    (folder / "weights").rename(folder / "there" / "weights")
    external(path, "there/../there/weights")
    assert len(cycnn.onnx.load(path)) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"offset": 1 << 40}, "bytes from 1099511627776 on of 'weights'"),
        ({"offset": -4}, "damaged"),
        ({"offset": "x"}, "damaged"),
        ({"length": 1}, "damaged: 1 bytes"),
        ({"length": 1 << 40}, "damaged"),
        ({"length": ""}, "damaged"),
    ],
)
def test_external_data_that_is_not_there(tmp_path, changes, words):
    path = tmp_path / "model.onnx"
    external(path, **changes)
    refuse(path, "tensor 'w'", words)


def test_external_data_of_damaged_tensors(tmp_path):
    path = tmp_path / "model.onnx"
    for field, value in [("data_type", 8), ("data_type", 99), ("dims", [-2, -1, 3, 3])]:
        proto = external(path)
        (weight,) = (t for t in proto.graph.initializer if t.name == "w")
        weight.ClearField(field)
        if field == "dims":
            weight.dims.extend(value)
        else:
            weight.data_type = value
        path.write_bytes(proto.SerializeToString())
        refuse(path, "tensor 'w' is damaged")
    external(path)
    (tmp_path / "weights").write_bytes(bytes(5))
    refuse(path, "of 'weights', which has 5")


@pytest.mark.parametrize(
    "dims, content",
    [
        ((2**62, 4, 3, 3), b""),
        ((2**40, 1, 3, 3), None),
        ((-2, 1, -3, 3), None),
        ((-1, 1, 3, 3), None),
        ((0, 1, 3, 3), b""),
        ((2, 1, 3, 3), bytes(73)),
        ((3, 1, 3, 3), None),
    ],
)
def test_sizes_that_are_not_there(dims, content):
    proto = conv()
    weight = proto.graph.initializer[0]
    del weight.dims[:]
    weight.dims.extend(dims)
    if content is not None:
        weight.raw_data = content
    refuse(proto, "the given model")


def test_other_kinds_of_tensors():
    for kind, size in (("BFLOAT16", 36), ("FLOAT8E4M3FN", 18), ("DOUBLE", 144)):
        proto = conv()
        weight = proto.graph.initializer[0]
        weight.data_type, weight.raw_data = (
            TensorProto.DataType.Value(kind),
            bytes(size),
        )
        refuse(proto, "node 'the Conv' (Conv)", "tensor 'w' is", "only constants of")
    proto = conv()
    proto.graph.initializer[0].data_type = 99
    refuse(proto, "tensor 'w' is damaged")
    proto = conv()
    proto.graph.initializer[0].segment.end = 1
    refuse(proto, "tensor 'w' is damaged")


# import: graphs


def test_unsupported_operators_are_all_named():
    nodes = [
        node("Softplus", "x", "a"),
        helper.make_node("Relu", ["a"], ["b"], domain="own"),
        helper.make_node("Elu", ["b"], ["y"]),
    ]
    refuse(
        graph(nodes),
        "node 'the Softplus' (Softplus), node 'b' (own.Relu), node 'y' (Elu), but for",
        "BatchNormalization, Clip, Constant, Conv",
    )
    many = [node("Elu", f"x{i or ''}", f"x{i + 1}") for i in range(11)]
    refuse(graph([*many, node("Relu", "x11")]), "and 3 more")


def test_graphs_that_are_no_chain():
    def value(name, kind=TensorProto.FLOAT):
        return value_info(name, ("N", 4), kind)

    refuse(graph([node("Relu")], inputs=[value("x"), value("z")]), "2 inputs and 1")
    branch = [node("Relu"), node("Sigmoid", "x", "z")]
    refuse(graph(branch, outputs=[value("y"), value("z")]), "1 inputs and 2 outputs")
    refuse(graph(branch), "node 'the Relu' (Relu)", "chains")
    refuse(graph([node("Relu"), node("Relu", "y", "z")]), "used 2 times")
    half = [value("x", TensorProto.FLOAT16)]
    refuse(graph([node("Relu")], inputs=half), "input 'x' is not float32")
    constant = node("Constant", "", "y", value_floats=[1.0])
    refuse(graph([constant]), "output 'y'")
    sparse = graph([node("Relu")])
    index = numpy_helper.from_array(np.array([0]), "")
    entry = helper.make_sparse_tensor(numpy_helper.from_array(C[:1], "s"), index, [4])
    sparse.graph.sparse_initializer.append(entry)
    proto = graph([node("MatMul", "x s")], shape=("N", 4))
    proto.graph.sparse_initializer.append(entry)
    refuse(proto, "'s'")


@pytest.mark.parametrize("opset", [8, 23])
def test_opsets(opset):
    refuse(graph([node("Relu")], opset=opset), f"opset {opset}", "9 to 22")


def test_a_loaded_network_learns():
    proto = graph([node("Flatten", "x", "a"), node("Gemm", "a v")], {"v": V})
    model = cycnn.onnx.load(proto)
    loss = nn.CrossEntropyLoss()
    optimizer = cycnn.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(5):
        values.append(float(loss(model(IMAGE), np.array([0, 1, 2]))))
        model.backward(loss.backward(), input_grad=False)
        optimizer.step()
    assert values[-1] < values[0] / 2


# damaged files

FILES = [
    normalised().SerializeToString(),
    reshape((0, -1)).SerializeToString(),
    conv(auto_pad="SAME_UPPER", strides=[2, 2]).SerializeToString(),
]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files(data):
    content = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        cut = data.draw(st.integers(0, 4))
        content[at : at + cut] = data.draw(st.binary(max_size=4))
    try:
        assert isinstance(cycnn.onnx.load(bytes(content)), nn.Sequential)
    except DataError as error:
        assert str(error).startswith("the given bytes: ")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_attributes_of_any_value(data):
    """Lists of another length, and numbers that no size can have."""
    attribute = data.draw(
        st.sampled_from(["strides", "pads", "dilations", "kernel_shape", "group"])
    )
    number = st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 2**31, 2**63 - 1])
    drawn = number if attribute == "group" else st.lists(number, min_size=1, max_size=5)
    pool = attribute != "group" and data.draw(st.booleans())
    if pool:
        values = {"kernel_shape": [2, 2], attribute: data.draw(drawn)}
        proto = graph([node("MaxPool", **values)])
    else:
        proto = conv(**{attribute: data.draw(drawn)})
    equal_or_refused(proto, IMAGE)
