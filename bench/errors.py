"""The largest errors seen: each operation against float64, over random shapes.

    python bench/errors.py [--device cpu] [--shapes 40]
    python bench/errors.py --shapes 8 --kind fused --precision tf32

The error of a result is the length of its difference to the reference over the length
of the reference (relative L2). Inputs, weights and gradients are drawn from N(0, 1),
other things as the functions below say. Operations that only move, choose, scale or add
a few numbers are left out; those that no precision changes run in fp32 only.
"""

from __future__ import annotations

import argparse

import numpy as np

import cycnn
from cycnn import nn
from cycnn.ops import for_device, reference

_MODES = ("fp32", "tf32", "bf16")

# Kinds are functions (ops, put, rng, ...) -> {name: result}. Each runs twice with the
# same draws: with the operations of the device, where ``put`` makes tensors, and with
# the reference, where it makes float64. A backward gets what its own forward returned.


def ints(rng, low, high, count=2):
    return tuple(map(int, rng.integers(low, high, count)))


def normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


def rows(rng, least=2):
    return ints(rng, 1, 200, 1) + ints(rng, least, 1000, 1)


def images(rng, channels, least=8):
    return *ints(rng, 1, 20, 1), channels, *ints(rng, least, 24)


def both_ways(ops, put, rng, name, x_shape, w_shape, outputs, *how):
    """Forward and backward of an operation that has a weight and a bias."""
    weight, bias = put(normal(rng, w_shape)), put(normal(rng, outputs))
    x = put(normal(rng, x_shape))
    y = getattr(ops, f"{name}_forward")(x, weight, bias, *how)
    dy = put(normal(rng, y.shape))
    dweight, dbias = put(normal(rng, w_shape)), put(normal(rng, outputs))
    backward = getattr(ops, f"{name}_backward")
    dx = backward(dy, x, weight, dweight, dbias, *how)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def conv2d(ops, put, rng):
    size, how = ints(rng, 1, 6), (ints(rng, 1, 3), ints(rng, 0, 3))
    c, k = ints(rng, 1, 60)
    return both_ways(ops, put, rng, "conv2d", images(rng, c), (k, c, *size), k, *how)


def conv2d_in_groups(ops, put, rng, depthwise):
    size, how = ints(rng, 1, 6), (ints(rng, 1, 3), ints(rng, 0, 3), ints(rng, 1, 4))
    (groups,), (c, k) = ints(rng, 2, 6, 1), ints(rng, 1, 12)
    if depthwise:
        (groups,), c, k = ints(rng, 2, 60, 1), 1, k % 3 + 1
    x_shape = images(rng, groups * c, least=13)  # the reach of the largest filter
    shapes = x_shape, (groups * k, c, *size), groups * k
    return both_ways(ops, put, rng, "conv2d", *shapes, *how, groups)


def conv_transpose2d(ops, put, rng):
    size, stride, padding = ints(rng, 1, 6), ints(rng, 1, 4), ints(rng, 0, 3)
    how = stride, padding, ints(rng, 0, stride), ints(rng, 1, 3)
    (groups,), (c, k) = ints(rng, 1, 4, 1), ints(rng, 1, 20)
    shapes = images(rng, groups * c), (groups * c, k, *size), groups * k
    return both_ways(ops, put, rng, "conv_transpose2d", *shapes, *how, groups)


def linear(ops, put, rng):
    (inputs, outputs), (n,) = ints(rng, 1, 1000), ints(rng, 1, 200, 1)
    shapes = (n, inputs), (outputs, inputs), outputs
    return both_ways(ops, put, rng, "linear", *shapes)


def of_output(ops, put, rng, name):
    """An operation whose gradient is made of its output."""
    y = getattr(ops, f"{name}_forward")(put(normal(rng, rows(rng))))
    dy = put(normal(rng, y.shape))
    return {"y": y, "dx": getattr(ops, f"{name}_backward")(dy, y)}


def of_input(ops, put, rng, name, *how):
    """An operation whose gradient is made of its input."""
    x = put(normal(rng, rows(rng)))
    y = getattr(ops, f"{name}_forward")(x, *how)
    dy = put(normal(rng, y.shape))
    return {"y": y, "dx": getattr(ops, f"{name}_backward")(dy, x, *how)}


def pooling(ops, put, rng, name):
    x, how = put(normal(rng, images(rng, 3))), ()
    if name == "avgpool2d":
        window, stride = ints(rng, 1, 6), ints(rng, 1, 4)
        padding = ints(rng, 0, [w // 2 + 1 for w in window])
        how = window, stride, padding, bool(rng.integers(2))
    y = getattr(ops, f"{name}_forward")(x, *how)
    dy = put(normal(rng, y.shape))
    return {"y": y, "dx": getattr(ops, f"{name}_backward")(dy, x.shape, *how)}


def normalising(ops, put, rng, name):
    """With running statistics, momentum 0.1 and in training, if of batches."""
    running = ()
    if name == "batch_norm2d":
        shape = images(rng, *ints(rng, 1, 60, 1))
        zeros, ones = np.zeros(shape[1], "f"), np.ones(shape[1], "f")
        running = put(zeros), put(ones), put(np.array(0, "i")), 0.1
    else:
        # two numbers become -1 and 1 whatever they are: dx is what rounding leaves
        shape = rows(rng, least=8)
    x, *others = (put(normal(rng, s)) for s in (shape, shape, *[shape[1]] * 4))
    dy, weight, bias, dweight, dbias = others
    forward, backward = (getattr(ops, f"{name}_{way}ward") for way in ("for", "back"))
    y, *statistics = forward(x, weight, bias, *running, 1e-5)
    dx = backward(dy, x, weight, *statistics, dweight, dbias, 1e-5)
    found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    return found | dict(zip(("mean", "var"), running))


def of_classes(ops, put, rng, name):
    """A loss of labels; "weighted" with weights 0.1 to 1.1, and 0.1 of smoothing."""
    shape, how, mean = rows(rng), (), ()
    scores, labels = normal(rng, shape), ints(rng, 0, shape[1], shape[0])
    if name.endswith("nll_loss"):
        scores = reference.log_softmax_forward(scores).astype("f")
    if name.startswith("weighted"):
        weight = rng.random(shape[1], "f") + np.float32(0.1)
        how, mean = (put(weight), 0.1, None), (True,)
    scores, labels = put(scores), put(np.array(labels, "i"))
    made = getattr(ops, f"{name}_forward")(scores, labels, *how, *mean)
    value, *total = made if isinstance(made, tuple) else (made,)
    # a cross-entropy also returns the log-softmax, for the backward
    log_probs = total.pop() if name.endswith("cross_entropy") else scores
    dx = getattr(ops, f"{name}_backward")(log_probs, labels, *how, *total)
    return {"value": value, "dx": dx}


def of_numbers(ops, put, rng, name, *how):
    """A loss of targets from 0 to 1, those of logits with weights of 0 to 1."""
    shape = rows(rng)
    x, target = put(normal(rng, shape)), put(rng.random(shape, "f"))
    if name == "bce_with_logits":
        how = (put(rng.random(shape[1], "f")),)
    value = getattr(ops, f"{name}_forward")(x, target, *how, True)
    dx = getattr(ops, f"{name}_backward")(x, target, *how, True)
    return {"value": value, "dx": dx}


def step(ops, put, rng, name, state, *numbers):
    """The fourth step of an optimizer; its state is |N(0, 1)| before."""
    (size,) = ints(rng, 1, 100_000, 1)
    arrays = {"param": normal(rng, size), "grad": normal(rng, size)}
    arrays |= {part: np.abs(normal(rng, size)) for part in state.split()}
    if "mean" in arrays:
        # as it is of any numbers; where little more, their difference has lost digits
        arrays["square"] += arrays["mean"] ** 2
    held = {part: put(array) for part, array in arrays.items()}
    more = (None,) if state == "m v" else ()
    if name in ("adam_step", "adagrad_step", "damped_sgd_step"):
        more += put(np.array([3, 0], "i")), True
    getattr(ops, name)(*held.values(), *more, put(np.array(0.01, "f")), *numbers)
    del held["grad"]
    return held


def moving_average(ops, put, rng):
    average, param = (put(normal(rng, 10_000)) for _ in range(2))
    ops.ema_step(average, param, 0.999)
    return {"average": average}


def clipping(ops, put, rng):
    grad = put(normal(rng, ints(rng, 2, 100_000, 1)))
    sums, norm = put(np.zeros(7, "f")), put(np.array(0, "f"))
    ops.square_sums(grad, sums)
    ops.clip_by_norm(grad, sums, 0.5, norm)
    return {"norm": norm, "grad": grad}


class Fused:
    """The operations of a layer, as a fused network of that layer alone does them."""

    def conv2d_forward(self, x, weight, bias, *how):
        k, c, *size = weight.shape
        return self._forward(nn.Conv2d(c, k, size, *how), x, weight, bias)

    def linear_forward(self, x, weight, bias):
        outputs, inputs = weight.shape
        return self._forward(nn.Linear(inputs, outputs), x, weight, bias)

    def _forward(self, layer, x, weight, bias):
        self.layer = layer.to(x.device)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        self.model = nn.fuse(nn.Sequential(layer))
        return self.model(x)

    def linear_backward(self, dy, x, weight, dweight, dbias, *how):
        dx = self.model.backward(dy)
        dweight.copy_(self.layer.weight.grad)
        dbias.copy_(self.layer.bias.grad)
        return dx

    conv2d_backward = linear_backward


# name, function, what it is given besides; of the first some numbers depend on the mode
PRODUCTS = (
    ("Conv2d", conv2d),
    ("Linear", linear),
    ("Conv2d, dilated groups", conv2d_in_groups, False),
    ("ConvTranspose2d", conv_transpose2d),
)
FUSED = (("Conv2d, fused", conv2d), ("Linear, fused", linear))
OTHERS = (
    ("Conv2d, depth-wise", conv2d_in_groups, True),
    ("AvgPool2d", pooling, "avgpool2d"),
    ("AdaptiveAvgPool2d", pooling, "global_avgpool2d"),
    ("BatchNorm2d", normalising, "batch_norm2d"),
    ("LayerNorm", normalising, "layer_norm"),
    ("Softmax", of_output, "softmax"),
    ("LogSoftmax", of_output, "log_softmax"),
    ("Sigmoid", of_output, "sigmoid"),
    ("Tanh", of_output, "tanh"),
    ("GELU", of_input, "gelu", "none"),
    ("GELU, tanh", of_input, "gelu", "tanh"),
    ("SiLU", of_input, "silu"),
    ("LeakyReLU", of_input, "leaky_relu", 0.01),
    ("CrossEntropyLoss", of_classes, "cross_entropy"),
    ("CrossEntropyLoss, options", of_classes, "weighted_cross_entropy"),
    ("NLLLoss", of_classes, "nll_loss"),
    ("NLLLoss, options", of_classes, "weighted_nll_loss"),
    ("MSELoss", of_numbers, "mse_loss"),
    ("SmoothL1Loss", of_numbers, "smooth_l1_loss", 1.0),
    ("BCEWithLogitsLoss", of_numbers, "bce_with_logits"),
    ("SGD", step, "sgd_step", "buffer", 0.9, 0.01, False),
    ("SGD, Nesterov", step, "sgd_step", "buffer", 0.9, 0.01, True),
    ("SGD, damped", step, "damped_sgd_step", "buffer", 0.9, 0.2, 0.01, False),
    ("RMSprop", step, "rmsprop_step", "square buffer", 0.99, 1e-8, 0.01, 0.9),
    ("RMSprop, centered", step, "centered_rmsprop_step", "square mean buffer",
     0.99, 1e-8, 0.01, 0.9),
    ("Adam", step, "adam_step", "m v", 0.9, 0.999, 1e-8, 0.01, False),
    ("Adam, amsgrad", step, "adam_step", "m v max", 0.9, 0.999, 1e-8, 0.01, False),
    ("AdamW", step, "adam_step", "m v", 0.9, 0.999, 1e-8, 0.01, True),
    ("Adagrad", step, "adagrad_step", "sum", 0.1, 1e-10, 0.01),
    ("EMA", moving_average),
    ("clip_grad_norm", clipping),
)  # fmt: skip


def as_float64(array):
    return np.array(array, "i" if array.dtype.kind == "i" else np.float64)


def distance(found, expected):
    return np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)


def largest_errors(kind, given, ops, device, modes, shapes):
    """{mode: {name: relative error}} of one kind."""

    def on_device(array):
        return cycnn.Tensor(array, device)

    worst = {mode: {} for mode in modes}
    for seed in range(shapes):
        expected = kind(reference, as_float64, np.random.default_rng(seed), *given)
        for mode in modes:
            cycnn.set_precision(mode)
            found = kind(ops, on_device, np.random.default_rng(seed), *given)
            for name, want in expected.items():
                error = distance(found[name], want)
                worst[mode][name] = max(worst[mode].get(name, 0.0), error)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cuda where there is a GPU")
    parser.add_argument("--shapes", type=int, default=40, help="of each kind")
    parser.add_argument(
        "--kind", default="", help='those with this in their name, for instance "fused"'
    )
    parser.add_argument("--precision", choices=_MODES, help="on a GPU; all")
    options = parser.parse_args()
    device = cycnn.device(options.device)
    modes = _MODES if device.is_cuda else ("fp32",)
    if options.precision and device.is_cuda:
        modes = (options.precision,)
    print(f"device {device}, {options.shapes} shapes each; largest relative L2 error")
    ops = for_device(device)
    tables = [(PRODUCTS, ops, modes), (OTHERS, ops, ("fp32",))]
    if device.is_cuda:
        tables.insert(1, (FUSED, Fused(), modes))
    for kinds, ops, modes in tables:
        for name, kind, *given in kinds:
            if options.kind not in name:
                continue
            worst = largest_errors(kind, given, ops, device, modes, options.shapes)
            for mode, errors in worst.items():
                figures = "  ".join(f"{key} {e:.1e}" for key, e in errors.items())
                print(f"{name:25} {mode}  {figures}", flush=True)


if __name__ == "__main__":
    main()
