"""ONNX files of each layer of the library, and of networks that nobody chose."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cycnn
from cycnn import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from test_onnx import (  # noqa: F401
    IMAGE,
    ROWS,
    check,
    equal_or_refused,
    graph,
    node,
    numbers,
    on_cpu,
    refuse,
    run,
    windows,
)


def normalised(layer, seed=0):
    """The layer, where it normalises with numbers as after some training."""
    rng = np.random.default_rng(seed)
    state = layer.state_dict()
    for name, array in state.items():
        low = 0.5 if name.endswith("running_var") else -1
        if array.shape:
            state[name] = rng.uniform(low, 2, array.shape)
    layer.load_state_dict(state)
    return layer.eval()


LAYERS = {
    "AvgPool2d": lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 1)),
    "AvgPool2d, of the image": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "AvgPool2d, over the edge": lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True),
    "AvgPool2d, over the edge of the image": lambda: nn.AvgPool2d(
        3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "AvgPool2d, uneven": lambda: nn.AvgPool2d(
        3, 2, (0, 1, 1, 2), count_include_pad=False
    ),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(2, eps=0.01, momentum=0.3),
    "BatchNorm2d, mean": lambda: nn.BatchNorm2d(2, momentum=None),
    "BatchNorm2d, plain": lambda: nn.BatchNorm2d(2, affine=False),
    "Dropout": lambda: nn.Dropout(0.9),
    "GELU": lambda: nn.GELU(),
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "Hardtanh": lambda: nn.Hardtanh(-0.3, 1.7),
    "Hardtanh, open above": lambda: nn.Hardtanh(-0.1, math.inf),
    "Hardtanh, open below": lambda: nn.Hardtanh(-math.inf, 0.4),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "MaxPool2d, over the edge": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "MaxPool2d, uneven": lambda: nn.MaxPool2d(3, 2, (0, 1, 1, 2)),
    "ReLU6": lambda: nn.ReLU6(),
    "SiLU": lambda: nn.SiLU(),
    "Softmax": lambda: nn.Sequential(nn.Flatten(), nn.Softmax()),
    "Tanh": lambda: nn.Tanh(),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 20, 22])
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer(tmp_path, name, opset):
    layer = normalised(LAYERS[name]())
    path = tmp_path / "layer.onnx"
    proto = cycnn.onnx.export(layer, path, (None, 2, 6, 8), opset=opset)
    assert proto.ir_version == (8 if opset < 20 else proto.ir_version)
    again = cycnn.onnx.load(path)
    if not isinstance(layer, (nn.Sequential, nn.Dropout)):
        (loaded,) = again
        shown = repr(layer).replace("momentum=None", "momentum=0.1")
        assert repr(loaded) == shown.replace(", momentum=0.1", "") or not layer.affine
    x = 3 * numbers(3, 2, 6, 8)
    y = layer(x).numpy()
    np.testing.assert_allclose(run(proto, x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(again(x).numpy(), y)


@pytest.mark.parametrize("opset", [17, 22])
@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"elementwise_affine": False}]
)
@pytest.mark.parametrize("sizes", [8, (6, 8), (2, 6, 8)])
def test_layer_norm(tmp_path, sizes, settings, opset):
    layer = normalised(nn.LayerNorm(sizes, 1e-3, **settings))
    path = tmp_path / "layer.onnx"
    proto = cycnn.onnx.export(layer, path, (None, 2, 6, 8), opset=opset)
    x = numbers(3, 2, 6, 8)
    y = layer(x).numpy()
    np.testing.assert_allclose(run(proto, x), y, rtol=1e-4, atol=1e-5)
    (again,) = cycnn.onnx.load(proto)
    assert again.eps == 1e-3
    np.testing.assert_array_equal(again(x).numpy(), y)


def test_what_has_no_operator(tmp_path):
    path, shape = tmp_path / "model.onnx", (None, 2, 6, 8)
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"layer 1 \(LayerNorm\) needs opset 17"):
        cycnn.onnx.export(model, path, shape, opset=16)
    with pytest.raises(cycnn.ShapeError, match=r"layer 1 \(LayerNorm\): x has"):
        cycnn.onnx.export(model, path, (None, 2, 8, 6))
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="BatchNorm2d, has no running statistics"):
        cycnn.onnx.export(norm, path, shape)
    with pytest.raises(cycnn.ShapeError, match="BatchNorm2d"):
        cycnn.onnx.export(nn.BatchNorm2d(3), path, shape)
    assert not path.exists()


# networks


def resnet(seed=0):
    def block(channels, out):
        body = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        if channels == out:
            return nn.Residual(body)
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out))
        return nn.Residual(body, shortcut)

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        block(4, 4),
        nn.ReLU(),
        block(4, 6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return normalised(model, seed)


def test_a_residual_network(tmp_path):
    model, path = resnet(), tmp_path / "model.onnx"
    proto = cycnn.onnx.export(model, path, (None, 2, 8, 8))
    assert proto.ir_version == 8 and proto.opset_import[0].version == 17
    again = cycnn.onnx.load(path)
    assert repr(again) == repr(model) and not again.training
    x = numbers(4, 2, 8, 8)
    y = model(x).numpy()
    np.testing.assert_allclose(run(proto, x), y, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(again(x).numpy(), y)
    np.testing.assert_allclose(nn.fold_batch_norm(again)(x).numpy(), y, 1e-3, 1e-4)
    # and learns like the one that was written
    labels = np.array([0, 1, 2, 0], np.int32)
    made = []
    for network in (model, again):
        network.train()
        loss = nn.CrossEntropyLoss()
        optimizer = cycnn.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(3):
            loss(network(x), labels)
            network.backward(loss.backward(), input_grad=False)
            optimizer.step()
        state = network.state_dict()
        made.append({k: v for k, v in state.items() if v.shape})
    for name, array in made[0].items():
        np.testing.assert_allclose(made[1][name], array, 1e-4, 1e-5, err_msg=name)


def draw_network(rng):
    """A network of any layers for images (N, C, H, W); its layers, and C, H, W."""

    def pick(*of):
        return of[rng.integers(len(of))]

    channels, size = pick(1, 2, 4), pick(7, 8, 12)
    image = channels, size, size
    layers = []
    for _ in range(rng.integers(2, 7)):
        kind = pick("conv", "conv", "transpose", "pool", "norm", "act", "block", "pad")
        if kind == "conv":
            out = pick(2, 4, 6)
            groups = pick(1, 2) if channels % 2 == 0 else 1
            layers.append(
                nn.Conv2d(channels, out, 3, pick(1, 2), 1, 1, groups, pick(True, False))
            )
            channels = out
        elif kind == "transpose":
            out, step = pick(2, 4), pick(1, 2)
            layers.append(
                nn.ConvTranspose2d(channels, out, 3, step, pick(0, 1), step - 1)
            )
            channels = out
        elif kind == "pool":
            layers.append(
                pick(
                    nn.MaxPool2d(2, 1),
                    nn.MaxPool2d(3, 2, 1),
                    nn.AvgPool2d(2, 1, 1),
                    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                    nn.MaxPool2d(3, 2, ceil_mode=True),
                    nn.AvgPool2d(2, 2, (0, 1, 1, 0)),
                )
            )
        elif kind == "norm":
            layers.append(pick(nn.BatchNorm2d(channels), nn.Dropout(0.3)))
        elif kind == "act":
            layers.append(
                pick(nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU)()
            )
        elif kind == "pad":
            # onnxruntime gives a pooling behind it the padding, and then refuses that
            layers.append(nn.ZeroPad2d(tuple(rng.integers(0, 3, 4).tolist())))
            layers.append(nn.Tanh())
        else:
            inner = nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            block = pick(nn.Residual(inner), nn.Concat(nn.GELU("tanh"), inner))
            channels *= 1 + isinstance(block, nn.Concat)
            layers.append(block)
    layers.append(nn.AdaptiveAvgPool2d(1))
    layers += [nn.Flatten(), nn.LayerNorm(channels), nn.Linear(channels, 3)]
    layers.append(pick(nn.Softmax, nn.LogSoftmax)())
    return layers, image


@pytest.mark.parametrize("seed", range(25))
def test_any_network(tmp_path, seed):
    cycnn.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layers, image = draw_network(rng)
    model = normalised(nn.Sequential(*layers), seed)
    opset = int(rng.choice([17, 18, 20, 22]))
    path = tmp_path / "model.onnx"
    proto = cycnn.onnx.export(model, path, (None, *image), opset=opset)
    again = cycnn.onnx.load(path)
    assert len(list(again)) == sum(not isinstance(x, nn.Dropout) for x in layers)
    x = numbers(3, *image, seed=seed)
    y = model(x).numpy()
    np.testing.assert_allclose(run(proto, x), y, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(again(x).numpy(), y, rtol=1e-5, atol=1e-6)


# import


@pytest.mark.parametrize("opset", [9, 13, 18, 22])
def test_single_operators(opset):
    for operator, layer in (
        ("Tanh", "Tanh"),
        ("GlobalAveragePool", "AdaptiveAvgPool2d"),
    ):
        check(graph([node(operator)], opset=opset), IMAGE, layer)
    check(graph([node("LeakyRelu")], opset=opset), IMAGE, "LeakyReLU")
    (layer,) = check(graph([node("LeakyRelu", alpha=0.3)], opset=opset), IMAGE)
    assert layer.negative_slope == 0.3
    proto = graph([node("Softmax")], shape=("N", 36), opset=opset)
    check(proto, ROWS, "Softmax")
    refuse(graph([node("Softmax", axis=0)], shape=("N", 36), opset=opset), "axis is 0")
    if opset >= 20:
        check(graph([node("Gelu")], opset=opset), IMAGE, "GELU")
        proto = graph([node("Gelu", approximate="tanh")], opset=opset)
        assert check(proto, IMAGE)[0].approximate == "tanh"


@pytest.mark.parametrize("opset", [9, 11, 19, 22])
def test_average_pool(opset):
    def pool(**attributes):
        attributes = {"kernel_shape": [3, 2], **attributes}
        return graph([node("AveragePool", **attributes)], opset=opset)

    assert check(pool(), IMAGE, "AvgPool2d")[0].stride == (1, 1)
    padded = {"strides": [2, 3], "pads": [1, 1, 1, 1]}
    assert not check(pool(**padded), IMAGE)[0].count_include_pad
    check(pool(**padded, count_include_pad=1), IMAGE, "AvgPool2d")
    uneven = {"pads": [0, 1, 1, 0], "count_include_pad": 1}
    check(pool(**uneven), IMAGE, "AvgPool2d")
    check(pool(auto_pad="VALID"), IMAGE)
    refuse(pool(auto_pad="SAME_UPPER", strides=[3, 3]), "larger than the window")
    check(pool(pads=[0, 1, 1, 0]), IMAGE, "AvgPool2d")
    refuse(pool(kernel_shape=[2]), "two dimensions")
    if opset > 9:
        check(pool(strides=[2, 2], ceil_mode=1), IMAGE, "AvgPool2d")
        refuse(pool(strides=[2, 2], ceil_mode=1, auto_pad="VALID"), "auto_pad=VALID")
    if opset > 18:
        refuse(pool(dilations=[2, 1]), "dilations")


@settings(max_examples=150, deadline=None)
@given(
    attributes=windows,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(4, 9),
    ceil_mode=st.integers(0, 1),
    counts=st.integers(0, 1),
)
def test_average_pool_of_any_window(attributes, kernel, size, ceil_mode, counts):
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        attributes.pop("pads", None)
    pool = node(
        "AveragePool",
        kernel_shape=kernel,
        ceil_mode=ceil_mode,
        count_include_pad=counts,
        **attributes,
    )
    x = numbers(2, 1, size, size + 1)
    equal_or_refused(graph([pool], shape=(2, 1, size, size + 1), opset=19), x)


def test_rounded_up_where_the_last_window_begins_in_the_padding(tmp_path):
    """PyTorch, onnxruntime and opset 22 have no such window, older ones' shapes do."""
    path, shape = tmp_path / "model.onnx", (None, 2, 3, 3)
    x = numbers(2, 2, 3, 3)
    for kind in (nn.AvgPool2d, nn.MaxPool2d):
        for opset in (11, 17, 22):
            layer = kind(2, 2, 1, ceil_mode=True)
            proto = cycnn.onnx.export(layer, path, shape, opset)
            y = layer(x).numpy()
            assert y.shape == (2, 2, 2, 2)
            np.testing.assert_allclose(run(proto, x), y, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(cycnn.onnx.load(path)(x).numpy(), y)
        # the rows are rounded up, the columns are not
        layer = kind((3, 2), (2, 2), (0, 1), ceil_mode=True)
        with pytest.raises(ValueError, match=r"needs opset 22 for images of \(4, 3\)"):
            cycnn.onnx.export(layer, path, (None, 2, 4, 3), opset=17)
        proto = cycnn.onnx.export(layer, path, (None, 2, 4, 3), opset=22)
        x_here = numbers(2, 2, 4, 3)
        y = layer(x_here).numpy()
        np.testing.assert_allclose(run(proto, x_here), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(cycnn.onnx.load(path)(x_here).numpy(), y)


def test_max_pool_over_the_edge():
    """As GoogLeNet and SqueezeNet have it: the last window reaches over the edge."""
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
    nodes = [node("Relu", "x", "a"), node("MaxPool", "a", **pool)]
    check(graph(nodes), IMAGE, "ReLU MaxPool2d")
    # where the file leaves the size open, too
    proto = graph([node("MaxPool", **pool)], shape=("N", 1, "H", "W"))
    assert check(proto, IMAGE)[0].ceil_mode
    nodes[1] = node("MaxPool", "a", kernel_shape=[2, 2], auto_pad="SAME_UPPER")
    assert check(graph(nodes), -IMAGE)[1].padding == (0, 0, 1, 1)
    nodes[1] = node("MaxPool", "a", kernel_shape=[2, 2], auto_pad="SAME_LOWER")
    assert check(graph(nodes), -IMAGE)[1].padding == (1, 1, 0, 0)


@pytest.mark.parametrize("opset", [9, 13, 18, 22])
def test_mean_of_images(opset):
    def mean(axes, shape=("N", 1, 6, 6), **keep):
        if opset < 18:
            return graph([node("ReduceMean", axes=axes, **keep)], (), shape, opset)
        weights = {"axes": np.array(axes)}
        return graph([node("ReduceMean", "x axes", **keep)], weights, shape, opset)

    for axes in ([2, 3], [-1, -2]):
        check(mean(axes), IMAGE, "AdaptiveAvgPool2d")
        proto = mean(axes, ("N", 1, "H", "W"), keepdims=0)
        del proto.graph.output[0].type.tensor_type.shape.dim[2:]
        check(proto, IMAGE, "AdaptiveAvgPool2d Flatten")
    refuse(mean([1]), "ReduceMean", "over axes [1]")
    refuse(mean([2, 3], ("N", 1, 6)), "ReduceMean", "images")


STATISTICS = {
    name: np.random.default_rng(i).uniform(0.5, 2, 1).astype("f")
    for i, name in enumerate(("gamma", "beta", "mean", "var"))
}


@pytest.mark.parametrize("opset", [9, 14, 22])
def test_batch_normalization_of_images(opset):
    norm = node("BatchNormalization", "x gamma beta mean var")
    check(graph([norm], STATISTICS, opset=opset), IMAGE, "BatchNorm2d")
    # images, as the operators in front and the input say, of sizes that are open
    open_shape = ("N", "C", "H", "W")
    check(graph([norm], STATISTICS, open_shape, opset=opset), IMAGE, "BatchNorm2d")
    nodes = [
        node("Relu", "x", "a"),
        node("Relu", "a", "b"),
        node("Add", "a b", "c"),
        node("BatchNormalization", "c gamma beta mean var", "d"),
        node("Add", "d beta"),
    ]
    nodes[1].name, nodes[-1].name = "the second Relu", "the second Add"
    check(
        graph(nodes, STATISTICS, open_shape, opset=opset),
        IMAGE,
        "ReLU Residual BatchNorm2d",
    )
    flat = [node("Flatten", "x", "a"), node("BatchNormalization", "a s s s s")]
    weights = {"s": np.ones(36, "f")}
    refuse(graph(flat, weights, ("N", 1, "H", "W")), "behind Gemm and MatMul only")


def test_bias_behind_conv_transpose():
    nodes = [node("ConvTranspose", "x w", "a"), node("Add", "a b")]
    weights = {"w": numbers(1, 2, 3, 3), "b": numbers(2, 1, 1)}
    check(graph(nodes, weights), IMAGE, "ConvTranspose2d")


def test_layer_normalization_refused():
    def norm(shape=("N", 1, 6, 6), scale=(6,), **attributes):
        weights = {"s": np.ones(scale, "f")}
        return graph([node("LayerNormalization", "x s", **attributes)], weights, shape)

    check(norm(), IMAGE, "LayerNorm")
    check(norm(scale=(1,)), IMAGE, "LayerNorm")
    check(norm(("N", 1, "H", "W"), axis=3), IMAGE, "LayerNorm")
    refuse(norm(axis=0), "axis is 0 of 4 axes")
    refuse(norm(axis=-4, scale=(1, 1, 6, 6)), "axis is -4 of 4 axes")
    refuse(norm(scale=(5,)), "LayerNormalization", "its scale has shape (5,)")
    refuse(norm(("N", 1, "H", "W"), axis=2), "its scale has shape (6,)")


@pytest.mark.parametrize("opset", [9, 12, 22])
def test_clip(opset):
    def clip(low=None, high=None):
        if opset < 11:
            ends = {"min": low, "max": high}
            ends = {k: v for k, v in ends.items() if v is not None}
            return graph([node("Clip", **ends)], opset=opset)
        ends = {"low": low, "high": high}
        weights = {k: np.float32(v) for k, v in ends.items() if v is not None}
        operator = node("Clip")
        operator.input.extend(k if k in weights else "" for k in ends)
        return graph([operator], weights, opset=opset)

    check(clip(0.0), IMAGE, "ReLU")
    check(clip(0.0, 3.4028234663852886e38), IMAGE, "ReLU")
    check(clip(), IMAGE, "")
    check(clip(0.0, 6.0), 9 * IMAGE, "ReLU6")
    for low, high in ((-1.0, None), (None, 0.3), (-0.1, 0.7), (-3.4028235e38, 2.0)):
        (layer,) = check(clip(low, high), IMAGE, "Hardtanh")
        given = (low if low and low > -1e38 else -math.inf), high or math.inf
        assert (layer.min_val, layer.max_val) == given
    message = "node 'the Clip' (Clip): Hardtanh: min_val must be less than max_val"
    refuse(clip(2.0, 1.0), message, "got 2.0 and 1.0")
    refuse(clip(1.0, 1.0), message)
    refuse(clip(math.nan, 1.0), message)
    refuse(clip(0.0, math.nan), message)


def written(*steps, **weights):
    """A graph of "operator inputs output"."""
    nodes = []
    for i, step in enumerate(steps):
        operator, *inputs, output = step.split()
        nodes.append(node(operator, " ".join(inputs), output))
        nodes[-1].name = f"{operator} {i}"
    return graph(nodes, {k: np.float32(v) for k, v in weights.items()})


def test_activations_in_simpler_operators():
    erf = {"r": math.sqrt(2), "i": 1 / math.sqrt(2), "one": 1, "half": 0.5}
    for proto, layer in (
        # as PyTorch's exporters write GELU
        (written("Div x r a", "Erf a b", "Add b one c", "Mul x c d", "Mul d half y",
                 **erf), "GELU"),
        (written("Mul x half a", "Mul x i b", "Erf b c", "Add one c d", "Mul a d y",
                 **erf), "GELU"),
        (written("Sigmoid x a", "Mul x a y"), "SiLU"),
        (written("Sigmoid x a", "Mul a x y"), "SiLU"),
        (written("Neg x a", "Exp a b", "Add b one c", "Div x c y", one=1), "SiLU"),
    ):  # fmt: skip
        assert check(proto, IMAGE, layer)
    tanh = written(
        "Mul x x a", "Mul a x b", "Mul b k c", "Add x c d", "Mul d s e", "Tanh e f",
        "Add f one g", "Mul g half h", "Mul x h y",
        k=0.044715, s=math.sqrt(2 / math.pi), one=1, half=0.5,
    )  # fmt: skip
    assert check(tanh, IMAGE, "GELU")[0].approximate == "tanh"
    # in a branch, and more than once
    check(
        written("Sigmoid x a", "Mul x a b", "Sigmoid b c", "Mul c b d", "Add x d y"),
        IMAGE,
        "Residual",
    )
    why = "is supported as a part of GELU or SiLU only"
    refuse(written("Mul x two y", two=2), "node 'Mul 0' (Mul)", why)
    refuse(written("Sigmoid x a", "Mul x a b", "Mul b two y", two=2), "Mul 2", why)
    refuse(written("Tanh x a", "Mul x a y"), "'Mul 1' (Mul)")


# damaged files


def every_operator():
    """The content of a small file, with most of the operators."""
    nodes = [
        node("BatchNormalization", "x gamma beta mean var", "a"),
        node("Sigmoid", "a", "b"),
        node("Mul", "a b", "c"),
        node("ConvTranspose", "c w", "d", auto_pad="SAME_UPPER", strides=[2, 1]),
        node("AveragePool", "d", "e", kernel_shape=[2, 2], pads=[0, 1, 1, 0],
             count_include_pad=1),
        node("LeakyRelu", "e", "f", alpha=0.3),
        node("LayerNormalization", "f s", "g"),
        node("Clip", "g zero", "h"),
        node("MaxPool", "h", "i", kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
        node("Gelu", "i", "j", approximate="tanh"),
        node("ReduceMean", "j two", "k", keepdims=0),
        node("Softmax", "k"),
    ]  # fmt: skip
    weights = STATISTICS | {
        "w": numbers(1, 2, 2, 2),
        "s": np.ones(6, "f"),
        "zero": np.float32(0),
        "two": np.array([2, 3]),
    }
    proto = graph(nodes, weights, opset=20)
    del proto.graph.output[0].type.tensor_type.shape.dim[2:]
    return proto


def test_every_operator():
    layers = (
        "BatchNorm2d SiLU ConvTranspose2d AvgPool2d LeakyReLU LayerNorm ReLU "
        "MaxPool2d GELU AdaptiveAvgPool2d Flatten Softmax"
    )
    check(every_operator(), IMAGE, layers)


CONTENT = every_operator().SerializeToString()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files(data):
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        cut = data.draw(st.integers(0, 4))
        content[at : at + cut] = data.draw(st.binary(max_size=4))
    try:
        assert isinstance(cycnn.onnx.load(bytes(content)), nn.Sequential)
    except cycnn.DataError as error:
        assert str(error).startswith("the given bytes: ")


# PyTorch


@pytest.mark.parametrize("opset", [17, 20, "dynamo"])
def test_files_of_pytorch(opset, tmp_path):
    torch = pytest.importorskip("torch")
    if opset == "dynamo":
        pytest.importorskip("onnxscript")
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = nn.functional.silu(self.conv(x))
            return nn.functional.max_pool2d(torch.relu(x + self.norm(y)), 3, 2, 1)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 3, padding=1)

        def forward(self, x):
            return torch.cat([self.narrow(x), self.wide(x)], -3)

    class Head(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.ZeroPad2d((1, 2, 0, 1)),
        Block(),
        Branches(),
        nn.GELU("tanh"),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, 1),
        nn.AvgPool2d(2, 1, 1),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Tanh(),
        Head(),
        nn.LayerNorm(4),
        nn.Dropout(),
        nn.Linear(4, 3),
        nn.Flatten(),
        nn.Softmax(1),
    ).eval()
    x, path = torch.from_numpy(numbers(3, 2, 12, 12)), tmp_path / "model.onnx"
    options = {"opset_version": opset, "dynamo": False, "input_names": ["x"]}
    options["dynamic_axes"] = {"x": {0: "N"}}
    if opset == "dynamo":
        sizes = ({0: torch.export.Dim("N")},)
        options = {"dynamo": True, "dynamic_shapes": sizes, "external_data": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, **options)
    assert (tmp_path / "model.onnx.data").exists() == (opset == "dynamo")
    loaded = cycnn.onnx.load(path)
    with torch.no_grad():
        y = model(x).numpy()
    np.testing.assert_allclose(loaded(x.numpy()).numpy(), y, rtol=1e-4, atol=1e-5)
    kinds = [type(layer).__name__ for layer in loaded]
    assert {"BatchNorm2d", "GELU", "Residual", "Concat", "LayerNorm"} <= set(kinds)


def test_weights_for_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from safetensors.torch import load_file

    def build(nn):
        return nn.Sequential(
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(0.1),
            nn.AvgPool2d(2, 2, 1, count_include_pad=False),
            nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
            nn.BatchNorm2d(6, affine=False),
            nn.SiLU(),
            nn.LayerNorm(8),
            nn.GELU("tanh"),
            nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
            nn.Tanh(),
            nn.Softmax(1),
        )

    ours, theirs = normalised(build(nn)), build(torch.nn).eval()
    ours[2].num_batches_tracked.data.copy_(np.array(7, np.int32))
    path = tmp_path / "weights.safetensors"
    ours.save(path)
    loaded = load_file(path)
    wanted = theirs.state_dict()
    assert list(ours.state_dict()) == list(wanted)
    assert {k: (v.dtype, v.shape) for k, v in loaded.items()} == {
        k: (v.dtype, v.shape) for k, v in wanted.items()
    }
    theirs.load_state_dict(loaded, assign=True)
    x = numbers(3, 2, 7, 8)
    with torch.no_grad():
        y = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours(x).numpy(), y, rtol=1e-4, atol=1e-5)

    theirs.train()(torch.from_numpy(x))  # statistics and counts move
    save_file(theirs.state_dict(), path)
    ours.load(path)
    with torch.no_grad():
        y = theirs.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours(x).numpy(), y, rtol=1e-4, atol=1e-5)
    assert int(ours[2].num_batches_tracked.data) == 8
