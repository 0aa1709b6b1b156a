"""Sequential: wiring, one slab, names, connect, and weights in files."""

import copy
import os
import pickle

import numpy as np
import pytest

import cycnn
from cycnn import devices, nn
from cycnn.errors import DataError, ShapeError
from cycnn.tensor import Tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def small():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.LogSoftmax(),
    )


@pytest.fixture
def x():
    return np.random.default_rng(2).standard_normal((5, 1, 6, 6), dtype=np.float32)


def test_forward_and_backward_are_those_of_the_layers(x):
    model = small()
    y = expected = Tensor(x)
    for layer in model:
        expected = layer(expected)
    dy = np.random.default_rng(3).standard_normal(expected.shape)
    gradient = dy
    for layer in reversed(list(model)):
        gradient = layer.backward(gradient)
    by_hand = [p.grad.numpy() for p in model.parameters()]

    y = model(x)
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    np.testing.assert_array_equal(model.backward(dy).numpy(), gradient.numpy())
    for parameter, expected in zip(model.parameters(), by_hand):
        assert expected.any()
        np.testing.assert_array_equal(parameter.grad.numpy(), expected)
        parameter.grad.fill_(0)
    model(x)
    assert model.backward(dy, input_grad=False) is None
    for parameter, expected in zip(model.parameters(), by_hand):
        np.testing.assert_array_equal(parameter.grad.numpy(), expected)


def test_layers_before_the_first_parameter_are_left_out():
    inner = nn.Sequential(nn.ReLU(), nn.Flatten())
    model = nn.Sequential(inner, nn.Linear(4, 2))
    model(np.ones((3, 2, 2)))
    assert model.backward(np.ones((3, 2)), input_grad=False) is None
    assert model[1].weight.grad.numpy().tolist() == [[3] * 4] * 2
    # and hold nothing from the forward any more
    with pytest.raises(RuntimeError, match="backward without a forward"):
        inner.backward(np.ones((3, 4)))


def test_without_parameters_and_without_layers():
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    model(np.ones((2, 3, 1)))
    assert model.backward(np.ones((2, 3)), input_grad=False) is None
    model(np.ones((2, 3, 1)))
    assert model.backward(np.ones((2, 3))).numpy().tolist() == [[[1]] * 3] * 2
    assert model.parameters() == [] and model.state_dict() == {}
    assert nn.Sequential()(np.ones((1, 2))).shape == (1, 2)


def test_accumulate_reaches_every_layer(x):
    model = small()
    dy = np.ones(model(x).shape)
    model.backward(dy)
    once = [p.grad.numpy() for p in model.parameters()]
    model(x)
    model.backward(dy, accumulate=True)
    for parameter, expected in zip(model.parameters(), once):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_batch_of_any_size(n):
    model = small()
    assert model(np.zeros((n, 1, 6, 6))).shape == (n, 4)
    assert model.backward(np.zeros((n, 4))).shape == (n, 1, 6, 6)


# names and memory


def test_reference_network():
    model = nn.reference_network()
    shapes = {name: array.shape for name, array in model.state_dict().items()}
    assert list(shapes.items()) == [
        ("0.weight", (32, 1, 5, 5)),
        ("0.bias", (32,)),
        ("3.weight", (64, 32, 5, 5)),
        ("3.bias", (64,)),
        ("6.weight", (128, 64, 3, 3)),
        ("6.bias", (128,)),
        ("9.weight", (128, 512)),
        ("9.bias", (128,)),
        ("11.weight", (10, 128)),
        ("11.bias", (10,)),
    ]
    assert sum(p.size for p in model.parameters()) == 192_906
    log_probs = model(np.random.default_rng(1).random((2, 1, 28, 28))).numpy()
    assert log_probs.shape == (2, 10)
    np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, rtol=1e-5)
    assert nn.reference_network(7)(np.zeros((1, 1, 28, 28))).shape == (1, 7)
    faithful = nn.reference_network(relu_on_logits=True)
    assert isinstance(faithful[12], nn.ReLU) and len(faithful) == 14


def test_all_parameters_lie_in_one_slab():
    model = small()
    parameters = model.parameters()
    slab = parameters[0].slab
    assert [p.offset for p in parameters] == [0, 64, 128, 192]
    assert all(p.slab is slab for p in parameters)
    assert slab.data.shape == slab.grad.shape == (256,)
    flat = np.zeros(256, np.float32)
    for parameter in parameters:
        end = parameter.offset + parameter.size
        flat[parameter.offset : end] = parameter.data.numpy().ravel()
    np.testing.assert_array_equal(slab.data.numpy(), flat)
    assert [p.name for p in parameters] == ["0.weight", "0.bias", "4.weight", "4.bias"]


def test_nesting_packs_at_the_outermost():
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    weights = {"0." + k: v for k, v in features.state_dict().items()}
    weights.update({"1." + k: v for k, v in head.state_dict().items()})
    model = nn.Sequential(features, head)
    assert list(model.state_dict()) == [
        "0.0.weight",
        "0.0.bias",
        "1.1.weight",
        "1.1.bias",
    ]
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights[name])
    assert len({id(p.slab) for p in model.parameters()}) == 1
    x = np.ones((2, 1, 6, 6))
    np.testing.assert_array_equal(model(x).numpy(), head(features(x)).numpy())
    assert repr(model).splitlines()[2] == (
        "    (0): Conv2d(1, 2, kernel_size=(3, 3), 20 parameters)"
    )


def test_wrapping_or_slicing_does_not_move_parameters():
    model = small()
    slab, places = model[0].weight.slab, [p.data.ptr for p in model.parameters()]
    part = model[3:]
    assert isinstance(part, nn.Sequential) and len(part) == 3
    assert part[1] is model[4]
    nn.Sequential(*model)
    nn.Sequential(model, nn.ReLU())
    assert [p.data.ptr for p in model.parameters()] == places
    assert slab.departures == 0
    # another order is another layout
    nn.Sequential(nn.Sequential(model[4]), model[0])
    assert [p.offset for p in model.parameters()] == [64 * 2, 64 * 3, 0, 64]
    assert slab.departures == 4


def test_packing_keeps_values_and_gradients():
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    first.weight.grad.copy_(np.arange(6.0).reshape(3, 2))
    weights = first.weight.data.numpy()
    nn.Sequential(first, second)
    assert first.weight.slab is second.weight.slab
    np.testing.assert_array_equal(first.weight.data.numpy(), weights)
    assert first.weight.grad.numpy().ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_no_list_of_layers_is_refused():
    for arguments, message in [
        ([[nn.ReLU()]], r"Sequential\(\*layers\)"),
        ([nn.ReLU], r"write ReLU\(...\)"),
        ([nn.ReLU(), np.tanh], "layer 1 is .*tanh"),
    ]:
        with pytest.raises(TypeError, match=message):
            nn.Sequential(*arguments)


def test_layers_and_parameters_have_one_place():
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="layers 0 and 2.0 are the same object"):
        nn.Sequential(relu, nn.Linear(2, 2), nn.Sequential(relu))
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(
        ValueError, match="0.weight and 1.weight are the same Parameter"
    ):
        nn.Sequential(first, second)


def test_repr_and_indexing():
    model = small()
    assert repr(model) == (
        "Sequential(\n"
        "  (0): Conv2d(1, 3, kernel_size=(3, 3), 30 parameters)\n"
        "  (1): ReLU()\n"
        "  (2): MaxPool2d(kernel_size=(2, 2))\n"
        "  (3): Flatten()\n"
        "  (4): Linear(12, 4, 52 parameters)\n"
        "  (5): LogSoftmax(dim=1)\n"
        ")  # 82 parameters on cpu"
    )
    assert len(model) == 6 and model[-1] is list(model)[5]


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_models_of_their_own(make_copy, x):
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), nn.Sigmoid())
    model[0].connect(model[1])
    before = model(x).numpy()
    model.backward(np.ones((5, 3)))
    model(x)
    made = make_copy(model)
    slab = made[0][1].weight.slab
    assert slab is not model[0][1].weight.slab
    for parameter, source in zip(made.parameters(), model.parameters()):
        assert parameter.slab is slab
        assert parameter.data.ptr == slab.data.ptr + 4 * parameter.offset
        np.testing.assert_array_equal(parameter.grad.numpy(), source.grad.numpy())
    with pytest.raises(RuntimeError, match="backward without a forward"):
        made.backward(np.ones((5, 3)))
    np.testing.assert_array_equal(made(x).numpy(), before)
    slab.data.fill_(0)
    assert (made(x).numpy() == 0.5).all()
    np.testing.assert_array_equal(model(x).numpy(), before)


# connect


def test_connected_layers_become_a_sequential(x):
    layers = list(small())
    end = layers[0]
    for layer in layers[1:]:
        assert end.connect(layer) is layer
        end = layer
    model = nn.Sequential.from_connected(layers[0])
    assert list(model) == layers
    assert model(x).shape == (5, 4)
    alone = nn.ReLU()
    assert list(nn.Sequential.from_connected(alone)) == [alone]


def test_chains_that_are_no_chains_are_refused():
    a, b, c, d = nn.Linear(2, 2), nn.ReLU(), nn.Sigmoid(), nn.Flatten()
    a.connect(b).connect(c)
    with pytest.raises(ValueError, match="would close a ring"):
        c.connect(a)
    with pytest.raises(ValueError, match="would close a ring"):
        d.connect(d)
    with pytest.raises(ValueError, match=r"Sigmoid\(\) follows ReLU\(\) already"):
        d.connect(c)
    with pytest.raises(ValueError, match=r"followed by Sigmoid\(\) already"):
        b.connect(d)
    with pytest.raises(ValueError, match="begin with the chain's first"):
        nn.Sequential.from_connected(b)
    with pytest.raises(TypeError, match="only a layer"):
        c.connect(np.tanh)
    with pytest.raises(TypeError, match="first layer"):
        nn.Sequential.from_connected([a, b])
    # saying the same again is no mistake, and the refused calls changed nothing
    assert a.connect(b) is b
    assert list(nn.Sequential.from_connected(a)) == [a, b, c]


# weights


def test_state_dict_holds_copies():
    model = small()
    state = model.state_dict()
    assert all(array.dtype == np.float32 for array in state.values())
    state["0.bias"][:] = 7
    assert not (model[0].bias.data.numpy() == 7).any()


def test_load_state_dict():
    cycnn.manual_seed(1)
    source, model = small(), small()
    places = [p.data.ptr for p in model.parameters()]
    state = source.state_dict()
    state["0.bias"] = Tensor(state["0.bias"])
    state["4.bias"] = state["4.bias"].astype(np.float64)
    model.load_state_dict(state)
    for name, array in source.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], array)
    assert [p.data.ptr for p in model.parameters()] == places


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: s.pop("4.bias"), ValueError, "parameter 4.bias is missing"),
        (lambda s: s.update(extra=0), ValueError, "no parameter extra"),
        (
            lambda s: s.update({"4.bias": np.zeros(5)}),
            ShapeError,
            r"4.bias has shape \(4,\), given is \(5,\)",
        ),
        (
            lambda s: s.update({"4.bias": np.zeros(4, int)}),
            TypeError,
            "4.bias is float32, given is int64",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, error, message):
    model = small()
    before = model.state_dict()
    state = {name: array + 1 for name, array in before.items()}
    change(state)
    with pytest.raises(error, match=message):
        model.load_state_dict(state)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_save_and_load(tmp_path, x):
    model, other = small(), small()
    path = tmp_path / "weights.safetensors"
    model.save(path)
    other.load(str(path))
    np.testing.assert_array_equal(other(x).numpy(), model(x).numpy())
    # over a file that is there
    nn.Sequential(nn.Linear(1, 1)).save(path)
    with pytest.raises(
        ValueError, match="weights.safetensors: parameter 4.weight is m"
    ):
        model.load(path)
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_files_are_what_others_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = small()
    model.save(tmp_path / "ours")
    for name, array in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, model.state_dict()[name])
    theirs = {k: (v * 2).astype(np.float16) for k, v in model.state_dict().items()}
    save_file(theirs, tmp_path / "theirs")
    model.load(tmp_path / "theirs")
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, theirs[name].astype(np.float32))


def test_damaged_files_are_refused_and_change_nothing(tmp_path):
    model = small()
    before = model.state_dict()
    good = tmp_path / "good"
    model.save(good)
    content = good.read_bytes()
    bad = tmp_path / "bad"
    for damaged in [
        b"",
        b"\x00" * 64,
        content[:100],
        content[:-1],
        content + b"\x00",
        b"\xff" * 8 + content[8:],
        content.replace(b"F32", b"F99", 1),
    ]:
        bad.write_bytes(damaged)
        with pytest.raises(DataError, match="bad is damaged or is no safetensors"):
            model.load(bad)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(FileNotFoundError, match="absent"):
        model.load(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        model.load(tmp_path)


def test_numbers_that_numpy_does_not_have_are_named(tmp_path):
    path = tmp_path / "bf16"
    header = b'{"weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f")
    with pytest.raises(TypeError, match="weight holds BF16"):
        nn.Linear(1, 1, bias=False).load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = small()
    path = tmp_path / "weights"
    model.save(path)
    content = path.read_bytes()
    model[0].weight.data.fill_(1)

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        model.save(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["weights"]
