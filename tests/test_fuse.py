"""Fused layers: what is replaced, and that the wiring computes the same.

The kernels need a GPU. Here their contract is met by the unfused operations, so that the
layers which call them can be tested.
"""

from typing import NamedTuple

import numpy as np
import pytest
from training import digest, figures, make_trainer, patterns

import cycnn
from cycnn import nn, optim
from cycnn.nn.fuse import FusedConvPair, FusedLinear, FusedSequential
from cycnn.ops import cpu, fused


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(cycnn.devices, "_default", cycnn.devices.CPU)


def positions_of(code, pool, x_shape):
    """What maxpool2d_backward takes, from the byte of a fused block."""
    index = np.maximum(code.astype(np.int32) - 1, 0)
    p, q = np.indices(code.shape[2:])
    rows = p * pool[0] + index // pool[1]
    return rows * x_shape[3] + q * pool[1] + index % pool[1]


def conv_block_forward(x, weight, bias, relu, pool, stride, padding, packed=None):
    if isinstance(x, fused.Gather):
        x = written(x)
    if packed is not None:
        weight = packed.data
    z = cpu.conv2d_forward(x, weight, bias, stride, padding)
    if relu:
        z = cpu.relu_forward(z)
    if pool is None:
        return z, None
    y, positions = cpu.maxpool2d_forward(z, pool, pool)
    p, q = np.indices(y.shape[2:])
    row, column = np.divmod(positions.array, z.shape[3])
    code = 1 + (row - p * pool[0]) * pool[1] + (column - q * pool[1])
    if relu:
        code = np.where(y.array > 0, code, 0)
    return y, cycnn.Tensor(code.astype(np.uint8), "cpu")


def conv_block_backward(
    dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx
):
    if pool is not None:
        z_shape = cpu.conv2d_forward(x, weight, None, stride, padding).shape
        masked = cycnn.Tensor(np.where(code.array > 0, dy.array, 0), "cpu")
        positions = cycnn.Tensor(positions_of(code.array, pool, z_shape), "cpu")
        dy = cpu.maxpool2d_backward(masked, positions, z_shape, pool, pool)
    elif relu:
        dy = cpu.relu_backward(dy, y)
    return cpu.conv2d_backward(
        dy, x, weight, dweight, dbias, stride, padding, need_dx=need_dx
    )


def written(gather):
    """The batch, which a kernel writes where it is told to."""
    gather.x.copy_(gather.made())
    return gather.x


def conv_pair_forward(x, first, second, packed=None):
    y1, code1 = conv_block_forward(x, *first)
    return y1, code1, *conv_block_forward(y1, *second, packed)


class PackedFilter:
    """A copy, which a kernel uses in place of the filter: it shows if it is old."""

    def __init__(self, weight):
        self.weight, self.data = weight, cycnn.zeros(weight.shape, device="cpu")
        self.refresh()

    def refresh(self):
        self.data.copy_(self.weight)


def pack_filter(weight, x_shape, pool, stride, padding):
    return PackedFilter(weight) if weight.shape[1] > 1 else None


def pack_pair_filter(x_shape, first, second, gather):
    return PackedFilter(second.weight)


class Partials(NamedTuple):
    weight: object
    bias: object


def in_parts(backward, weight, need_dx):
    """A backward whose weight gradients come as two parts."""
    shapes = weight.shape, weight.shape[:1]
    dweight, dbias = (cycnn.zeros(shape, device="cpu") for shape in shapes)
    dx = backward(dweight, dbias, need_dx)
    parts = [np.stack([g.array / 4, g.array * 3 / 4]) for g in (dweight, dbias)]
    return dx, Partials(*(cycnn.Tensor(part, "cpu") for part in parts))


def conv_block_backward_partials(
    dy, y, code, x, weight, relu, pool, stride, padding, need_dx
):
    def backward(dweight, dbias, need_dx):
        return conv_block_backward(
            dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx
        )

    return in_parts(backward, weight, need_dx)


def linear_block_backward_partials(dy, y, x, weight, relu, need_dx):
    def backward(dweight, dbias, need_dx):
        return linear_block_backward(dy, y, x, weight, dweight, dbias, relu, need_dx)

    return in_parts(backward, weight, need_dx)


def head_backward_partials(dlogits, x, weight, need_dx):
    return linear_block_backward_partials(dlogits, None, x, weight, False, need_dx)


class Updater:
    """Adds the parts up, then updates as the CPU does."""

    def __init__(self, parameters, device):
        self.parameters = parameters

    def plan(self, entries):
        assert len(entries) == self.parameters
        self.entries = entries

    def upload(self):
        pass

    def _update(self, rule, params, grads, *rest):
        for offset, parts, _ in self.entries:
            total = parts.array.sum(0, dtype=np.float32).reshape(-1)
            grads.array[offset : offset + total.size] = total
        rule(params, grads, *rest)
        for offset, _, packed in self.entries:
            if packed is not None:
                room = packed.data.array.reshape(-1)
                room[...] = params.array[offset : offset + room.size]

    def rmsprop(self, *given):
        self._update(cpu.rmsprop_step, *given)

    def sgd(self, *given):
        self._update(cpu.sgd_step, *given)


def linear_block_forward(x, weight, bias, relu):
    y = cpu.linear_forward(x, weight, bias)
    return cpu.relu_forward(y) if relu else y


def linear_block_backward(dy, y, x, weight, dweight, dbias, relu, need_dx):
    dy = cpu.relu_backward(dy, y) if relu else dy
    return cpu.linear_backward(dy, x, weight, dweight, dbias, need_dx)


def head_forward(x, weight, bias, labels):
    loss, log_probs = cpu.cross_entropy_forward(
        cpu.linear_forward(x, weight, bias), labels
    )
    return log_probs, loss, cpu.cross_entropy_backward(log_probs, labels)


def tail_forward(x, weight, bias, relu, weight_out, bias_out, labels, settled=False):
    hidden = linear_block_forward(x, weight, bias, relu)
    log_probs, _, dlogits = head_forward(hidden, weight_out, bias_out, labels)
    losses = -log_probs.array[np.arange(len(labels)), labels.array]
    return hidden, log_probs, cycnn.Tensor(losses, "cpu"), dlogits


def conv_tail_forward(x, block, tail, labels, packed=None, settled=False):
    y, _ = conv_block_forward(x, *block, packed)
    flat = y.reshape(y.shape[0], tail.weight.shape[1])
    return y, *tail_forward(flat, *tail, labels)


def pack_conv_tail_filter(x_shape, block):
    return PackedFilter(block.weight)


def head_backward(dlogits, x, weight, dweight, dbias, need_dx):
    return cpu.linear_backward(dlogits, x, weight, dweight, dbias, need_dx)


def tail_backward(
    dlogits, hidden, x, weight, weight_out, dweight, dbias, dweight_out, dbias_out,
    need_dx, x_settled=True,
):  # fmt: skip
    dy = head_backward(dlogits, hidden, weight_out, dweight_out, dbias_out, True)
    return linear_block_backward(dy, hidden, x, weight, dweight, dbias, True, need_dx)


def tail_backward_partials(
    dlogits, hidden, x, weight, weight_out, need_dx, x_settled=True
):
    dy, made_out = head_backward_partials(dlogits, hidden, weight_out, True)
    given = dy, hidden, x, weight, True, need_dx
    return *linear_block_backward_partials(*given), made_out


PAIR = True, (2, 2), (1, 1), (0, 0)  # relu, pool, stride, padding


def conv_pair_backward(
    dy, code2, y1, code1, x, weight2, dweight2, dbias2, dweight1, dbias1, settled
):
    weight1 = cycnn.zeros(dweight1.shape, device="cpu")
    given = dy, None, code2, y1, weight2, dweight2, dbias2, *PAIR, True
    dy = conv_block_backward(*given)
    conv_block_backward(dy, None, code1, x, weight1, dweight1, dbias1, *PAIR, False)


def conv_pair_backward_partials(dy, code2, y1, code1, x, weight2, settled):
    weight1 = cycnn.zeros((y1.shape[1], 1, 5, 5), device="cpu")
    given = dy, None, code2, y1, weight2, *PAIR, True
    dy, second = conv_block_backward_partials(*given)
    given = dy, None, code1, x, weight1, *PAIR, False
    return second, conv_block_backward_partials(*given)[1]


def conv_pair_backward_supported(device, x_shape, first, second):
    blocks = first, second
    return all(block[0][2:] == (5, 5) and block[1:] == PAIR[1:] for block in blocks)


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the kernels; the list of those that ran."""
    ran = []

    def stand_in(function):
        def run(*args):
            ran.append(function.__name__)
            if isinstance(args[0], fused.Gather):
                ran.append("gather")
            return function(*args)

        return run

    for function in (
        conv_block_forward,
        conv_block_backward,
        conv_pair_forward,
        pack_filter,
        pack_pair_filter,
        linear_block_forward,
        linear_block_backward,
        head_forward,
        tail_forward,
        head_backward,
        conv_block_backward_partials,
        linear_block_backward_partials,
        head_backward_partials,
        tail_backward,
        tail_backward_partials,
        conv_pair_backward,
        conv_pair_backward_partials,
        conv_tail_forward,
        pack_conv_tail_filter,
    ):
        monkeypatch.setattr(fused, function.__name__, stand_in(function))
    for name in ("conv_block", "conv_pair", "gather", "linear_block", "head", "tail"):
        monkeypatch.setattr(fused, f"{name}_supported", lambda *_: True)
    monkeypatch.setattr(fused, "tail_backward_supported", lambda *_: True)
    monkeypatch.setattr(
        fused, "conv_pair_backward_supported", conv_pair_backward_supported
    )
    monkeypatch.setattr(fused, "conv_tail_supported", lambda *_: False)
    monkeypatch.setattr(fused, "updater", Updater)
    return ran


@pytest.fixture
def conv_tail(calls, monkeypatch):
    """What goes into the kernels of a convolution and a tail in one, which are there."""
    asked = []

    def supported(device, precision, x_shape, block, tail):
        asked.append((x_shape, block, tail))
        return True

    monkeypatch.setattr(fused, "conv_tail_supported", supported)
    return asked


def kinds(model):
    return [type(layer).__name__ for layer in nn.fuse(model)]


def test_runs_that_are_replaced():
    assert kinds(nn.reference_network()) == [
        "FusedConvPair", "FusedConv2d", "Flatten", "FusedLinear", "FusedLinear",
        "LogSoftmax",
    ]  # fmt: skip
    layers = nn.fuse(nn.reference_network())
    assert [len(layer.parts) for layer in layers if hasattr(layer, "parts")] == [
        6, 2, 2, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "layers, expected",
    [
        ([nn.Conv2d(2, 2, 3, groups=2), nn.ReLU()], ["Conv2d", "ReLU"]),
        ([nn.Conv2d(2, 2, 3, dilation=2)], ["Conv2d"]),
        ([nn.Conv2d(2, 2, 3), nn.MaxPool2d(3, 2)], ["FusedConv2d", "MaxPool2d"]),
        ([nn.Conv2d(2, 2, 3), nn.MaxPool2d(2, padding=1)], ["FusedConv2d", "MaxPool2d"]),
        (
            [nn.Conv2d(2, 2, 3), nn.MaxPool2d(2, padding=(0, 0, 1, 1))],
            ["FusedConv2d", "MaxPool2d"],
        ),
        (
            [nn.Conv2d(2, 2, 3), nn.MaxPool2d(2, ceil_mode=True)],
            ["FusedConv2d", "MaxPool2d"],
        ),
        ([nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.ReLU()], ["FusedConv2d", "ReLU"]),
        ([nn.Conv2d(2, 2, 3), nn.Sigmoid()], ["FusedConv2d", "Sigmoid"]),
        ([nn.ReLU(), nn.Linear(2, 3)], ["ReLU", "FusedLinear"]),
        ([nn.Sequential(nn.Linear(2, 3)), nn.ReLU()], ["FusedLinear"]),
        ([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 3), nn.ReLU()], ["FusedConvPair"]),
        ([nn.Conv2d(4, 8, 3), nn.Conv2d(9, 2, 3)], ["FusedConv2d"] * 2),
        ([nn.Conv2d(5, 8, 3), nn.Conv2d(8, 2, 3)], ["FusedConv2d"] * 2),
        (
            [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)],
            ["FusedConvPair", "FusedConv2d"],
        ),
        ([], []),
    ],
)
def test_what_fits_is_replaced_and_the_rest_stays(layers, expected):
    assert kinds(nn.Sequential(*layers)) == expected


def test_classes_of_the_user_are_left_alone():
    class MyConv(nn.Conv2d):
        pass

    class MyModel(nn.Layer):
        pass

    assert kinds(nn.Sequential(MyConv(1, 1, 3), nn.ReLU())) == ["MyConv", "ReLU"]
    model = MyModel()
    assert nn.fuse(model) is model


def test_parameters_are_shared_and_keep_names_and_places():
    model = nn.reference_network()
    places = [p.data.ptr for p in model.parameters()]
    together = nn.fuse(model)
    assert isinstance(together, FusedSequential)
    assert together.parameters() == model.parameters()
    assert [n for n, _ in together.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    assert [p.data.ptr for p in model.parameters()] == places
    assert model.parameters()[0].name == "0.weight"


NETWORKS = {
    "reference": (nn.reference_network, (5, 1, 28, 28)),
    "odd": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.MaxPool2d((1, 2)),
            nn.Conv2d(4, 5, 1), nn.ReLU(),
            nn.Conv2d(5, 6, (2, 3)), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(6 * 6 * 2, 7, bias=False), nn.LogSoftmax(),
        ),
        (3, 3, 13, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "lacking", [(), ("conv_pair",), ("conv_block", "conv_pair", "linear_block")]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_and_backward_as_unfused(network, lacking, calls, monkeypatch):
    for name in lacking:
        monkeypatch.setattr(fused, f"{name}_supported", lambda *_: False)
    make, shape = NETWORKS[network]
    model = make()
    together = nn.fuse(model)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    expected = model(x)
    dy = rng.standard_normal(expected.shape, dtype=np.float32)
    dx = model.backward(dy).numpy()
    grads = [p.grad.numpy() for p in model.parameters()]
    for p in model.parameters():
        p.grad.fill_(np.nan)
    np.testing.assert_array_equal(together(x).numpy(), expected.numpy())
    np.testing.assert_array_equal(together.backward(dy).numpy(), dx)
    for p, grad in zip(model.parameters(), grads):
        np.testing.assert_array_equal(p.grad.numpy(), grad)
    together(x)
    assert together.backward(dy, input_grad=False, accumulate=True) is None
    for p, grad in zip(model.parameters(), grads):
        np.testing.assert_allclose(p.grad.numpy(), 2 * grad, rtol=1e-5, atol=1e-6)
    assert ("conv_pair_forward" in calls) == (not lacking)
    assert bool(calls) == (len(lacking) < 3)


@pytest.mark.parametrize("lacking", [None, "conv_pair", "gather", "conv_block"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_batch_is_made_by_whoever_can(lacking, dtype, calls, monkeypatch):
    if lacking:
        monkeypatch.setattr(fused, f"{lacking}_supported", lambda *_: False)
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (9, 1, 28, 28)).astype(dtype)
    index = rng.permutation(9)[:5].astype(np.int32)
    labels = cycnn.Tensor(rng.integers(0, 10, 5), "cpu")
    batch = fused.Gather(*(cycnn.Tensor(a, "cpu") for a in (images, index)), 1 / 64, -2)
    made, make = [], fused.Gather.made
    monkeypatch.setattr(fused.Gather, "made", lambda x: made.append(x) or make(x))
    model = nn.reference_network()
    results = []
    for together in (False, True):
        objective = nn.Objective(model, nn.NLLLoss(), together)
        for x in (batch.made(), batch):
            made.clear()
            scores, value = objective.forward(x, labels)
            objective.backward()
            grads = [p.grad.numpy() for p in model.parameters()]
            results.append([scores.numpy(), value.numpy().mean(), *grads])
    # the stand-in of a kernel makes it too, once
    assert len(made) == 1
    reads = dtype == np.uint8 and lacking not in ("gather", "conv_block")
    assert ("gather" in calls) == reads
    assert ("conv_pair_forward" in calls) == (lacking in (None, "gather"))
    for other in results[1:]:
        for one, two in zip(results[0], other):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_backward_needs_a_forward(calls):
    together = nn.fuse(nn.reference_network())
    x = np.zeros((2, 1, 28, 28), np.float32)
    y = together(x)
    together.backward(y)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        together.backward(y)


def two_layers():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 7, bias=False), nn.Linear(7, 10), nn.LogSoftmax()
    )


@pytest.mark.parametrize("make", [nn.reference_network, two_layers])
@pytest.mark.parametrize("make_loss", [nn.NLLLoss, nn.CrossEntropyLoss])
@pytest.mark.parametrize("lacking", [(), ("tail",), ("tail", "head")])
def test_an_objective_is_model_and_loss(make, make_loss, lacking, calls, monkeypatch):
    for name in lacking:
        monkeypatch.setattr(fused, f"{name}_supported", lambda *_: False)
    model, loss = make(), make_loss()
    rng = np.random.default_rng(1)
    x = cycnn.Tensor(rng.standard_normal((5, 1, 28, 28), dtype=np.float32), "cpu")
    labels = cycnn.Tensor(rng.integers(0, 10, 5), "cpu")
    results = []
    for together in (False, True):
        objective = nn.Objective(model, loss, together)
        scores, value = objective.forward(x, labels)
        objective.backward()
        grads = [p.grad.numpy() for p in model.parameters()]
        results.append([scores.numpy(), value.numpy().mean(), *grads])
        for p in model.parameters():
            p.grad.fill_(np.nan)
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    ran = [name for name in ("tail", "head") if f"{name}_forward" in calls]
    wanted = ["tail", "head"] if make_loss is nn.NLLLoss else []
    assert ran == wanted[len(lacking) :][:1]


def small_end(*between, bias=True):
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=3), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(),
        nn.Conv2d(8, 16, 2, bias=bias), nn.ReLU(), *between, nn.Flatten(),
        nn.Linear(64 if not between else 16, 7, bias=bias), nn.ReLU(),
        nn.Linear(7, 10, bias=bias), nn.LogSoftmax(),
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lacking", [None, "conv_tail", "conv_block"])
def test_the_tail_takes_a_convolution_with_it(
    bias, lacking, conv_tail, calls, monkeypatch
):
    if lacking:
        monkeypatch.setattr(fused, f"{lacking}_supported", lambda *_: False)
    model = small_end(bias=bias)
    rng = np.random.default_rng(1)
    x = cycnn.Tensor(rng.standard_normal((5, 1, 28, 28), dtype=np.float32), "cpu")
    labels = cycnn.Tensor(rng.integers(0, 10, 5), "cpu")
    results = []
    for together in (False, True):
        objective = nn.Objective(model, nn.NLLLoss(), together)
        for _ in range(2):
            scores, value = objective.forward(x, labels)
            objective.backward()
            grads = [p.grad.numpy() for p in model.parameters()]
            results.append([scores.numpy(), value.numpy().mean(), *grads])
            for p in model.parameters():
                p.grad.fill_(np.nan)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert calls.count("conv_tail_forward") == (0 if lacking else 2)
    assert ("tail_forward" in calls) == bool(lacking)
    for x_shape, block, tail in conv_tail:
        assert x_shape == (5, 8, 3, 3)
        shape = (16,) if bias else None
        assert block == ((16, 8, 2, 2), shape, True, None, (1, 1), (0, 0))
        shapes = ((7,), (10,)) if bias else (None, None)
        assert tail == ((7, 64), shapes[0], True, (10, 7), shapes[1])


@pytest.mark.parametrize(
    "model",
    [
        small_end(nn.MaxPool2d(2)),
        small_end(nn.Sigmoid(), nn.MaxPool2d(2)),
        nn.Sequential(
            nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(1152, 5), nn.Linear(5, 10),
            nn.LogSoftmax(),
        ),
        nn.Sequential(
            nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, 5), nn.Flatten(), nn.Linear(800, 5),
            nn.Linear(5, 10), nn.LogSoftmax(),
        ),
    ],
    ids=["pooling", "a layer between", "nothing ahead", "a pair"],
)  # fmt: skip
def test_convolutions_that_the_tail_leaves(model, conv_tail, calls):
    objective = nn.Objective(model, nn.NLLLoss(), True)
    x = cycnn.Tensor(np.ones((2, 1, 28, 28), np.float32), "cpu")
    objective.forward(x, cycnn.Tensor([1, 2], "cpu"))
    objective.backward()
    assert "conv_tail_forward" not in calls and "tail_forward" in calls


def test_training_fused_on_a_device_without_kernels():
    train, test = patterns(200), patterns(70, seed=9)
    trainers = [make_trainer(optim.schedules.linear()) for _ in range(2)]
    histories = []
    for trainer, together in zip(trainers, (False, True)):
        trainer.fuse = together
        histories.append(figures(trainer.fit(train, 2, 32, seed=5, test=test)))
    assert histories[0] == histories[1]
    assert digest(trainers[0]) == digest(trainers[1])


@pytest.mark.parametrize("method", ["RMSprop", "SGD"])
@pytest.mark.parametrize("last", ["tail", "head"])
def test_a_recorded_step_adds_the_parts_of_gradients_up(
    method, last, calls, monkeypatch
):
    monkeypatch.setattr(fused, "tail_backward_supported", lambda *_: last == "tail")
    train = patterns(100, side=28, classes=10)
    states = []
    for capture in (False, True):
        cycnn.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(),
            nn.Linear(8, 10), nn.LogSoftmax(),
        )  # fmt: skip
        rule = getattr(optim, method)(model.parameters(), lr=0.01, momentum=0.5)
        trainer = cycnn.Trainer(model, nn.NLLLoss(), rule, capture=capture, fuse=True)
        trainer.fit(train, 2, 32, seed=1)
        grads = [p.grad.numpy() for p in model.parameters()]
        states.append([*model.state_dict().values(), *grads])
    assert "conv_block_backward_partials" in calls
    assert f"{last}_backward_partials" in calls
    for one, other in zip(*states):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["conv_tail", "tail", "head"])
def test_the_reference_network_recorded(last, conv_tail, calls, monkeypatch):
    monkeypatch.setattr(fused, "tail_backward_supported", lambda *_: last != "head")
    if last != "conv_tail":
        monkeypatch.setattr(fused, "conv_tail_supported", lambda *_: False)
    train = patterns(50, side=28, classes=10)
    digests = []
    for capture in (False, True):
        cycnn.manual_seed(0)
        model = nn.reference_network()
        rule = optim.SGD(model.parameters(), lr=0.01)
        trainer = cycnn.Trainer(model, nn.NLLLoss(), rule, capture=capture, fuse=True)
        trainer.fit(train, 2, 16, seed=1)
        digests.append([*model.state_dict().values()])
    assert {"conv_pair_backward", "conv_pair_backward_partials"} < set(calls)
    assert ("conv_tail_forward" in calls) == (last == "conv_tail")
    assert calls.count("pack_conv_tail_filter") == (last == "conv_tail")
    for one, other in zip(*digests):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


class Meddler:
    """Changes the filters amid an epoch, and between two."""

    def on_step_end(self, trainer):
        if trainer.step % 3 == 0:
            self.on_epoch_end(trainer)

    def on_epoch_end(self, trainer, record=None):
        state = trainer.model.state_dict()
        trainer.model.load_state_dict({k: v * 0.9 for k, v in state.items()})


@pytest.mark.parametrize("callbacks", [[], [Meddler()]])
@pytest.mark.parametrize("lacking", [None, "conv_pair"])
def test_packed_filters_are_never_old(callbacks, lacking, calls, monkeypatch):
    if lacking:
        monkeypatch.setattr(fused, f"{lacking}_supported", lambda *_: False)
    train = patterns(100, side=28, classes=10)
    digests = []
    for capture in (False, True):
        cycnn.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(32, 10),
            nn.LogSoftmax(),
        )  # fmt: skip
        rule = optim.RMSprop(model.parameters(), lr=0.01)
        trainer = cycnn.Trainer(model, nn.NLLLoss(), rule, capture=capture, fuse=True)
        calls.clear()
        for epochs in (1, 3):
            trainer.fit(train, epochs, 16, seed=1, callbacks=callbacks)
        assert calls.count("pack_filter") == capture * (2 if lacking is None else 6)
        assert calls.count("pack_pair_filter") == capture * 2 * (lacking is None)
        digests.append([*model.state_dict().values()])
    for one, other in zip(*digests):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_an_optimizer_of_ones_own_packs_nothing(calls):
    class Own(optim.SGD):
        _update_from = optim.optimizer.Optimizer._update_from

    model = nn.reference_network()
    trainer = cycnn.Trainer(
        model, nn.NLLLoss(), Own(model.parameters()), capture=True, fuse=True
    )
    trainer.fit(patterns(20, side=28, classes=10), 2, 8, seed=1)
    assert "pack_pair_filter" not in calls and "conv_pair_forward" in calls


def test_the_representation_names_the_parts():
    text = repr(nn.fuse(nn.reference_network()))
    assert "Conv2d(1, 32, kernel_size=(5, 5), 832 parameters) + ReLU() + MaxPool2d" in text
    assert [type(layer) for layer in nn.fuse(nn.reference_network())[:4:3]] == [
        FusedConvPair,
        FusedLinear,
    ]
