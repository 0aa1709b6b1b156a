"""ONNX files of networks that are no chain, and of what pads and enlarges."""

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
    check,
    equal_or_refused,
    graph,
    node,
    numbers,
    on_cpu,
    refuse,
    run,
    value_info,
)


def residual(channels, out=None):
    body = nn.Sequential(
        nn.Conv2d(channels, out or channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out or channels, out or channels, 3, padding=1, bias=False),
    )
    shortcut = None if out is None else nn.Conv2d(channels, out, 1)
    return nn.Residual(body, shortcut)


MODELS = {
    "ResNet": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), residual(4), nn.ReLU(), residual(4, 6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 48, 3), nn.LogSoftmax(),
    ),
    "blocks in blocks": lambda: nn.Residual(
        nn.Sequential(nn.Residual(nn.Sigmoid()), residual(2), nn.ReLU())
    ),
    "branches": lambda: nn.Concat(
        nn.Conv2d(2, 3, 1),
        nn.Sequential(),
        nn.Sequential(nn.ReLU(), nn.Concat(nn.Sigmoid(), nn.Conv2d(2, 1, 1))),
        nn.MaxPool2d(3, 1, 1),
    ),
    "dense": lambda: nn.Sequential(
        nn.Concat(nn.Sequential(), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Concat(nn.Sequential(), nn.Conv2d(4, 2, 3, padding=1)),
        nn.ReLU(),
    ),
    "padding": lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(2, 3, 3)),
    "autoencoder": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2), nn.Sigmoid(),
        nn.ConvTranspose2d(4, 2, (2, 3), (1, 3), (1, 0), (0, 2), bias=False),
        nn.ConvTranspose2d(2, 2, 3, dilation=2, groups=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 22])
@pytest.mark.parametrize("name", MODELS)
def test_export_and_load_again(tmp_path, name, opset):
    model, path = MODELS[name]().to("cpu"), tmp_path / "model.onnx"
    proto = cycnn.onnx.export(model, path, (None, 2, 6, 8), opset=opset)
    names = list(model.state_dict())
    assert [w.name for w in proto.graph.initializer][: len(names)] == names
    again = cycnn.onnx.load(path)
    for batch in (1, 3):
        x = numbers(batch, 2, 6, 8)
        y = model(x).numpy()
        np.testing.assert_allclose(run(proto, x), y, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(again(x).numpy(), y)


def test_an_old_kind_of_padding():
    weights = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 3])}
    check(graph([node("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 3])], opset=10), IMAGE)
    check(graph([node("Pad", "x p")], weights), IMAGE, "ZeroPad2d")
    some = {"p": np.array([1, 2, 0, 3]), "a": np.array([2, 3])}
    check(graph([node("Pad", "x p  a".replace("  ", " e "))], some | {
        "e": np.float32(0)}, opset=18), IMAGE, "ZeroPad2d")  # fmt: skip
    refuse(graph([node("Pad", "x p", mode="edge")], weights), "mode is 'edge'")
    refuse(graph([node("Pad", "x p e")], weights | {"e": np.float32(1)}), "only zeros")
    refuse(graph([node("Pad", "x p")], {"p": np.array([0, 1] + [0] * 6)}), "only zeros")
    refuse(graph([node("Pad", "x p")], {"p": np.array([0, 0, -1] + [0] * 5)}), "0 or")
    refuse(graph([node("Pad", "x p a")], {"p": weights["p"][:2], "a": np.array(
        [1.0])}), "Pad")  # fmt: skip


def test_constants_that_are_computed():
    """As PyTorch writes a padding: from the last axis to the first, then turned."""
    nodes = [
        node("ConstantOfShape", "four", "zeros"),
        node("Concat", "given zeros", "all", axis=0),
        node("Reshape", "all pairs", "table"),
        node("Slice", "table last first axis back", "turned"),
        node("Transpose", "turned", "sides", perm=[1, 0]),
        node("Reshape", "sides flat", "flatly"),
        node("Cast", "flatly", "pads", to=7),
        node("Pad", "x pads"),
    ]
    weights = {
        "four": np.array([4]),
        "given": np.array([1, 0, 2, 3], np.float32),
        "pairs": np.array([-1, 2]),
        "last": np.array([-1]),
        "first": np.array([-(2**63) + 1]),
        "axis": np.array([0]),
        "back": np.array([-1]),
        "flat": np.array([-1]),
    }
    nodes[5].name = "the second Reshape"
    model = check(graph(nodes, weights), IMAGE, "ZeroPad2d")
    assert model[0].padding == (1, 0, 2, 3)
    wide = graph([node("ConstantOfShape", "s", "p"), node("Pad", "x p")], {
        "s": np.array([2**40])})  # fmt: skip
    refuse(wide, "node 'the ConstantOfShape'", "only 1024 are supported")
    wrong = graph([node("Cast", "p", "q", to=99), node("Pad", "x q")], {
        "p": np.array([0])})  # fmt: skip
    refuse(wrong, "node 'the Cast' (Cast)")
    turned = [node("Transpose", "v", "w", perm=[1, 0]), node("MatMul", "x w")]
    rows = numbers(3, 36)
    check(graph(turned, {"v": numbers(4, 36)}, ("N", 36)), rows, "Linear")


W = {"w": numbers(1, 2, 3, 2, seed=1)}


def transposed(**attributes):
    return graph([node("ConvTranspose", "x w", **attributes)], W)


def test_conv_transpose():
    check(transposed(), IMAGE, "ConvTranspose2d")
    check(transposed(kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 0]), IMAGE)
    # uneven padding, by output_padding or zeros in the filter
    check(transposed(strides=[2, 2], pads=[1, 1, 0, 0]), IMAGE)
    check(transposed(strides=[3, 3], pads=[1, 0, 2, 1], output_padding=[2, 1]), IMAGE)
    check(transposed(strides=[2, 2], pads=[0, 0, 1, 0]), IMAGE)
    check(transposed(pads=[1, 0, 0, 0]), IMAGE)
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        check(transposed(auto_pad=auto, strides=[2, 1]), IMAGE, "ConvTranspose2d")
    refuse(transposed(auto_pad="SAME_UPPER", strides=[4, 4]), "do not reach")
    refuse(transposed(pads=[0, 0, 9, 0]), "too uneven, 0 and 9")
    refuse(transposed(pads=[0, 0, 1, 0], dilations=[2, 1]), "too uneven, 0 and 1")
    # of six rows in steps of two
    for wanted in ([13, 13], [12, 12], [11, 10], [10, 11]):
        for auto in ("SAME_UPPER", "NOTSET"):
            own = {"output_shape": wanted, "auto_pad": auto, "strides": [2, 2]}
            if wanted[1] == 13:
                own |= {"output_padding": [0, 1]}
            check(transposed(**own), IMAGE, "ConvTranspose2d")
    check(transposed(output_shape=[12, 13], strides=[2, 2]), IMAGE)
    proto = transposed(output_shape=[8, 7])
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    refuse(proto, "which the file leaves open")
    refuse(transposed(kernel_shape=[3, 3]), "kernel_shape differs")
    refuse(transposed(group=2), "groups=2 does not divide")


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "strides": st.lists(st.integers(1, 3), min_size=2, max_size=2),
            "dilations": st.lists(st.integers(1, 3), min_size=2, max_size=2),
            "pads": st.lists(st.integers(0, 2), min_size=4, max_size=4),
            "output_padding": st.lists(st.integers(0, 2), min_size=2, max_size=2),
            "auto_pad": st.sampled_from(["NOTSET", "VALID", "SAME_UPPER"]),
            "output_shape": st.lists(st.integers(4, 20), min_size=2, max_size=2),
        },
    )
)
def test_conv_transpose_of_any_window(attributes):
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        attributes.pop("pads", None)
    equal_or_refused(transposed(**attributes), IMAGE)


def test_axes_from_the_end():
    relu, sigmoid = node("Relu", "x", "a"), node("Sigmoid", "x", "b")
    last, third = (node("Concat", "a b", axis=axis) for axis in (-1, -3))
    check(graph([relu, sigmoid, third]), IMAGE, "Concat")
    refuse(graph([relu, sigmoid, last]), "axis is -1 of 4")
    flat = [node("Flatten", "x", "a"), node("Flatten", "x", "b")]
    flat[1].name = "the other"
    check(graph([*flat, last], outputs=[value_info("y", "NF")]), IMAGE, "Concat")
    refuse(graph([*flat, third], outputs=[value_info("y", "NF")]), "axis is -3 of 2")
    number = {"inputs": [value_info("x", [])], "outputs": [value_info("y", [])]}
    refuse(graph([relu, sigmoid, third], **number), "axis is -3 of unknown many")


def test_branches_that_do_not_join():
    relu, sigmoid = node("Relu", "x", "a"), node("Sigmoid", "x", "b")
    check(graph([relu, sigmoid, node("Add", "a b")]), IMAGE, "Residual")
    check(graph([relu, sigmoid, node("Concat", "b a", axis=1)]), IMAGE, "Concat")
    check(graph([node("Concat", "x x x", axis=1)]), IMAGE, "Concat")
    refuse(graph([relu, sigmoid, node("Concat", "a b", axis=2)]), "axis is 2 of 4")
    # the second join takes what is behind the first
    crossed = [
        relu, sigmoid, node("Add", "a b", "c"), node("Concat", "c a", axis=1),
    ]  # fmt: skip
    refuse(graph(crossed), "branches of chains that one Add or Concat joins")
    refuse(graph([relu, sigmoid, node("Concat", "a b x", "c", axis=1), node(
        "Relu", "b")]), "chains")  # fmt: skip
    refuse(graph([node("Concat", "x", axis=1)]), "chains")
    refuse(graph([relu, node("Concat", "a c", axis=1)], {"c": IMAGE[:1]}), "chains")
    pool = node("MaxPool", "x", "a", kernel_shape=[2, 2])
    refuse(graph([pool, node("Add", "a x")]), "shape of body")


def test_a_loaded_residual_network_learns():
    model = MODELS["ResNet"]().to("cpu")
    labels = np.array([0, 1, 2, 0], np.int32)
    x = numbers(4, 2, 6, 8)
    losses, loss = [], nn.NLLLoss()
    optimizer = cycnn.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        losses.append(float(loss(model(x), labels)))
        model.backward(loss.backward(), input_grad=False)
        optimizer.step()
    assert losses[-1] < losses[0]
