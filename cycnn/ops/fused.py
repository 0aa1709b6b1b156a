"""Fused operations, on the GPUs that have kernels for them.

Each computes what a run of the operations of :mod:`cycnn.ops.reference` does:

    conv_block      conv2d, relu (if ``relu``), maxpool2d (if ``pool``)
    conv_pair       two of these, one behind the other
    linear_block    linear, relu (if ``relu``)
    head            linear, log_softmax, nll_loss
    tail            a linear_block and the head behind it
    conv_tail       a conv_block and the tail behind it

The kernels (``cuda/templates``) are compiled for the shapes of a layer when it first
runs, and cached. That takes NVRTC; without it, and on the CPU, nothing is supported.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

from . import for_device
from .forward_plan import Machine

_log = logging.getLogger("cycnn")


class Gather(NamedTuple):
    """A batch that is made where it is read: images[index] * scale + shift."""

    images: object  # Tensor (M, C, H, W); kernels want uint8
    index: object  # int32 Tensor (N,), its numbers below M
    scale: float
    shift: float
    x: object = None  # float32 Tensor (N, C, H, W) to write the batch to as well

    @property
    def device(self):
        return self.images.device

    @property
    def shape(self) -> tuple:
        return (*self.index.shape, *self.images.shape[1:])

    @property
    def arguments(self) -> tuple:
        return self.images, self.index, self.scale, self.shift, self.x

    def made(self):
        """The batch in memory, for who cannot make it."""
        gather = for_device(self.device).gather_images
        return gather(self.images, self.index, self.scale, self.shift)


class ConvBlock(NamedTuple):
    """The arguments of one of the convolutions of :func:`conv_pair_forward`."""

    weight: object
    bias: object
    relu: bool
    pool: tuple | None
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)

    @property
    def geometry(self) -> tuple:
        """The same with shapes for weight and bias (None if there is none)."""
        bias = None if self.bias is None else self.bias.shape
        return self.weight.shape, bias, *self[2:]


class Tail(NamedTuple):
    """The last two layers, as :func:`conv_tail_forward` takes them."""

    weight: object
    bias: object
    relu: bool
    weight_out: object
    bias_out: object

    @property
    def geometry(self) -> tuple:
        """The same with shapes for weights and biases (None if there is none)."""
        return tuple(
            item if item is None or isinstance(item, bool) else item.shape
            for item in self
        )


@functools.lru_cache(maxsize=None)
def _modules():
    """The modules of the forward and the backward kernels, or None without NVRTC."""
    from ..errors import CudaError
    from ..gpu import compile as kernel_compile

    try:
        kernel_compile.nvrtc_version()
    except CudaError as error:
        _log.info("layers run unfused: %s", error)
        return None
    from . import fused_cuda_backward, fused_cuda_forward

    return fused_cuda_forward, fused_cuda_backward


@functools.lru_cache(maxsize=512)
def conv_block_supported(device, x_shape, w_shape, pool, stride, padding) -> bool:
    """Whether the device has both kernels of a convolution block of this shape."""
    if not device.is_cuda or _modules() is None:
        return False
    forward, backward = _modules()
    given = x_shape, w_shape, pool, stride, padding, device.index
    return forward.conv_block_supported(*given) and (
        backward.conv_block_backward_supported(*given)
    )


@functools.lru_cache(maxsize=512)
def gather_supported(device, x_shape, w_shape, pool, stride, padding) -> bool:
    """Whether a convolution block that is supported takes a :class:`Gather`."""
    given = x_shape, w_shape, pool, stride, padding, device.index
    return _modules()[0].gather_supported(*given)


@functools.lru_cache(maxsize=512)
def conv_pair_supported(device, precision, x_shape, first, second, gather) -> bool:
    """Whether the device has a kernel for two convolution blocks, and for their backward.

    ``first`` and ``second`` are the ``geometry`` of a :class:`ConvBlock`.
    """
    if not device.is_cuda or _modules() is None:
        return False
    given = machine_of(device), precision, x_shape, first, second, False, gather
    return bool(conv_pair_kernels(*given))


@functools.lru_cache(maxsize=512)
def linear_block_supported(device) -> bool:
    """Whether the device has both kernels of a linear layer."""
    if not device.is_cuda or _modules() is None:
        return False
    from ..gpu import device as gpu_device

    return gpu_device.get(device.index).capability >= (8, 0)


@functools.lru_cache(maxsize=512)
def head_supported(device, inputs, classes) -> bool:
    """Whether the device has both kernels of a head, which is for few weights."""
    if not linear_block_supported(device):
        return False
    return _modules()[0].head_supported(inputs, classes, device.index)


@functools.lru_cache(maxsize=512)
def tail_supported(device, inputs, hidden, classes) -> bool:
    """Whether the device has a kernel for a small linear layer and the head behind."""
    if not linear_block_supported(device):
        return False
    return _modules()[0].tail_supported(inputs, hidden, classes, device.index)


@functools.lru_cache(maxsize=512)
def conv_tail_supported(device, precision, x_shape, block, tail) -> bool:
    """Whether the device has a kernel for a convolution block and the tail behind it.

    ``block`` and ``tail`` are the ``geometry`` of a :class:`ConvBlock` and a
    :class:`Tail`, whose shapes fit.
    """
    if not device.is_cuda or _modules() is None:
        return False
    given = machine_of(device), precision, x_shape, block, tail
    return bool(conv_tail_kernels(*given))


def pack_filter(weight, x_shape, pool, stride, padding):
    """A filter packed ahead for :func:`conv_block_forward`, or None if it needs none.

    See :class:`cycnn.ops.fused_cuda_forward.PackedFilter`.
    """
    return _modules()[0].pack_filter(weight, x_shape, pool, stride, padding)


def pack_pair_filter(x_shape, first, second, gather):
    """The filter of ``second`` packed ahead for :func:`conv_pair_forward`."""
    return _modules()[0].pack_pair_filter(x_shape, first, second, gather)


def pack_conv_tail_filter(x_shape, block):
    """The filter of ``block`` packed ahead for :func:`conv_tail_forward`."""
    return _modules()[0].pack_conv_tail_filter(x_shape, block)


def conv_block_forward(x, weight, bias, relu, pool, stride, padding, packed=None):
    return _modules()[0].conv_block_forward(
        x, weight, bias, relu, pool, stride, padding, packed
    )


# In a backward the kernel ahead wrote neither x nor a weight: what the forward read is
# older ("settled"), and is fetched while that kernel still runs. But for tail_backward
# behind conv_tail_forward, which wrote its x.


def conv_block_backward(
    dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx
):
    return _modules()[1].conv_block_backward(
        dy, y, code, x, weight, dweight, dbias, relu, pool, stride, padding, need_dx,
        settled=True,
    )  # fmt: skip


def conv_block_backward_partials(
    dy, y, code, x, weight, relu, pool, stride, padding, need_dx
):
    return _modules()[1].conv_block_backward_partials(
        dy, y, code, x, weight, relu, pool, stride, padding, need_dx, settled=True
    )


def conv_pair_forward(x, first, second, packed=None):
    return _modules()[0].conv_pair_forward(x, first, second, packed)


def linear_block_forward(x, weight, bias, relu):
    return _modules()[0].linear_block_forward(x, weight, bias, relu)


def linear_block_backward(dy, y, x, weight, dweight, dbias, relu, need_dx):
    return _modules()[1].linear_block_backward(
        dy, y, x, weight, dweight, dbias, relu, need_dx
    )


def linear_block_backward_partials(dy, y, x, weight, relu, need_dx):
    return _modules()[1].linear_block_backward_partials(dy, y, x, weight, relu, need_dx)


def head_forward(x, weight, bias, labels):
    return _modules()[0].head_forward(x, weight, bias, labels)


def tail_forward(x, weight, bias, relu, weight_out, bias_out, labels, settled=False):
    return _modules()[0].tail_forward(
        x, weight, bias, relu, weight_out, bias_out, labels, settled
    )


def conv_tail_forward(x, block, tail, labels, packed=None, settled=False):
    return _modules()[0].conv_tail_forward(x, block, tail, labels, packed, settled)


def head_backward(dlogits, x, weight, dweight, dbias, need_dx):
    return _modules()[1].head_backward(dlogits, x, weight, dweight, dbias, need_dx)


def head_backward_partials(dlogits, x, weight, need_dx):
    return _modules()[1].head_backward_partials(dlogits, x, weight, need_dx)


@functools.lru_cache(maxsize=512)
def tail_backward_supported(device, hidden, outputs) -> bool:
    """Whether the device has a kernel for the backward of a tail with a ReLU."""
    return linear_block_supported(device) and _modules()[1].tail_backward_supported(
        hidden, outputs, device.index
    )


def tail_backward(
    dlogits, hidden, x, weight, weight_out, dweight, dbias, dweight_out, dbias_out,
    need_dx, x_settled=True,
):  # fmt: skip
    """The weights must be older than what the kernel ahead wrote; ``x_settled``: x is.

    Behind :func:`conv_tail_forward` it is not.
    """
    return _modules()[1].tail_backward(
        dlogits, hidden, x, weight, weight_out, dweight, dbias, dweight_out, dbias_out,
        settled=True, need_dx=need_dx, x_settled=x_settled,
    )  # fmt: skip


def tail_backward_partials(
    dlogits, hidden, x, weight, weight_out, need_dx, x_settled=True
):
    """See :func:`tail_backward`."""
    return _modules()[1].tail_backward_partials(
        dlogits, hidden, x, weight, weight_out, settled=True, need_dx=need_dx,
        x_settled=x_settled,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def conv_pair_backward_supported(device, x_shape, first, second) -> bool:
    """Whether the device has a kernel for the backward of two convolution blocks.

    ``first`` and ``second``: (shape of the weight, pool, stride, padding).
    """
    if not device.is_cuda or _modules() is None:
        return False
    from . import fused_cuda_pair_backward as pair

    return pair.conv_pair_backward_supported(x_shape, first, second, device.index)


def conv_pair_backward(
    dy, code2, y1, code1, x, weight2, dweight2, dbias2, dweight1, dbias1, settled=False
):
    """``settled``: the kernel ahead wrote nothing but dy."""
    from . import fused_cuda_pair_backward as pair

    pair.conv_pair_backward(
        dy, code2, y1, code1, x, weight2, dweight2, dbias2, dweight1, dbias1, settled
    )


def conv_pair_backward_partials(dy, code2, y1, code1, x, weight2, settled=False):
    from . import fused_cuda_pair_backward as pair

    return pair.conv_pair_backward_partials(dy, code2, y1, code1, x, weight2, settled)


def updater(parameters, device):
    """Sums of partial gradients and the optimizer's step in one launch, or None.

    See :class:`cycnn.ops.fused_cuda_backward.Updater`.
    """
    if not linear_block_supported(device):
        return None
    return _modules()[1].Updater(parameters, device)


# Which kernels these run, without running them: so that they can be compiled at once


def machine(arch, sm_count):
    """What kernels are planned for: :class:`~.forward_plan.Machine`, or None.

    None without NVRTC: then there are no kernels.
    """
    return None if _modules() is None else Machine(arch, sm_count)


def machine_of(device):
    """The same of a device; None for the CPU."""
    if not device.is_cuda:
        return None
    from ..gpu import device as gpu_device

    gpu = gpu_device.get(device.index)
    return machine(gpu.arch, gpu.sm_count)


def conv_block_kernels(
    machine,
    precision,
    x_shape,
    w_shape,
    bias,
    relu,
    pool,
    stride,
    padding,
    need_dx,
    gather,
) -> list:
    """Kernels of a convolution block, forward and backward.

    Parameters
    ----------
    machine : Machine
    precision : {"fp32", "tf32", "bf16"}
    x_shape, w_shape : tuple of int
    bias : bool
    relu, pool, stride, padding, need_dx
        Of the layer.
    gather : bool
        Whether x is a :class:`Gather`, if the kernel takes one.

    Returns
    -------
    list of Kernel
        Empty where a machine does not have both.
    """
    forward, backward = _modules()
    given = relu, pool, stride, padding
    there = forward.conv_block_kernels(
        machine, precision, x_shape, w_shape, bias, *given, gather
    )
    back = backward.conv_block_kernels(
        machine, precision, x_shape, w_shape, *given, need_dx, settled=True
    )
    return there + back if there and back else []


def conv_pair_kernels(
    machine, precision, x_shape, first, second, need_dx, gather
) -> list:
    """Kernels of two convolution blocks in one; see :func:`conv_block_kernels`.

    ``first`` and ``second`` are the ``geometry`` of a :class:`ConvBlock`.
    """
    forward, backward = _modules()
    there = forward.conv_pair_kernels(
        machine, precision, x_shape, first, second, gather
    )
    if not there:
        return []
    y_shape = forward.conv_output_shape(x_shape, first)
    back = [
        backward.conv_block_kernels(
            machine, precision, shape, block[0], *block[2:], with_dx, settled=True
        )
        for shape, block, with_dx in (
            (x_shape, first, need_dx),
            (y_shape, second, True),
        )
    ]
    return there + back[0] + back[1] if all(back) else []


def linear_block_kernels(machine, precision, n, inputs, outputs, bias, relu) -> list:
    """Kernels of a linear layer for ``n`` images, forward and backward."""
    forward, backward = _modules()
    return [
        *forward.linear_block_kernels(
            machine, precision, n, inputs, outputs, bias, relu
        ),
        *backward.linear_block_kernels(machine, precision, n, inputs, outputs, relu),
    ]


def head_kernels(machine, precision, n, inputs, classes, bias) -> list:
    """Kernels of a head, forward and backward; empty where it is not supported."""
    forward, backward = _modules()
    there = forward.head_kernels(machine, precision, inputs, classes, bias)
    if not there:
        return []
    return there + backward.linear_block_kernels(
        machine, precision, n, inputs, classes, False
    )


def tail_kernels(
    machine, precision, n, inputs, hidden, classes, relu, bias, bias_out, x_settled=True
) -> list:
    """Kernels of a linear layer and a head, forward and backward.

    Empty where the head is not supported. ``x_settled`` as in :func:`tail_backward`.
    """
    forward, backward = _modules()
    head = forward.head_kernels(machine, precision, hidden, classes, bias_out)
    if not head:
        return []
    there = forward.tail_kernels(
        machine, precision, inputs, hidden, classes, relu, bias, bias_out
    )
    if not there:
        there = head + forward.linear_block_kernels(
            machine, precision, n, inputs, hidden, bias, relu
        )
    given = machine, precision, n
    back = []
    if relu:
        back = backward.tail_backward_kernels(
            *given, inputs, hidden, classes, settled=True, x_settled=x_settled
        )
    if not back:
        back = [
            *backward.linear_block_kernels(*given, inputs, hidden, relu),
            *backward.linear_block_kernels(*given, hidden, classes, False),
        ]
    return there + back


def conv_tail_kernels(machine, precision, x_shape, block, tail) -> list:
    """Kernels of the forward of a convolution block and the tail behind it, or none.

    ``block`` and ``tail`` as in :func:`conv_tail_supported`.
    """
    return _modules()[0].conv_tail_kernels(machine, precision, x_shape, block, tail)


def conv_pair_backward_kernels(machine, precision, x_shape, first, second) -> list:
    """Kernels of the backward of two blocks; see conv_pair_backward_supported."""
    from . import fused_cuda_pair_backward as pair

    return pair.conv_pair_backward_kernels(machine, precision, x_shape, first, second)


def prepare(kernels, device) -> int:
    """Compile kernels for a GPU in parallel; :func:`cycnn.gpu.compile.prepare`."""
    from ..gpu import compile as kernel_compile
    from ..gpu import device as gpu_device

    arch = gpu_device.get(device.index).arch
    return kernel_compile.prepare([kernel.request(arch) for kernel in kernels])
