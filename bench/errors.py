"""The largest errors seen: each kind of layer against float64, over random shapes.

    python bench/errors.py [--device cpu] [--shapes 40]
    python bench/errors.py --shapes 8 --kind fused --precision tf32

The error of a result is the length of its difference to the reference over the length
of the reference (relative L2). Inputs, weights and gradients are drawn from N(0, 1).
"""

from __future__ import annotations

import argparse

import numpy as np

import cycnn
from cycnn import nn
from cycnn.ops import reference

_MODES = ("fp32", "tf32", "bf16")


def draw_conv(rng):
    """(layer, shape of x, name of the reference operation, its options)."""
    size = tuple(map(int, rng.integers(1, 6, 2)))
    geometry = {
        "stride": tuple(map(int, rng.integers(1, 3, 2))),
        "padding": tuple(map(int, rng.integers(0, 3, 2))),
    }
    channels, outputs = map(int, rng.integers(1, 60, 2))
    layer = nn.Conv2d(channels, outputs, size, **geometry)
    shape = int(rng.integers(1, 20)), channels, *map(int, rng.integers(8, 24, 2))
    return layer, shape, "conv2d", geometry


def draw_linear(rng):
    inputs, outputs = map(int, rng.integers(1, 1000, 2))
    return nn.Linear(inputs, outputs), (int(rng.integers(1, 200)), inputs), "linear", {}


def draw_log_softmax(rng):
    shape = int(rng.integers(1, 200)), int(rng.integers(2, 1000))
    return nn.LogSoftmax(), shape, "log_softmax", {}


def normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


def distance(found, expected):
    return np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)


def errors(draw, rng, fused, device):
    """{name: relative error} of one layer, forward and backward."""
    layer, shape, name, geometry = draw(rng)
    layer.to(device)
    parameters = layer.parameters()
    for parameter in parameters:
        parameter.data.copy_(normal(rng, parameter.shape))
    model = nn.fuse(nn.Sequential(layer)) if fused else layer
    x = normal(rng, shape)
    y = model(x)
    dy = normal(rng, y.shape)
    dx = model.backward(dy)
    arrays = [parameter.data.numpy() for parameter in parameters]
    want_y = getattr(reference, f"{name}_forward")(x, *arrays, **geometry)
    if not arrays:
        want_dx = getattr(reference, f"{name}_backward")(dy, want_y)
        return {"y": distance(y, want_y), "dx": distance(dx, want_dx)}
    grads = [np.empty(array.shape) for array in arrays]
    want_dx = getattr(reference, f"{name}_backward")(
        dy, x, arrays[0], *grads, **geometry
    )
    found = {"y": distance(y, want_y), "dx": distance(dx, want_dx)}
    for key, parameter, grad in zip(("dweight", "dbias"), parameters, grads):
        found[key] = distance(parameter.grad, grad)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cuda where there is a GPU")
    parser.add_argument("--shapes", type=int, default=40, help="of each kind of layer")
    parser.add_argument(
        "--kind", default="", help='those with this in their name, for instance "fused"'
    )
    parser.add_argument("--precision", choices=_MODES, help="on a GPU; all")
    options = parser.parse_args()
    device = cycnn.device(options.device)
    modes = _MODES if device.is_cuda else ("fp32",)
    if options.precision and device.is_cuda:
        modes = (options.precision,)
    kinds = [
        ("Conv2d", draw_conv, False),
        ("Linear", draw_linear, False),
        ("LogSoftmax", draw_log_softmax, False),
    ]
    if device.is_cuda:
        kinds.append(("Conv2d, fused", draw_conv, True))
        kinds.append(("Linear, fused", draw_linear, True))
    print(f"device {device}, {options.shapes} shapes each; largest relative L2 error")
    for kind, draw, fused in kinds:
        if options.kind not in kind:
            continue
        for mode in modes:
            cycnn.set_precision(mode)
            worst = {}
            for seed in range(options.shapes):
                rng = np.random.default_rng(seed)
                for key, error in errors(draw, rng, fused, device).items():
                    worst[key] = max(worst.get(key, 0.0), error)
            figures = "  ".join(f"{key} {error:.1e}" for key, error in worst.items())
            print(f"{kind:14} {mode}  {figures}", flush=True)


if __name__ == "__main__":
    main()
