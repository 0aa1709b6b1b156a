"""Residual blocks, joined branches and padding: operations, layers, training."""

import copy
import pickle

import numpy as np
import pytest
from cycnn.tensor import Tensor
from test_fuse import calls, on_the_cpu  # noqa: F401
from test_ops_reference import normal, slope
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

PARTS = {
    "channels": [(2, 3, 4, 5), (2, 1, 4, 5), (2, 2, 4, 5)],
    "one part": [(2, 3, 4, 5)],
    "features": [(3, 1), (3, 7)],
    "empty batch": [(0, 2, 3, 3), (0, 1, 3, 3)],
    "odd": [(1, 33, 1, 31), (1, 257, 1, 31)],
}
PADS = {
    "none": ((2, 3, 4, 5), (0, 0, 0, 0)),
    "all sides": ((2, 3, 4, 5), (2, 2, 2, 2)),
    "each its own": ((1, 2, 3, 1), (1, 2, 3, 4)),
    "one side": ((3, 1, 33, 31), (0, 5, 0, 0)),
    "of nothing": ((0, 2, 3, 3), (1, 1, 1, 1)),
}


def floats(*shape, seed=0):
    return normal(*shape, seed=seed).astype(np.float32)


def on_cpu(array):
    return Tensor(array, "cpu")


# operations


@pytest.mark.parametrize("case", PARTS)
def test_concat(case):
    shapes = PARTS[case]
    arrays = [floats(*shape, seed=i) for i, shape in enumerate(shapes)]
    y = cpu.concat_forward([on_cpu(array) for array in arrays])
    want = np.concatenate(arrays, axis=1)
    np.testing.assert_array_equal(y.numpy(), want)
    np.testing.assert_array_equal(reference.concat_forward(arrays), want)
    channels = [shape[1] for shape in shapes]
    for made in (
        cpu.concat_backward(y, channels),
        reference.concat_backward(want, channels),
    ):
        for part, array in zip(made, arrays):
            np.testing.assert_array_equal(np.asarray(part), array)


@pytest.mark.parametrize("case", PADS)
def test_zero_pad2d(case):
    shape, padding = PADS[case]
    x = floats(*shape)
    y = cpu.zero_pad2d_forward(on_cpu(x), padding)
    left, right, top, bottom = padding
    want = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    np.testing.assert_array_equal(y.numpy(), want)
    np.testing.assert_array_equal(reference.zero_pad2d_forward(x, padding), want)
    dy = floats(*want.shape, seed=1)
    dx = cpu.zero_pad2d_backward(on_cpu(dy), padding)
    np.testing.assert_array_equal(
        dx.numpy(), reference.zero_pad2d_backward(dy, padding), strict=False
    )


def test_add_relu():
    x, y = floats(2, 3, 257), floats(2, 3, 257, seed=1)
    x[0, 0, :3], y[0, 0, :3] = (np.nan, -1, 0.5), (1, 1, -0.5)
    want = np.empty_like(x)
    reference.add_relu(x, y, want)
    a, b, out = on_cpu(x), on_cpu(y), on_cpu(np.full_like(x, 7))
    cpu.add_relu(a, b, out)
    np.testing.assert_array_equal(out.numpy(), want)
    relu = cpu.relu_forward(on_cpu(x + y)).numpy()
    np.testing.assert_array_equal(out.numpy().view(np.int32), relu.view(np.int32))
    cpu.add_relu(a, b, a)
    np.testing.assert_array_equal(a.numpy(), want)
    with pytest.raises(ShapeError, match="y has shape"):
        cpu.add_relu(a, on_cpu(floats(2, 3)), out)


def test_reference_gradients():
    x, dy = normal(2, 2, 3, 2), normal(2, 2, 6, 5, seed=1)
    padding = (1, 2, 2, 1)
    expected = slope(lambda: reference.zero_pad2d_forward(x, padding), x, dy)
    np.testing.assert_allclose(
        reference.zero_pad2d_backward(dy, padding), expected, atol=1e-8
    )
    parts, dy = [normal(2, 1, 2), normal(2, 3, 2)], normal(2, 4, 2, seed=2)
    made = reference.concat_backward(dy, [1, 3])
    for part, dpart in zip(parts, made):
        expected = slope(lambda: reference.concat_forward(parts), part, dy)
        np.testing.assert_allclose(dpart, expected, atol=1e-8)


def test_refused_shapes():
    a, b = on_cpu(floats(2, 3, 4, 4)), on_cpu(floats(2, 3, 4, 5))
    with pytest.raises(ShapeError, match=r"\(2, 3, 4, 4\) and part 1 \(2, 3, 4, 5\)"):
        cpu.concat_forward([a, b])
    with pytest.raises(ShapeError, match="expected 4 channels"):
        cpu.concat_backward(a, [1, 3])
    with pytest.raises(ShapeError, match="padding is"):
        cpu.zero_pad2d_forward(a, (0, 0, -1, 0))
    with pytest.raises(ShapeError, match="too small for a padding"):
        cpu.zero_pad2d_backward(a, (2, 3, 0, 0))


# layers


def residual():
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)
    )
    return nn.Residual(body, nn.Conv2d(3, 5, 1))


def identity():
    return nn.Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))


def concat():
    return nn.Concat(
        nn.Sequential(),
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(3, 2, 2), nn.ReLU()),
    )


BLOCKS = {"residual": residual, "identity": identity, "concat": concat}


def by_hand(block, x):
    """The block's output and backward, put together from layers alone."""
    if isinstance(block, nn.Concat):
        made = [branch(x) for branch in block]
        y = np.concatenate([part.numpy() for part in made], axis=1)

        def backward(dy):
            cuts = np.cumsum([part.shape[1] for part in made])[:-1]
            pieces = np.split(dy, cuts, axis=1)
            return sum(
                np.asarray(branch.backward(np.ascontiguousarray(piece)))
                for branch, piece in zip(block, pieces)
            )

        return y, backward
    body, shortcut = block.body, block.shortcut
    other = x if shortcut is None else shortcut(x)
    y = body(x).numpy() + other.numpy()

    def backward(dy):
        more = dy if shortcut is None else shortcut.backward(dy).numpy()
        return body.backward(dy).numpy() + more

    return y, backward


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_their_layers_put_together(block, n):
    cycnn.manual_seed(1)
    block = BLOCKS[block]().to("cpu")
    x = on_cpu(floats(n, 3, 7, 5))
    want, backward = by_hand(block, x)
    dy = floats(*want.shape, seed=1)
    dx_want = backward(dy)
    grads = [p.grad.numpy() for p in block.parameters()]

    given = on_cpu(dy.copy())
    for accumulate in False, True:
        np.testing.assert_array_equal(block(x).numpy(), want)
        dx = block.backward(given, accumulate=accumulate)
        np.testing.assert_allclose(dx.numpy(), dx_want, rtol=1e-6, atol=1e-6)
        for p, grad in zip(block.parameters(), grads):
            np.testing.assert_allclose(
                p.grad.numpy(), grad * (1 + accumulate), rtol=1e-5, atol=1e-6
            )
    np.testing.assert_array_equal(given.numpy(), dy)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        block.backward(given)
    block(x)
    assert block.backward(given, input_grad=False) is None
    np.testing.assert_array_equal(block.predict(x).numpy(), want)


def test_the_input_may_come_back_as_it_is():
    """dy and x belong to the caller, whatever the branches pass on."""
    x, dy = on_cpu(floats(2, 3)), on_cpu(floats(2, 3, seed=1))
    for block, factor in (
        (nn.Residual(nn.Sequential(), nn.Sequential()), 2),
        (nn.Residual(nn.Flatten()), 2),
    ):
        before = x.numpy(), dy.numpy()
        np.testing.assert_array_equal(block(x).numpy(), factor * x.numpy())
        np.testing.assert_array_equal(block.backward(dy).numpy(), factor * dy.numpy())
        np.testing.assert_array_equal(x.numpy(), before[0])
        np.testing.assert_array_equal(dy.numpy(), before[1])
    block = nn.Concat(*(nn.Sequential() for _ in range(3)))
    y = block(x).numpy()
    np.testing.assert_array_equal(y, np.tile(x.numpy(), 3))
    dx = block.backward(on_cpu(y)).numpy()
    np.testing.assert_allclose(dx, 3 * x.numpy(), rtol=1e-6)


def network():
    """Blocks in blocks, behind a first convolution."""
    inner = nn.Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Residual(
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), inner),
            nn.Sequential(nn.Conv2d(4, 8, 1)),
        ),
        nn.ReLU(),
        nn.Concat(nn.Sequential(), nn.Sequential(nn.Conv2d(8, 4, 1), nn.Sigmoid())),
        nn.ZeroPad2d((1, 0, 0, 1)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 9, CLASSES),
        nn.LogSoftmax(),
    )


def test_names_and_files(tmp_path):
    cycnn.manual_seed(2)
    model = network().to("cpu")
    assert list(model.state_dict()) == [
        f"{name}.{kind}"
        for name in ["0", "2.body.0", "2.body.2.body.0", "2.shortcut.0", "4.1.0", "8"]
        for kind in ("weight", "bias")
    ]
    x = floats(2, 1, 6, 6)
    want = model(x).numpy()
    model.save(tmp_path / "m.safetensors")
    other = network().to("cpu")
    assert not np.array_equal(other(x).numpy(), want)
    other.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(other(x).numpy(), want)
    for made in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        np.testing.assert_array_equal(made(x).numpy(), want)
    chained = list(network())
    last = chained[0]
    for layer in chained[1:]:
        last = last.connect(layer)
    joined = nn.Sequential.from_connected(chained[0]).to("cpu")
    joined.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(joined(x).numpy(), want)


def test_modes_and_text():
    model = network()
    model.eval()
    assert not any(layer.training for _, layer in model._descendants())
    model.train()
    assert all(layer.training for _, layer in model._descendants())
    text = repr(model)
    assert "(2): Residual(\n    (body): Sequential(" in text
    assert "(shortcut): Sequential(" in text
    assert "(4): Concat(\n    (0): Sequential(" in text
    assert "(5): ZeroPad2d((1, 0, 0, 1))" in text
    assert repr(nn.ZeroPad2d(3)) == "ZeroPad2d(3)"


def test_what_is_refused():
    conv = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="body and shortcut are the same object"):
        nn.Residual(conv, conv)
    with pytest.raises(TypeError, match="body is the class ReLU"):
        nn.Residual(nn.ReLU)
    with pytest.raises(TypeError, match="shortcut is 3"):
        nn.Residual(nn.ReLU(), 3)
    with pytest.raises(TypeError, match="one branch or more"):
        nn.Concat()
    with pytest.raises(TypeError, match="one by one"):
        nn.Concat([nn.ReLU(), nn.ReLU()])
    x = floats(2, 3, 5, 5)
    with pytest.raises(
        ShapeError, match=r"body gives \(2, 3, 3, 3\).*\(2, 3, 5, 5\).*shortcut"
    ):
        nn.Residual(conv).to("cpu")(x)
    with pytest.raises(
        ShapeError, match=r"body gives \(2, 3, 3, 3\) and the shortcut "
    ):
        nn.Residual(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 1)).to("cpu")(x)
    with pytest.raises(ShapeError, match="Concat, for an input"):
        nn.Concat(nn.Conv2d(3, 3, 3), nn.Sequential()).to("cpu")(x)
    for padding in (1, 2), "a", 1.5:
        with pytest.raises(ShapeError, match="four of them"):
            nn.ZeroPad2d(padding)
    with pytest.raises(ShapeError, match="0 or more"):
        nn.ZeroPad2d(-1)


# fused and trained


def test_runs_inside_of_blocks_are_fused(calls):  # noqa: F811
    cycnn.manual_seed(3)
    model = network()
    fused = nn.fuse(model)
    runs = fused.runs()
    assert [len(run.parts) for run in runs] == [2, 2, 2, 1, 1, 1]
    assert fused.parameters() == model.parameters()
    kinds = [type(layer).__name__ for layer in fused]
    assert kinds[:3] == ["FusedConv2d", "FusedResidual", "FusedConcat"]
    assert "+ ReLU()" in repr(fused[1])
    x, labels = floats(3, 1, 6, 6), np.array([0, 1, 2], np.int32)
    found = []
    for layer in model, fused:
        loss = nn.NLLLoss()
        scores = layer(x)
        loss(scores, labels)
        dx = layer.backward(loss.backward())
        found.append([scores, dx, *(p.grad for p in model.parameters())])
        found[-1] = [each.numpy() for each in found[-1]]
        for p in model.parameters():
            p.grad.fill_(np.nan)
    for mine, theirs in zip(*found):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_block_alone_is_fused_too():
    for make in BLOCKS.values():
        block = make()
        fused = nn.fuse(block)
        x = floats(2, 3, 7, 5)
        np.testing.assert_array_equal(fused(x).numpy(), block(x).numpy())
        assert fused.runs()


def trained(capture, fuse):
    cycnn.manual_seed(4)
    model = network().to("cpu")
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture, fuse=fuse)
    history = trainer.fit(patterns(70), epochs=2, batch_size=16, seed=1)
    return trainer, digest(trainer), figures(history)


def test_a_recorded_step_trains_as_an_eager_one():
    _, *eager = trained(capture=False, fuse=False)
    for capture, fuse in (True, False), (True, True):
        _, *found = trained(capture, fuse)
        assert found == eager


def test_training_with_fused_blocks_learns_the_same(calls):  # noqa: F811
    plain, *_ = trained(capture=False, fuse=False)
    fused, *_ = trained(capture=True, fuse=True)
    for name, value in plain.model.state_dict().items():
        np.testing.assert_allclose(
            fused.model.state_dict()[name], value, rtol=1e-3, atol=1e-4
        )


# beside PyTorch


def test_blocks_beside_torch():
    torch = pytest.importorskip("torch")
    cycnn.manual_seed(5)
    block = residual().to("cpu")
    layers = torch.nn.ModuleDict(
        {
            "body": torch.nn.Sequential(
                torch.nn.Conv2d(3, 6, 3, padding=1),
                torch.nn.ReLU(),
                torch.nn.Conv2d(6, 5, 3, padding=1),
            ),
            "shortcut": torch.nn.Conv2d(3, 5, 1),
        }
    )
    layers.load_state_dict(
        {k: torch.from_numpy(v) for k, v in block.state_dict().items()}
    )
    x = floats(2, 3, 8, 6)
    theirs = torch.from_numpy(x).requires_grad_()
    padded = torch.nn.ZeroPad2d((1, 2, 3, 0))(theirs)
    y = layers["body"](padded) + layers["shortcut"](padded)
    y = torch.cat([y, padded], 1)
    ours = nn.Sequential(nn.ZeroPad2d((1, 2, 3, 0)), nn.Concat(block, nn.Sequential()))
    found = ours(x)
    np.testing.assert_allclose(found.numpy(), y.detach().numpy(), atol=1e-5)
    dy = floats(*found.shape, seed=1)
    y.backward(torch.from_numpy(dy))
    dx = ours.backward(dy)
    np.testing.assert_allclose(dx.numpy(), theirs.grad.numpy(), atol=1e-5)
    for name, parameter in block.named_parameters():
        grad = layers.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(parameter.grad.numpy(), grad, atol=1e-4)
