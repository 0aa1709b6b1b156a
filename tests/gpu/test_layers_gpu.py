"""The same model on the CPU and on the GPU: outputs, gradients, training, moving."""

import numpy as np
import pytest

import cycnn
from cycnn import nn, optim
from cycnn.errors import ShapeError
from cycnn.tensor import Tensor

pytestmark = pytest.mark.gpu

GPU = "cuda:0"

LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 8, 3), (5, 3, 9, 7)),
    "conv of one channel": (lambda: nn.Conv2d(1, 32, 5), (33, 1, 28, 28)),
    "conv strided": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2)),
        (2, 3, 17, 31),
    ),
    "conv grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=(1, 2), groups=2),
        (3, 4, 13, 8),
    ),
    "conv depthwise": (lambda: nn.Conv2d(7, 7, 3, groups=7, bias=False), (2, 7, 9, 9)),
    "conv of nothing": (lambda: nn.Conv2d(2, 3, 3), (0, 2, 4, 4)),
    "linear": (lambda: nn.Linear(257, 33), (31, 257)),
    "linear no bias": (lambda: nn.Linear(1, 7, bias=False), (1, 1)),
    "linear of nothing": (lambda: nn.Linear(5, 3), (0, 5)),
    "pool": (lambda: nn.MaxPool2d(2), (5, 3, 9, 7)),
    "pool overlapping": (
        lambda: nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 1)),
        (4, 2, 8, 5),
    ),
    "pool over the edge": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (4, 3, 8, 6)),
    "pool uneven": (lambda: nn.MaxPool2d(3, 2, padding=(0, 2, 1, 0)), (4, 3, 8, 5)),
    "pool of nothing": (lambda: nn.MaxPool2d(2), (0, 3, 4, 4)),
    "relu": (nn.ReLU, (3, 5, 7, 11)),
    "sigmoid": (nn.Sigmoid, (257, 3)),
    "flatten": (nn.Flatten, (4, 3, 5)),
    "log-softmax": (nn.LogSoftmax, (33, 10)),
    "log-softmax of nothing": (nn.LogSoftmax, (0, 10)),
}


def mixed():
    """Every layer there is."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(8, 12, (3, 2), dilation=(1, 2), groups=4, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * 5 * 5, 32),
        nn.ReLU(),
        nn.Linear(32, 10, bias=False),
        nn.LogSoftmax(dim=1),
    )


def scores():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


# Settings in which a rounding error of a gradient stays one in the update: with an
# accumulator that starts at 0, RMSprop moves by the sign of a gradient however small.
TRAININGS = {
    "reference": (
        nn.reference_network,
        nn.NLLLoss,
        lambda p: optim.RMSprop(
            p, 0.003, weight_decay=1e-4, eps=1e-10, initial_accumulator=1e-3
        ),
    ),
    "mixed": (
        mixed,
        nn.NLLLoss,
        lambda p: optim.RMSprop(
            p, 0.003, alpha=0.9, eps=1e-3, momentum=0.5, initial_accumulator=1e-2
        ),
    ),
    "scores": (
        scores,
        nn.CrossEntropyLoss,
        lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    ),
}


def assert_close(found, expected):
    """Equal up to float32 sums in another order, measured by the largest number."""
    found, expected = found.numpy(), expected.numpy()
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    if expected.size:
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale + 1e-7)


def on_both(make):
    """Two models with the same weights, on the CPU and on the GPU."""
    pair = []
    for device in ("cpu", GPU):
        cycnn.manual_seed(11)
        pair.append(make().to(device))
    return pair


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    make, shape = LAYERS[case]
    layers = on_both(make)
    rng = np.random.default_rng(12)
    x = rng.standard_normal(shape, dtype=np.float32)
    here, there = [layer(Tensor(x, layer.device)) for layer in layers]
    assert there.device == GPU
    assert_close(there, here)
    dy = rng.standard_normal(here.shape, dtype=np.float32)
    for accumulate in (False, True):
        gradients = []
        for layer in layers:
            layer(x)  # an array goes where the layer is
            gradients.append(layer.backward(Tensor(dy, layer.device), True, accumulate))
        assert_close(gradients[1], gradients[0])
        for on_cpu, on_gpu in zip(layers[0].parameters(), layers[1].parameters()):
            assert_close(on_gpu.grad, on_cpu.grad)
    layers[1](x)
    assert layers[1].backward(dy, input_grad=False) is None


def settle(models):
    """Give all models the first one's parameters, rounded to multiples of 1/64.

    With images of multiples of 1/8, the sums in front of the poolings are then exact
    whatever their order. Otherwise the two largest of a window may come out the other
    way round on the other device, and the gradient goes to another pixel.
    """
    state = models[0].state_dict()
    for model in models:
        model.load_state_dict({k: np.round(v * 64) / 64 for k, v in state.items()})


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("case", TRAININGS)
def test_training(case, n):
    make, make_loss, make_optimizer = TRAININGS[case]
    models = on_both(make)
    losses = [make_loss() for _ in models]
    optimizers = [make_optimizer(model.parameters()) for model in models]
    start = models[1].state_dict()
    for name, array in models[0].state_dict().items():
        np.testing.assert_array_equal(start[name], array)
    rng = np.random.default_rng(13)
    for _ in range(5):
        settle(models)
        start = models[1].state_dict()
        x = np.round(8 * rng.standard_normal((n, 1, 28, 28), dtype=np.float32)) / 8
        labels = rng.integers(0, 10, n)
        outputs, values = [], []
        for model, loss, optimizer in zip(models, losses, optimizers):
            outputs.append(model(x))
            values.append(loss(outputs[-1], labels))
            model.backward(loss.backward(), input_grad=False)
            optimizer.step()
        assert values[1].device == GPU
        assert_close(outputs[1], outputs[0])
        assert_close(values[1], values[0])
        for on_cpu, on_gpu in zip(models[0].parameters(), models[1].parameters()):
            assert_close(on_gpu.grad, on_cpu.grad)
            assert (on_gpu.data.numpy() != start[on_gpu.name]).any()
            assert_close(on_gpu.data, on_cpu.data)


def test_moving_there_and_back_keeps_everything():
    model = mixed().to("cpu")
    state = model.state_dict()
    rng = np.random.default_rng(14)
    gradients = [rng.standard_normal(p.shape, dtype="f") for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad.copy_(gradient)
    for device in (GPU, "cpu"):
        assert model.to(device) is model
        assert model.device == device
        slab = model.parameters()[0].slab
        assert slab.data.device == slab.grad.device == device
        for (name, parameter), gradient in zip(model.named_parameters(), gradients):
            assert parameter.slab is slab
            assert parameter.data.ptr == slab.data.ptr + 4 * parameter.offset
            assert parameter.grad.ptr == slab.grad.ptr + 4 * parameter.offset
            np.testing.assert_array_equal(parameter.data.numpy(), state[name])
            np.testing.assert_array_equal(parameter.grad.numpy(), gradient)


@pytest.mark.parametrize("case", TRAININGS)
def test_an_optimizer_follows_its_model(case):
    make, make_loss, make_optimizer = TRAININGS[case]
    models = [make() for _ in range(2)]
    for model in models:
        model.to("cpu").load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(model.parameters()) for model in models]
    loss = make_loss()
    rng = np.random.default_rng(15)
    for step in range(6):
        x = rng.standard_normal((9, 1, 28, 28), dtype=np.float32)
        labels = rng.integers(0, 10, 9)
        if step in (2, 4):
            models[1].to(GPU if step == 2 else "cpu")
        for model, optimizer in zip(models, optimizers):
            loss(model(x), labels)
            model.backward(loss.backward(), input_grad=False)
            optimizer.lr = 0.003 / (1 + step)
            optimizer.step()
            assert len(optimizer.runs) == 1
    for stayed, moved in zip(models[0].parameters(), models[1].parameters()):
        assert_close(moved.data, stayed.data)
    state = [optimizer.state_dict() for optimizer in optimizers]
    for name, value in state[0].items():
        if isinstance(value, np.ndarray):
            assert_close(Tensor(state[1][name], "cpu"), Tensor(value, "cpu"))
        else:
            assert state[1][name] == value


def test_an_optimizer_says_that_a_model_is_torn_apart():
    model = scores().to("cpu")
    optimizer = optim.SGD(model.parameters())
    model[1].to(GPU)
    with pytest.raises(ValueError, match="on several devices .cpu, cuda:0."):
        optimizer.step()
    with pytest.raises(ValueError, match=r"move the layers to one device with \.to"):
        nn.Sequential(*model)
    model.to(GPU)
    optimizer.step()
    assert optimizer.runs[0].data.device == GPU


def test_tensors_on_the_other_device_are_refused():
    layer = nn.Linear(3, 2).to(GPU)
    with pytest.raises(
        TypeError, match=r"is on cuda:0, its input on cpu.*\.to\('cpu'\)"
    ):
        layer(Tensor(np.zeros((1, 3)), "cpu"))
    loss = nn.NLLLoss()
    with pytest.raises(TypeError, match="labels are on cpu, scores on cuda:0"):
        loss(layer(np.zeros((1, 3))), Tensor([0], "cpu"))
    with pytest.raises(ShapeError, match=r"Linear\(3, 2.*4 features"):
        layer(np.zeros((1, 4)))


@pytest.mark.parametrize("kind", [nn.NLLLoss, nn.CrossEntropyLoss])
def test_a_label_out_of_range_on_the_gpu_makes_the_loss_nan(kind):
    log_probs = nn.LogSoftmax()(Tensor(np.zeros((3, 4)), GPU))
    assert float(kind()(log_probs, Tensor([0, 3, 1], GPU))) == pytest.approx(np.log(4))
    for wrong in (4, -1, 2**31 - 1):
        assert np.isnan(float(kind()(log_probs, Tensor([0, wrong, 1], GPU))))


def test_weights_written_on_one_device_are_read_on_the_other(tmp_path):
    path = tmp_path / "weights"
    model, other = mixed().to(GPU), mixed().to("cpu")
    model.save(path)
    other.load(path)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)
    other[0].weight.data.fill_(0.5)
    other.save(path)
    model.load(path)
    assert (model[0].weight.data.numpy() == 0.5).all()
    assert len({id(p.slab) for p in model.parameters()}) == 1
