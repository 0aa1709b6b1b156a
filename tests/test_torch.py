"""Beside PyTorch, on every device: each layer, loss and optimizer, at random.

PyTorch computes in float64 on the CPU. Ten steps each: forward, backward, update.
"""

import numpy as np
import pytest

import cycnn
from cycnn import Tensor, nn, optim

torch = pytest.importorskip("torch")

STEPS = 10


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.no_sanitizer]),
    ]
)
def device(request):
    return request.param


class Draw:
    """Random settings of layers, and the sizes that they leave."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.shape = (self(1, 6), self(1, 9), self(5, 13), self(5, 13))

    def __call__(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def maybe(self):
        return bool(self(0, 1))

    def pair(self, low, high):
        return self(low, high), self(low, high)

    def floats(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)


# Each gives the name of the layer in both libraries, its arguments and options.


def conv2d(draw):
    groups = draw(1, 3)
    draw.shape = (draw.shape[0], groups * draw(1, 5), *draw.shape[2:])
    return "Conv2d", (draw.shape[1], groups * draw(1, 7), draw.pair(1, 4)), {
        "stride": draw.pair(1, 3), "padding": draw.pair(0, 2),
        "dilation": draw(1, 1 + draw.maybe()), "groups": groups, "bias": draw.maybe(),
    }  # fmt: skip


def depthwise(draw):
    channels = draw.shape[1]
    return "Conv2d", (channels, channels * draw(1, 2), draw(2, 5)), {
        "stride": draw(1, 2), "padding": draw(0, 2), "groups": channels,
    }  # fmt: skip


def conv_transpose2d(draw):
    groups, stride = draw(1, 2), draw(1, 3)
    draw.shape = (draw.shape[0], groups * draw(1, 4), *draw.shape[2:])
    return "ConvTranspose2d", (draw.shape[1], groups * draw(1, 4), draw(2, 5)), {
        "stride": stride, "padding": draw(0, 1), "output_padding": draw(0, stride - 1),
        "groups": groups, "bias": draw.maybe(),
    }  # fmt: skip


def linear(draw):
    draw.shape = (draw.shape[0], draw(1, 300))
    return "Linear", (draw.shape[1], draw(1, 70)), {"bias": draw.maybe()}


def pooling(name):
    def settings(draw):
        size = draw.pair(2, 4)
        options = {"stride": draw.pair(1, 4), "padding": draw(0, 1)}
        if name == "AvgPool2d":
            options["count_include_pad"] = draw.maybe()
        options["ceil_mode"] = draw.maybe()
        return name, (size,), options

    return settings


def batch_norm2d(draw):
    draw.shape = (draw.shape[0] + 1, *draw.shape[1:])
    options = {"momentum": 0.1 if draw.maybe() else None, "affine": draw.maybe()}
    return "BatchNorm2d", (draw.shape[1],), options


def layer_norm(draw):
    axes = draw(1, 3)
    return "LayerNorm", (draw.shape[-axes:],), {"elementwise_affine": draw.maybe()}


def zero_pad2d(draw):
    return "ZeroPad2d", (tuple(draw(0, 3) for _ in range(4)),), {}


def plain(name):
    return lambda draw: (name, (), {})


def of_rows(name):
    def settings(draw):
        draw.shape = (draw.shape[0], draw(1, 300))
        return name, (), {"dim": 1}

    return settings


LAYERS = {
    "Conv2d": conv2d,
    "depth-wise": depthwise,
    "ConvTranspose2d": conv_transpose2d,
    "Linear": linear,
    "MaxPool2d": pooling("MaxPool2d"),
    "AvgPool2d": pooling("AvgPool2d"),
    "AdaptiveAvgPool2d": lambda draw: ("AdaptiveAvgPool2d", (1,), {}),
    "BatchNorm2d": batch_norm2d,
    "LayerNorm": layer_norm,
    "ZeroPad2d": zero_pad2d,
    "Flatten": plain("Flatten"),
    "ReLU": plain("ReLU"),
    "LeakyReLU": lambda draw: ("LeakyReLU", (draw(1, 9) / 10,), {}),
    "Sigmoid": plain("Sigmoid"),
    "Tanh": plain("Tanh"),
    "GELU": lambda draw: (
        "GELU", (), {"approximate": "tanh" if draw.maybe() else "none"}
    ),
    "SiLU": plain("SiLU"),
    "Softmax": of_rows("Softmax"),
    "LogSoftmax": of_rows("LogSoftmax"),
    "Hardtanh": lambda draw: ("Hardtanh", (-draw(1, 9) / 10, draw(1, 15) / 10), {}),
    "ReLU6": plain("ReLU6"),
}  # fmt: skip


def optimizers(draw):
    """(name, options) of one in both libraries."""
    more = {"weight_decay": 0.1 * draw.maybe(), "maximize": draw.maybe()}
    return [
        ("SGD", {"momentum": 0.9, "dampening": 0.2, **more}),
        ("SGD", {"momentum": 0.8, "nesterov": True, **more}),
        ("RMSprop", {"alpha": 0.9, "eps": 1e-3, "centered": draw.maybe(), **more}),
        ("RMSprop", {"eps": 1e-3, "momentum": 0.5, **more}),
        ("Adam", {"eps": 1e-3, "amsgrad": draw.maybe(), **more}),
        ("AdamW", {"eps": 1e-3, "betas": (0.8, 0.95), **more}),
        ("Adagrad", {"eps": 1e-3, "lr_decay": 0.1, **more}),
    ]


class Residual(torch.nn.Module):
    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x):
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


class Concat(torch.nn.Sequential):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


def give_state(ours, theirs):
    """``theirs`` gets the numbers of ``ours``, which have the same names."""
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict({name: torch.tensor(array) for name, array in state.items()})


def check(found, want, what):
    """Float32 against float64, after sums of some hundred terms."""
    want = want.detach().numpy()
    found = np.asarray(found.numpy() if isinstance(found, Tensor) else found)
    assert found.shape == want.shape, what
    scale = max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(found, want, 1e-4, 2e-5 * scale, err_msg=what)


def check_steps(ours, theirs, draw, device, optimizer, loss=None):
    """Both take ten steps; everything that they compute is the same.

    After a step PyTorch's parameters become ours, so that rounding does not add up;
    what the optimizers remember does not.

    optimizer: its number; one of :func:`optimizers`, if there are parameters. loss:
    (ours, theirs, a function that makes targets for scores of a shape); without one the
    gradient by the output is random.
    """
    ours, theirs = ours.to(device), theirs.double()
    give_state(ours, theirs)
    step, other_step = (lambda: None), (lambda: None)
    if ours.parameters():
        kinds = optimizers(draw)
        name, options = kinds[optimizer % len(kinds)]
        step = getattr(optim, name)(ours.parameters(), lr=0.01, **options).step
        other_step = getattr(torch.optim, name)(
            theirs.parameters(), lr=0.01, **options
        ).step
    for number in range(STEPS):
        training = number % 4 != 3
        ours.train(training), theirs.train(training)
        x = draw.floats(*draw.shape)
        given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        y, want = ours(Tensor(x, device)), theirs(given)
        check(y, want, f"y of step {number}")
        theirs.zero_grad()
        if loss is None:
            dy = draw.floats(*want.shape)
            want.backward(torch.tensor(dy, dtype=torch.float64))
            dx = ours.backward(Tensor(dy, device))
        else:
            target, other_target = loss[2](want.shape)
            value = loss[0](y, Tensor(target, device))
            other_value = loss[1](want, other_target)
            other_value.backward()
            check(value, other_value, f"loss of step {number}")
            dx = ours.backward(loss[0].backward())
        check(dx, given.grad, f"dx of step {number}")
        for (name, mine), parameter in zip(
            ours.named_parameters(), theirs.parameters()
        ):
            check(mine.grad, parameter.grad, f"gradient of {name}, step {number}")
        step(), other_step()
        found = ours.state_dict()
        for name, value in theirs.state_dict().items():
            check(found[name], value, f"{name} after step {number}")
        give_state(ours, theirs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(device, kind, seed):
    draw = Draw(1000 * seed + list(LAYERS).index(kind))
    cycnn.manual_seed(seed)
    name, arguments, options = LAYERS[kind](draw)
    check_steps(
        nn.Sequential(getattr(nn, name)(*arguments, **options)),
        torch.nn.Sequential(getattr(torch.nn, name)(*arguments, **options)),
        draw,
        device,
        optimizer=seed,
    )


def losses(draw, classes):
    """Pairs of losses, and what makes their targets."""

    def numbers(shape):
        target = draw.rng.random(shape).astype(np.float32)
        return target, torch.tensor(target, dtype=torch.float64)

    def labels(shape):
        target = draw.rng.integers(0, classes, shape[0]).astype(np.int32)
        return target, torch.tensor(target, dtype=torch.int64)

    weight = draw.rng.random(classes).astype(np.float32) + 0.5
    other = torch.tensor(weight, dtype=torch.float64)
    ignored = draw(0, classes - 1)
    smoothing = draw(0, 3) / 10
    return [
        (nn.MSELoss(), torch.nn.MSELoss(), numbers),
        (nn.L1Loss("sum"), torch.nn.L1Loss(reduction="sum"), numbers),
        (nn.SmoothL1Loss(beta=0.3), torch.nn.SmoothL1Loss(beta=0.3), numbers),
        (
            nn.BCEWithLogitsLoss(pos_weight=weight),
            torch.nn.BCEWithLogitsLoss(pos_weight=other),
            numbers,
        ),
        (nn.NLLLoss(weight=weight), torch.nn.NLLLoss(weight=other), labels),
        (
            nn.CrossEntropyLoss(label_smoothing=smoothing),
            torch.nn.CrossEntropyLoss(label_smoothing=smoothing),
            labels,
        ),
        (
            nn.CrossEntropyLoss(weight=weight, ignore_index=ignored, reduction="sum"),
            torch.nn.CrossEntropyLoss(
                weight=other, ignore_index=ignored, reduction="sum"
            ),
            labels,
        ),
    ]


def network(draw, library, seed):
    """A small network of either library; the same for the same seed.

    Smooth: where a sum is within rounding of a kink, gradients differ by right.
    """
    draw.rng = np.random.default_rng(seed)
    residual, concat = (nn.Residual, nn.Concat) if library is nn else (Residual, Concat)
    _, channels, height, width = draw.shape
    wide = draw(2, 12)
    act = ("Sigmoid", "Tanh", "SiLU", "GELU")[draw(0, 3)]

    def conv(inputs, outputs, size):
        return library.Conv2d(inputs, outputs, size, padding=size // 2)

    branches = concat(
        library.Sequential(conv(wide, 3, 1)),
        library.Sequential(conv(wide, 2, 3), getattr(library, act)()),
    )
    block = residual(
        library.Sequential(
            conv(5, 4, 3), library.BatchNorm2d(4), library.SiLU(), conv(4, 5, 3)
        )
    )
    inputs = 5 * (height // 2) * (width // 2)
    return library.Sequential(
        conv(channels, wide, 3), getattr(library, act)(), branches, block,
        library.AvgPool2d(2), library.Flatten(), library.Linear(inputs, 9),
        library.Tanh(), library.Linear(9, 4),
    )  # fmt: skip


@pytest.mark.parametrize("kind", range(7))
@pytest.mark.parametrize("seed", range(6))
def test_networks_losses_and_optimizers(device, seed, kind):
    draw = Draw(seed)
    draw.shape = (draw.shape[0] + 2, *draw.shape[1:])
    cycnn.manual_seed(seed)
    models = [network(draw, library, seed) for library in (nn, torch.nn)]
    draw.rng = np.random.default_rng(100 * seed + kind)
    check_steps(*models, draw, device, seed + kind, losses(draw, classes=4)[kind])
