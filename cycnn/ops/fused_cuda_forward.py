"""Fused forward operations on a GPU: plans, launch shapes, arguments.

The kernels (``cuda/templates/*_forward.cu``) are specialised for a layer: its shape,
its tile and the precision are options of the compiler, only the batch is known later. A
plan is what is chosen here for a layer: all plain integers, made without a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import shapes
from ..gpu import device as gpu_device
from ..gpu.launch import Kernel
from ..precision import get_precision
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from .fused import FEW_CHANNELS, Gather

_FLOAT32, _UINT8 = np.dtype("float32"), np.dtype("uint8")
_MODES = {"fp32": 0, "tf32": 1, "bf16": 2}

# Kibibytes of shared memory: most for a block, and of a multiprocessor.
_SHARED = {
    (8, 0): (163, 164),
    (8, 7): (163, 164),
    (9, 0): (227, 228),
    (10, 0): (227, 228),
}
_SHARED_ELSEWHERE = (99, 100)
_MAX_POSITIONS = 32  # of a pooling window whose sums a thread keeps


class Machine(NamedTuple):
    """What a plan depends on of the GPU."""

    arch: str  # "sm_90"
    sm_count: int

    @property
    def capability(self) -> tuple:
        return int(self.arch[3:-1]), int(self.arch[-1])

    @property
    def shared(self) -> tuple:
        return _SHARED.get(self.capability, _SHARED_ELSEWHERE)


class ConvShape(NamedTuple):
    """A convolution block but for its batch."""

    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple
    padding: tuple
    pool: tuple  # (1, 1): none
    relu: bool
    bias: bool
    code: bool

    @property
    def output(self) -> tuple:
        """(P, Q) before pooling."""
        return (
            (self.H + 2 * self.padding[0] - self.R) // self.stride[0] + 1,
            (self.W + 2 * self.padding[1] - self.S) // self.stride[1] + 1,
        )

    @property
    def pooled(self) -> tuple:
        p, q = self.output
        return p // self.pool[0], q // self.pool[1]


class FilterLayout(NamedTuple):
    """Where ``conv_pack_filter`` puts the numbers of a filter (K, C, R, S).

    Filters are packed alike for all kernels that have the same layout.
    """

    mode: int
    channels: int  # C
    taps: int  # R S
    slot_taps: int  # of a slot of the ring
    quads: int  # units of channels in a chunk
    outputs: int  # K of a tile
    chunks: int
    tiles: int  # along K

    @property
    def threads(self) -> int:
        """One for each 16 bytes; in "fp32" for each pair, big and small halves."""
        return self.tiles * self.outputs * self.chunks * self.quads * self.taps

    @property
    def words(self) -> int:
        return 4 * self.threads * (2 if self.mode == 0 else 1)


class Plan(NamedTuple):
    """How a kernel is compiled and launched."""

    library: str
    options: tuple  # (("C", 32), ...)
    specific: bool  # needs the instructions of exactly this architecture
    block: int
    shared: int
    images: int  # a block's
    tiles: int  # blocks for a group of images
    channel_tiles: int
    layout: FilterLayout | None = None  # of the packed filter, if it takes one

    @property
    def definitions(self) -> tuple:
        return tuple(f"-D{name}={int(value)}" for name, value in self.options)

    def grid(self, n: int) -> tuple:
        return ceil_div(n, self.images) * self.tiles, self.channel_tiles


def _round_up(a, b):
    return ceil_div(a, b) * b


def _shape_options(shape):
    return (
        *zip("CHWKRS", shape[:6]),
        ("STRIDE_H", shape.stride[0]),
        ("STRIDE_W", shape.stride[1]),
        ("PAD_H", shape.padding[0]),
        ("PAD_W", shape.padding[1]),
        ("POOL_H", shape.pool[0]),
        ("POOL_W", shape.pool[1]),
        ("RELU", shape.relu),
        ("HAS_BIAS", shape.bias),
        ("HAS_CODE", shape.code),
    )


# The general convolution: every tile that fits is priced in clocks, the cheapest taken.

# Clocks of a multiprocessor for a 16 x 8 x 8 (words) product, with mma.sync and with
# wgmma. Bytes a clock from the L2 cache and from shared memory. Clocks to start and end
# a block, and of a round trip to the L2 cache. Measured on an H100 (bench/NOTES.md).
_MMA_CLOCKS, _WGMMA_CLOCKS, _L2_BYTES, _SHARED_BYTES = 1.7, 1.05, 40, 128
_START_CLOCKS, _TRIP_CLOCKS = 2200, 800


class Tile(NamedTuple):
    """A block's work, in the words of ``conv_block_forward.cu``."""

    IM: int
    TP: int
    TQ: int
    TK: int
    CQ: int
    W_ROWS: int
    SLOTS: int
    WGMMA: int
    WARPS_M: int
    WARPS_N: int
    WARPS_K: int
    STAGERS: int
    BLOCKS_PER_SM: int
    SHARED_BYTES: int


def _extents(used, pool):
    """Sizes of a tile along an axis: power-of-two multiples of the pool, and all."""
    sizes = {pool << i for i in range(7) if pool << i < 2 * used}
    return sorted(sizes | {used})


def _geometry(shape, tile_p, tile_q, images, tk, cq, mode):
    """(chunks, bytes of an input buffer, of a filter row), as in the kernel."""
    quad = 8 if mode == 2 else 4
    parts = 2 if mode == 0 else 1
    rows = (tile_p - 1) * shape.stride[0] + shape.R
    columns = (tile_q - 1) * shape.stride[1] + shape.S
    units = rows * shape.stride[1] * ceil_div(columns, shape.stride[1]) * images
    return (
        ceil_div(shape.C, cq * quad),
        16 * parts * cq * units,
        16 * parts * shape.S * cq * tk,
    )


def _warp_layouts(machine, pixels, row_pixels, tile_p, tk, cq):
    """(WGMMA, WARPS_M, WARPS_N, WARPS_K) that can share a tile."""
    if (
        machine.capability == (9, 0)
        and pixels % 64 == 0
        and (row_pixels % 64 == 0 or tile_p % 8 == 0)
        and tk & (tk - 1) == 0
    ):
        for groups, k in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)):
            if pixels // 64 % groups == 0 and cq % (2 * k) == 0:
                yield 1, 4 * groups, 1, k
    for m, n, k in (
        (4, 2, 1),
        (2, 4, 1),
        (2, 2, 1),
        (4, 1, 1),
        (1, 4, 1),
        (8, 1, 1),
        (2, 1, 1),
        (2, 1, 4),
        (1, 2, 4),
        (2, 2, 2),
        (1, 1, 8),
        (1, 1, 4),
        (1, 1, 2),
        (2, 1, 2),
        (4, 1, 2),
    ):
        if pixels % (16 * m) == 0 and tk % (8 * n) == 0 and cq % (2 * k) == 0:
            yield 0, m, n, k


def _live(shape, tile_p, tile_q):
    """Rows and columns of the input that a stager brings (the kernel's LIVE_...)."""
    p, q = shape.pooled
    rows = (tile_p - 1) * shape.stride[0] + shape.R
    columns = (tile_q - 1) * shape.stride[1] + shape.S
    if tile_p >= p * shape.pool[0]:
        rows = min(shape.H, rows - shape.padding[0])
    if tile_q >= q * shape.pool[1]:
        columns = min(shape.W, columns - shape.padding[1])
    return rows, columns


def _staging(shape, tile_p, tile_q, images, cq, stagers, quad):
    """(units of a chunk, those that a stager brings, how many at a time)."""
    rows, columns = _live(shape, tile_p, tile_q)
    units = cq * rows * columns * images
    mine = ceil_div(units, 32 * stagers)
    return units, mine, min(mine, 48 // quad)


def _price(shape, n, machine, tile, mode):
    """Clocks of the whole layer, roughly."""
    products = 3 if mode == 0 else 1
    parts = 2 if mode == 0 else 1
    quad = 8 if mode == 2 else 4
    p, q = shape.pooled
    positions = shape.pool[0] * shape.pool[1]
    pixels = tile.IM * tile.TP * tile.TQ
    blocks = (
        ceil_div(n, tile.IM)
        * ceil_div(p * shape.pool[0], tile.TP)
        * ceil_div(q * shape.pool[1], tile.TQ)
        * ceil_div(shape.K, tile.TK)
    )
    chunks, x_bytes, w_row = _geometry(
        shape, tile.TP, tile.TQ, tile.IM, tile.TK, tile.CQ, mode
    )
    loaded = w_row * shape.R + x_bytes
    steps = tile.CQ // 2 * shape.R * shape.S  # of a chunk
    if tile.WGMMA:
        tensor = pixels // 16 * (tile.TK / 8) * products * _WGMMA_CLOCKS
        if tile.WARPS_M * tile.WARPS_K * tile.BLOCKS_PER_SM == 4:
            tensor *= 1.4  # a warpgroup alone does not keep the tensor cores busy
        reads = pixels // 64 * (64 + tile.TK) * 32 * products
    else:
        warps = tile.WARPS_M * tile.WARPS_N
        m, k = pixels // 16 // tile.WARPS_M, tile.TK // 8 // tile.WARPS_N
        # a warp alone cannot keep its quarter of the tensor cores busy
        few = max(1, 6 / (warps * tile.WARPS_K * tile.BLOCKS_PER_SM))
        tensor = warps * m * k * products * _MMA_CLOCKS * few
        reads = warps * 512 * (m + ceil_div(k, 2)) * parts
    multiply = max(steps * tensor, (steps * reads + 1.5 * loaded) / _SHARED_BYTES)
    units, mine, batch = _staging(
        shape, tile.TP, tile.TQ, tile.IM, tile.CQ, tile.STAGERS, quad
    )
    stage = mine * (8 * quad + 10) + ceil_div(mine, batch) * _TRIP_CLOCKS
    # a load of 32 lanes takes a clock for each line that it touches
    lanes = min(_live(shape, tile.TP, tile.TQ)[1], 32)
    lines = 32 / lanes if tile.IM > 1 or lanes < shape.W else 2
    loads = units / 32 * (quad * lines + 4)
    threads = 32 * (tile.WARPS_M * tile.WARPS_N * tile.WARPS_K + tile.STAGERS)
    outputs = pixels // positions * tile.TK / threads
    last = _TRIP_CLOCKS + outputs * (40 + 6 * positions * tile.WARPS_K) * threads / 128

    def together(count):
        if not count:
            return 0
        chunk = max(count * multiply, count * loaded / _L2_BYTES, count * loads, stage)
        return _START_CLOCKS + stage + chunks * (chunk + 150) + count * last

    full, rest = divmod(blocks, machine.sm_count * tile.BLOCKS_PER_SM)
    return full * together(tile.BLOCKS_PER_SM) + together(
        ceil_div(rest, machine.sm_count)
    )


def conv_tiles(shape, n, machine, mode, least=0):
    """All tiles for a batch of about ``n``, with at least so many sums a block."""
    p, q = shape.pooled
    used_p, used_q = p * shape.pool[0], q * shape.pool[1]
    quads = _round_up(ceil_div(shape.C, 8 if mode == 2 else 4), 2)
    for images in (1, 2, 4, 8, 16, 32):
        # narrow planes need them to fill groups of pixels, whatever the batch
        if images > 16 and images >= 2 * n:
            break
        for tile_q in _extents(used_q, shape.pool[1]):
            if tile_q * images % 8 or tile_q * images > 128:
                continue
            for tile_p in _extents(used_p, shape.pool[0]):
                pixels = tile_p * tile_q * images
                if pixels % 16 or pixels > 512:
                    continue
                for tk in (8, 16, 32, 64, 128):
                    if tk >= 2 * _round_up(shape.K, 8):
                        break
                    if pixels * tk < least:
                        continue
                    for cq in (2, 4, 8, 16):
                        if cq > quads:
                            break
                        yield from _completed(
                            shape, machine, mode, images, tile_p, tile_q, tk, cq
                        )


def _completed(shape, machine, mode, images, tile_p, tile_q, tk, cq, extra=0):
    pixels = images * tile_p * tile_q
    most, total = machine.shared
    chunks, x_bytes, w_row = _geometry(shape, tile_p, tile_q, images, tk, cq, mode)
    quad, doubled = (8 if mode == 2 else 4), (2 if mode == 0 else 1)
    kept = min(chunks, 2)  # chunks of the filter and buffers of the input at least
    # a slot is a filter row, or all of them where they are small
    w_rows = shape.R if shape.R * w_row <= 12 << 10 else 1
    groups = shape.R // w_rows
    for blocks in (1, 2):
        shared = min(most, total // blocks - 1) * 1024 - extra
        room = (shared - kept * x_bytes - 4 * tk - 512) // (w_rows * w_row + 8)
        slots = min(room, chunks * groups, 24)
        if slots < kept * groups:
            continue
        for wgmma, m, n, k in _warp_layouts(
            machine, pixels, images * tile_q, tile_p, tk, cq
        ):
            sums = pixels * tk // (32 * m * n)
            if wgmma:
                multiplier = doubled * sums + 40
            else:
                fragments = pixels // 16 // m + ceil_div(tk // 8 // n, 2)
                multiplier = doubled * (sums + 4 * fragments) + fragments + 36
            for stagers in (8, 4):
                threads = 32 * (m * n * k + stagers)
                _, mine, batch = _staging(
                    shape, tile_p, tile_q, images, cq, stagers, quad
                )
                stager = 2 * mine + batch * quad + 28
                registers = min(255, 65536 // (threads * blocks) // 8 * 8)
                staging = slots * w_rows * w_row + kept * x_bytes
                z_bytes = k * tk * (pixels + 4) * 4
                needed = _round_up(max(staging, z_bytes), 16) + 4 * tk + 8 * slots + 32
                if (
                    threads <= 512
                    and max(multiplier, stager) <= registers
                    and needed <= shared
                ):
                    yield Tile(
                        images,
                        tile_p,
                        tile_q,
                        tk,
                        cq,
                        w_rows,
                        slots,
                        wgmma,
                        m,
                        n,
                        k,
                        stagers,
                        blocks,
                        needed,
                    )
                    break


def block_plan(shape, tile, mode):
    """The plan for a layer and a tile."""
    quad = 8 if mode == 2 else 4
    p, q = shape.pooled
    channel_tiles = ceil_div(shape.K, tile.TK)
    return Plan(
        "conv_block_forward",
        (
            *_shape_options(shape),
            ("MODE", mode),
            ("FIRST", 0),
            *zip(Tile._fields, tile),
        ),
        bool(tile.WGMMA),
        32 * (tile.WARPS_M * tile.WARPS_N * tile.WARPS_K + tile.STAGERS),
        tile.SHARED_BYTES,
        tile.IM,
        ceil_div(p, tile.TP // shape.pool[0]) * ceil_div(q, tile.TQ // shape.pool[1]),
        channel_tiles,
        FilterLayout(
            mode,
            shape.C,
            shape.R * shape.S,
            tile.W_ROWS * shape.S,
            tile.CQ,
            tile.TK,
            ceil_div(shape.C, quad * tile.CQ),
            channel_tiles,
        ),
    )


# The convolution of few input channels


def few_plan(shape, n, machine, mode, gather=False):
    """The plan of ``conv_few_forward.cu``, or None if the layer is not for it."""
    positions = shape.pool[0] * shape.pool[1]
    if shape.C > FEW_CHANNELS or positions > _MAX_POSITIONS:
        return None
    p, q = shape.pooled
    parts = 2 if mode == 0 else 1
    m_tiles = min(
        ceil_div(shape.K, 16), 4 // parts, max(1, _MAX_POSITIONS // positions)
    )
    groups = max(1, 2 // positions)
    channel_tiles = ceil_div(shape.K, 16 * m_tiles)
    steps = ceil_div(shape.C * shape.R * shape.S, 8)
    for row_tiles in range(1, p + 1):
        rows = ceil_div(p, row_tiles)
        passes = ceil_div(rows * q, 8 * groups)
        x_rows = (rows * shape.pool[0] - 1) * shape.stride[0] + shape.R
        words = shape.C * x_rows * (shape.W + 2 * shape.padding[1])
        words += 16 * m_tiles * (8 * steps + 4)
        shared = 4 * parts * words
        # enough blocks and warps with little to do each, if the rows allow it
        blocks = n * ceil_div(p, rows) * channel_tiles
        quick = passes <= 18 and (blocks >= machine.sm_count or passes <= 4)
        if shared <= machine.shared[0] * 1024 and (quick or rows == 1):
            break
    else:
        return None
    warps = ceil_div(passes, ceil_div(passes, 9))
    options = (
        *_shape_options(shape),
        ("MODE", mode),
        ("TK", 16 * m_tiles),
        ("TPP", rows),
        ("GROUPS", groups),
        ("WARPS", warps),
        ("SHARED_BYTES", shared),
        ("GATHER", gather),
    )
    return Plan(
        "conv_few_forward",
        options,
        False,
        32 * warps,
        shared,
        1,
        ceil_div(p, rows),
        channel_tiles,
    )


# Two convolutions in one kernel


@lru_cache(None)
def pair_plan(first, second, n, machine, mode, gather=False):
    """The plan for a first convolution and the one behind it, or None.

    A block makes all of the first one's output for an image and multiplies it at once,
    so that must fit its shared memory beside the second filter. Not for "fp32".
    """
    quad = 8 if mode == 2 else 4
    positions = first.pool[0] * first.pool[1]
    m_tiles = ceil_div(first.K, 16)
    if mode == 0 or machine.capability < (8, 0) or first.C > FEW_CHANNELS:
        return None
    if min(*first.pooled, *second.pooled) < 1 or (first.K, *first.pooled) != second[:3]:
        return None
    if m_tiles * positions > _MAX_POSITIONS:
        return None
    cq = _round_up(ceil_div(second.C, quad), 2)
    steps = ceil_div(first.C * first.R * first.S, 8)
    rows = (second.H * first.pool[0] - 1) * first.stride[0] + first.R
    image_bytes = first.C * rows * (first.W + 2 * first.padding[1])
    extra = 4 * (image_bytes + 16 * m_tiles * (8 * steps + 4)) + 16
    used_p = second.pooled[0] * second.pool[0]
    used_q = second.pooled[1] * second.pool[1]
    kept = min(64, steps * m_tiles * 4)  # registers of the first filter
    best = None
    wide = _round_up(used_q, 8 * second.pool[1])
    for tile_p in _extents(used_p, second.pool[0]):
        for tile_q in {*_extents(used_q, second.pool[1]), wide}:
            if (
                tile_p < used_p
                or tile_q < used_q
                or tile_q % 8
                or tile_p * tile_q > 512
            ):
                continue
            for tk in (8, 16, 32, 64, 128):
                if tk < second.K and tk < 128 or tile_p * tile_q % 16:
                    continue
                for tile in _completed(
                    second, machine, mode, 1, tile_p, tile_q, tk, cq, extra
                ):
                    threads = 32 * (
                        tile.WARPS_M * tile.WARPS_N * tile.WARPS_K + tile.STAGERS
                    )
                    if kept + 4 * m_tiles * positions + 44 > 65536 // threads:
                        continue
                    price = _price(second, n, machine, tile, mode)
                    if tile.BLOCKS_PER_SM == 1 and (best is None or price < best[0]):
                        best = price, tile
                if tk >= second.K:
                    break
    if best is None:
        return None
    tile = best[1]._replace(SHARED_BYTES=best[1].SHARED_BYTES + extra)
    plan = block_plan(second, tile, mode)
    names = "CHWKRS"
    options = {
        **dict(plan.options),
        **{f"FIRST_{name}": value for name, value in zip(names, first[:6])},
        **{f"FIRST_{name}": value for name, value in _shape_options(first)[6:]},
        "FIRST_GROUPS": max(1, 4 // positions // m_tiles),
        "FIRST": 1,
        "GATHER": gather,
    }
    for unused in ("FIRST_K", "FIRST_HAS_CODE"):
        del options[unused]
    return plan._replace(options=tuple(options.items()))


@lru_cache(None)
def _best_tile(shape, n, machine, mode):
    p, q = shape.pooled
    # small tiles read more: they are for layers too small to fill the GPU, or for what
    # fits no other way
    least = min(8192, n * p * q * shape.K // (4 * machine.sm_count))
    tiles = list(conv_tiles(shape, n, machine, mode, least))
    return min(
        tiles or conv_tiles(shape, n, machine, mode),
        key=lambda tile: _price(shape, n, machine, tile, mode),
        default=None,
    )


@lru_cache(None)
def conv_plan(shape, n, machine, mode, gather=False):
    """The plan for a layer and a batch of up to ``n``; None where there is none.

    ``gather``: its input is a :class:`Gather`, for which there are only first layers.
    """
    if min(shape.pooled) < 1 or machine.capability < (8, 0):
        return None
    plan = few_plan(shape, n, machine, mode, gather)
    if plan is not None or gather:
        return plan
    # one tile for all layers of this shape, so that they share a packed filter
    tile = _best_tile(shape._replace(relu=True, bias=True, code=True), n, machine, mode)
    return None if tile is None else block_plan(shape, tile, mode)


# Linear layers


@lru_cache(None)
def linear_plan(n, i, o, relu, bias, machine, mode, aligned=True):
    """The plan of a linear layer for a batch up to ``n``; None where there is none."""
    if machine.capability < (8, 0):
        return None
    # larger tiles read less, smaller ones finish sooner: as large as keeps the GPU busy
    for m_tiles, n_tiles in ((4, 4), (2, 4), (2, 2), (1, 2), (1, 1)):
        grid = ceil_div(n, 16 * m_tiles), ceil_div(o, 8 * n_tiles)
        if grid[0] * grid[1] >= machine.sm_count:
            break
    most = 4 if (m_tiles, n_tiles) == (4, 4) else 8  # static shared memory: 48 KiB
    warps = min(most, ceil_div(i, 16))
    options = (
        ("KERNEL", 0),
        ("VECTORS", aligned and i % 4 == 0),
        ("I", i),
        ("O", o),
        ("RELU", relu),
        ("HAS_BIAS", bias),
        ("MODE", mode),
        ("M_TILES", m_tiles),
        ("N_TILES", n_tiles),
        ("WARPS", warps),
    )
    return Plan(
        "linear_block_forward", options, False, 32 * warps, 0, 16 * m_tiles, 1, grid[1]
    )


_HEAD_WORK = 1 << 17  # weights of a head; one cluster of blocks has to do it all


@lru_cache(None)
def head_plan(i, o, bias, machine, mode, aligned=True):
    """The plan of a head of ``o`` classes; None where there is none."""
    if machine.capability < (8, 0) or o > 1024 or i * o > _HEAD_WORK:
        return None
    cluster = 8 if machine.capability >= (9, 0) and machine.capability < (12, 0) else 1
    warps, n_tiles = 8, min(ceil_div(o, 8), 8)
    pitch = 8 * n_tiles
    shared = 4 * 16 * (warps * (pitch + 8) + _round_up(o, pitch))
    options = (
        ("KERNEL", 1),
        ("VECTORS", aligned and i % 4 == 0),
        ("I", i),
        ("O", o),
        ("HAS_BIAS", bias),
        ("MODE", mode),
        ("N_TILES", n_tiles),
        ("WARPS", warps),
        ("CLUSTER", cluster),
        ("SHARED_BYTES", shared),
    )
    return Plan(
        "linear_block_forward", options, False, 32 * warps, shared, 1, 1, cluster
    )


@lru_cache(None)
def tail_plan(i, hidden, o, relu, bias, bias_out, machine, mode, aligned=True):
    """The plan of a linear layer and the head behind it; None where there is none."""
    clusters = (9, 0) <= machine.capability < (12, 0)
    if not clusters or hidden > 256 or o > 32:
        return None
    options = (
        ("KERNEL", 2),
        ("VECTORS", aligned and i % 4 == 0),
        ("I", i),
        ("HID", hidden),
        ("O", o),
        ("RELU", relu),
        ("HAS_BIAS", bias),
        ("HAS_BIAS_OUT", bias_out),
        ("MODE", mode),
        ("N_TILES", ceil_div(hidden, 64)),
        ("WARPS", 8),
    )
    return Plan("linear_block_forward", options, False, 256, 0, 16, 8, 1)


# The operations

_get = gpu_device.get


@lru_cache(None)
def _machine(index):
    gpu = _get(index)
    return Machine(gpu.arch, gpu.sm_count)


def _batch(n):
    """The batch that plans are made for: a power of two, so that few are made."""
    return 1 << max(n - 1, 0).bit_length()


class _Kernels(NamedTuple):
    plan: Plan
    run: Kernel
    pack: Kernel | None


@lru_cache(None)
def _kernels(plan, name, signature):
    definitions = plan.definitions
    run = Kernel(plan.library, name, signature, definitions, plan.specific)
    pack = None
    if plan.layout is not None:
        pack = Kernel(
            plan.library, "conv_pack_filter", "PP", definitions, plan.specific
        )
    return _Kernels(plan, run, pack)


def _conv_shape(x_shape, w_shape, bias_shape, relu, pool, stride, padding):
    """(ConvShape, shape of y); ShapeError where they do not fit."""
    y_shape = n, k, _, _ = shapes.conv2d_output_shape(
        x_shape, w_shape, stride, padding, bias_shape=bias_shape
    )
    if pool is not None:
        y_shape = shapes.pool2d_output_shape(y_shape, pool, pool)
    shape = ConvShape(
        *x_shape[1:],
        k,
        *w_shape[2:],
        stride,
        padding,
        pool or (1, 1),
        bool(relu),
        bias_shape is not None,
        pool is not None,
    )
    return shape, y_shape


def conv_output_shape(x_shape, block) -> tuple:
    """Shape of the y of a convolution block, given its ``ConvBlock.geometry``."""
    return _conv_shape(x_shape, *block)[1]


@lru_cache(512)
def _conv(x_shape, block, index, precision, gather=False):
    """(shape of y, kernels or None) of a convolution block.

    ``block``: shape of the weight, of the bias or None, relu, pool, stride, padding.
    """
    return _conv_on(_machine(index), x_shape, block, precision, gather)


def _conv_on(machine, x_shape, block, precision, gather=False):
    shape, y_shape = _conv_shape(x_shape, *block)
    plan = conv_plan(shape, _batch(x_shape[0]), machine, _MODES[precision], gather)
    if plan is None:
        return y_shape, None
    if plan.library == "conv_few_forward":
        signature = ("PPffP" if gather else "P") + "PPPP"
    else:
        signature = "PPPPPii"
    return y_shape, _kernels(plan, plan.library, signature)


def conv_block_supported(x_shape, w_shape, pool, stride, padding, index) -> bool:
    """Whether :func:`conv_block_forward` can do it on GPU ``index``, in any precision.

    It asks for an NVIDIA GPU of compute capability 8.0 or later and for a tile that
    fits its shared memory. Dilation, groups and overlapping windows are for the unfused
    operations.
    """
    block = w_shape, None, True, pool, stride, padding
    return all(_conv(x_shape, block, index, mode)[1] for mode in _MODES)


def gather_supported(x_shape, w_shape, pool, stride, padding, index) -> bool:
    """The same where x is a :class:`Gather`: for few channels."""
    block = w_shape, None, True, pool, stride, padding
    return all(_conv(x_shape, block, index, mode, True)[1] for mode in _MODES)


def conv_block_kernels(
    machine, precision, x_shape, w_shape, bias, relu, pool, stride, padding, gather
) -> list:
    """The kernels of :func:`conv_block_forward`, none where it is not supported.

    Parameters
    ----------
    machine : Machine
    precision : {"fp32", "tf32", "bf16"}
    x_shape, w_shape : tuple of int
    bias : bool
    relu, pool, stride, padding
        As there.
    gather : bool
        Whether x is a :class:`Gather`, if the kernel takes one.

    Returns
    -------
    list of Kernel
    """
    block = w_shape, None, True, pool, stride, padding
    if not all(_conv_on(machine, x_shape, block, mode)[1] for mode in _MODES):
        return []
    block = w_shape, w_shape[:1] if bias else None, relu, pool, stride, padding
    made = None
    if gather:
        made = _conv_on(machine, x_shape, block, precision, True)[1]
    made = made or _conv_on(machine, x_shape, block, precision)[1]
    return [made.run] if made.pack is None else [made.pack, made.run]


def _unsupported(what, *given):
    return NotImplementedError(
        f"no fused kernel for {what} {', '.join(map(str, given))} on this GPU: use the "
        f"unfused layers"
    )


class PackedFilter:
    """A filter as some kernels want it, kept beside the filter itself.

    A kernel that is given none packs the filter for itself, in a launch of its own.
    Whoever changes the filter packs it anew, with :meth:`refresh` or, as
    :class:`~cycnn.ops.fused_cuda_backward.Updater` does, where it writes the filter.

    Attributes
    ----------
    data : Tensor
    layout : FilterLayout
    settled : bool
        Whether some other kernel is queued between the one that wrote it last and the
        next one that reads it. That one may then fetch it before the kernel ahead has
        finished.
    """

    def __init__(self, kernels, weight):
        self._kernel, self._weight = kernels.pack, weight
        self.layout = kernels.plan.layout
        self.data = empty_on_gpu((self.layout.words,), _FLOAT32, weight.device)
        self.refresh()

    def refresh(self) -> None:
        """Pack the filter as it is now."""
        self.settled = False
        self._kernel(
            _get(self._weight.device.index).compute,
            ceil_div(self.layout.threads, 256),
            256,
            self._weight,
            self.data,
            dependent=True,
        )


def _packed(kernels, weight, kept):
    """``kept`` if it is what the kernels want, else the filter packed now."""
    if kept is not None and kept.layout == kernels.plan.layout:
        return kept
    return PackedFilter(kernels, weight)


def pack_filter(weight, x_shape, pool, stride=(1, 1), padding=(0, 0)):
    """The packed filter for :func:`conv_block_forward` of an x of this shape.

    Packing ahead takes a launch out of the forward pass.

    Returns
    -------
    PackedFilter or None
        None where the kernel takes the filter as it is.
    """
    block = weight.shape, None, True, pool, stride, padding
    _, kernels = _conv(x_shape, block, weight.device.index, get_precision())
    if kernels is None:
        raise _unsupported("a convolution of", x_shape, weight.shape)
    return None if kernels.pack is None else PackedFilter(kernels, weight)


def conv_block_forward(
    x, weight, bias, relu, pool, stride=(1, 1), padding=(0, 0), packed=None
):
    """Convolution, ReLU if ``relu`` and max pooling if ``pool``, in one kernel.

    Parameters
    ----------
    x : Tensor (N, C, H, W), or Gather where C is at most FEW_CHANNELS
    weight : Tensor (K, C, R, S)
    bias : Tensor (K,) or None
    relu : bool
    pool : tuple of int or None
        Height and width of the windows, which are also their distance. Rows and columns
        left over are dropped.
    stride, padding : tuple of int
    packed : PackedFilter or None
        The same filter, packed; used if it is packed for this precision and about this
        batch.

    Returns
    -------
    y : Tensor (N, K, P, Q), pooled
    code : uint8 Tensor like y, or None without ``pool``
        0 where no gradient passes (``relu`` and y <= 0), else 1 + the position of the
        first maximum in its window, row by row.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`conv_block_supported` says no.
    """
    device = weight.device
    gather = isinstance(x, Gather)
    bias_shape = None if bias is None else bias.shape
    block = weight.shape, bias_shape, relu, pool, stride, padding
    y_shape, kernels = _conv(x.shape, block, device.index, get_precision(), gather)
    if kernels is None:
        raise _unsupported("a convolution of", x.shape, weight.shape)
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    code = None if pool is None else empty_on_gpu(y_shape, _UINT8, device)
    n = y_shape[0]
    if n:
        plan = kernels.plan
        arguments = *(x.arguments if gather else (x,)), weight, bias, y, code
        if kernels.pack is not None:
            packed = _packed(kernels, weight, packed)
            arguments = x, packed.data, bias, y, code, n, packed.settled
        kernels.run(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            *arguments,
            shared=plan.shared,
            dependent=True,
        )
    return y, code


@lru_cache(512)
def _pair(x_shape, first, second, index, precision, gather):
    """(shape of y1, of y2, kernels or None); first and second as in _conv."""
    return _pair_on(_machine(index), x_shape, first, second, precision, gather)


def _pair_on(machine, x_shape, first, second, precision, gather):
    one, y1_shape = _conv_shape(x_shape, *first)
    two, y2_shape = _conv_shape(y1_shape, *second)
    plan = pair_plan(one, two, _batch(x_shape[0]), machine, _MODES[precision], gather)
    if plan is None:
        return y1_shape, y2_shape, None
    signature = ("PPffP" if gather else "P") + "PPPP" + "PPPPii"
    return y1_shape, y2_shape, _kernels(plan, plan.library, signature)


def conv_pair_supported(x_shape, first, second, index, gather=False) -> bool:
    """Whether :func:`conv_pair_forward` has a kernel, in the precision that is set."""
    given = x_shape, first.geometry, second.geometry, index, get_precision(), gather
    return bool(_pair(*given)[2])


def conv_pair_kernels(machine, precision, x_shape, first, second, gather) -> list:
    """The kernels of :func:`conv_pair_forward`; see :func:`conv_block_kernels`.

    ``first`` and ``second`` are the ``geometry`` of a :class:`ConvBlock`.
    """
    made = _pair_on(machine, x_shape, first, second, precision, gather)[2]
    return [] if made is None else [made.pack, made.run]


def pack_pair_filter(x_shape, first, second, gather=False):
    """The packed filter of ``second``, as :func:`pack_filter`."""
    index = second.weight.device.index
    given = x_shape, first.geometry, second.geometry, index, get_precision(), gather
    kernels = _pair(*given)[2]
    if kernels is None:
        raise _unsupported("convolutions of", x_shape, first.geometry, second.geometry)
    return PackedFilter(kernels, second.weight)


def conv_pair_forward(x, first, second, packed=None):
    """A first convolution block of few channels and the one behind it, in one kernel.

    The result is that of two calls of :func:`conv_block_forward`.

    Parameters
    ----------
    x : Tensor (N, C, H, W) or Gather
    first, second : ConvBlock
    packed : PackedFilter or None
        Of ``second``; see :func:`conv_block_forward`.

    Returns
    -------
    y1, code1, y2, code2 : Tensor or None

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`conv_pair_supported` says no.
    """
    device = first.weight.device
    gather = isinstance(x, Gather)
    y1_shape, y2_shape, kernels = _pair(
        x.shape,
        first.geometry,
        second.geometry,
        device.index,
        get_precision(),
        gather,
    )
    if kernels is None:
        raise _unsupported("convolutions of", x.shape, first.geometry, second.geometry)
    y1, y2 = (empty_on_gpu(shape, _FLOAT32, device) for shape in (y1_shape, y2_shape))
    code1, code2 = (
        None if block.pool is None else empty_on_gpu(shape, _UINT8, device)
        for block, shape in ((first, y1_shape), (second, y2_shape))
    )
    n = x.shape[0]
    if n:
        plan = kernels.plan
        packed = _packed(kernels, second.weight, packed)
        kernels.run(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            *(x.arguments if gather else (x,)),
            first.weight,
            first.bias,
            y1,
            code1,
            packed.data,
            second.bias,
            y2,
            code2,
            n,
            packed.settled,
            shared=plan.shared,
            dependent=True,
        )
    return y1, code1, y2, code2


def _aligned(*tensors):
    """Whether they start at multiples of 16 bytes, as all do but foreign ones."""
    return not any(tensor.ptr % 16 for tensor in tensors)


def linear_block_forward(x, weight, bias, relu):
    """A linear layer, and ReLU if ``relu``, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight : Tensor (O, I)
    bias : Tensor (O,) or None
    relu : bool

    Returns
    -------
    Tensor (N, O)

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        Before compute capability 8.0.
    """
    device = x.device
    y_shape = n, outputs = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    plan = linear_plan(
        _batch(n),
        x.shape[1],
        outputs,
        bool(relu),
        bias is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a linear layer of", x.shape, weight.shape)
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    if n:
        _linear_kernel(plan)(
            _get(device.index).compute,
            plan.grid(n),
            plan.block,
            x,
            weight,
            bias,
            y,
            n,
            dependent=True,
        )
    return y


def _linear_kernel(plan):
    return _kernels(plan, "linear_block_forward", "PPPPi").run


def linear_block_kernels(machine, precision, n, inputs, outputs, bias, relu) -> list:
    """The kernels of :func:`linear_block_forward`; see :func:`conv_block_kernels`."""
    plan = linear_plan(
        _batch(n), inputs, outputs, relu, bias, machine, _MODES[precision]
    )
    return [] if plan is None else [_linear_kernel(plan)]


def head_supported(inputs, classes, index) -> bool:
    """Whether :func:`head_forward` can do it on GPU ``index``; for few weights."""
    return head_plan(inputs, classes, True, _machine(index), 0) is not None


def _head_kernel(plan):
    return _kernels(plan, "head_forward", "PPPPPPPi").run


def head_kernels(machine, precision, inputs, classes, bias) -> list:
    """The kernels of :func:`head_forward`; see :func:`conv_block_kernels`."""
    plan = head_plan(inputs, classes, bias, machine, _MODES[precision])
    return [] if plan is None else [_head_kernel(plan)]


def head_forward(x, weight, bias, labels):
    """The last linear layer with log-softmax, mean NLL and its gradient, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight : Tensor (O, I)
    bias : Tensor (O,) or None
    labels : int32 Tensor (N,)

    Returns
    -------
    log_probs : Tensor (N, O)
    loss : Tensor ()
        Their mean at the labels, negated; NaN for a label that is no class, and for an
        empty batch.
    dlogits : Tensor (N, O)
        (softmax - onehot) / N, the gradient of the loss.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`head_supported` says no.
    """
    device = x.device
    y_shape = n, classes = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    shapes.check_labels("x weight^T", y_shape, labels.shape)
    plan = head_plan(
        x.shape[1],
        classes,
        bias is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a head of", x.shape, weight.shape)
    log_probs = empty_on_gpu(y_shape, _FLOAT32, device)
    dlogits = empty_on_gpu(y_shape, _FLOAT32, device)
    loss = empty_on_gpu((), _FLOAT32, device)
    _head_kernel(plan)(
        _get(device.index).compute,
        plan.channel_tiles,
        plan.block,
        x,
        weight,
        bias,
        labels,
        log_probs,
        loss,
        dlogits,
        n,
        shared=plan.shared,
        dependent=True,
    )
    return log_probs, loss, dlogits


def tail_supported(inputs, hidden, classes, index) -> bool:
    """Whether :func:`tail_forward` can do it on GPU ``index``: Hopper, a small tail."""
    machine = _machine(index)
    return tail_plan(inputs, hidden, classes, True, True, True, machine, 0) is not None


def _tail_kernel(plan):
    return _kernels(plan, "tail_forward", "PPPPPPPPPPi").run


def tail_kernels(
    machine, precision, inputs, hidden, classes, relu, bias, bias_out
) -> list:
    """The kernels of :func:`tail_forward`; see :func:`conv_block_kernels`."""
    given = inputs, hidden, classes, relu, bias, bias_out
    plan = tail_plan(*given, machine, _MODES[precision])
    return [] if plan is None else [_tail_kernel(plan)]


def tail_forward(x, weight, bias, relu, weight_out, bias_out, labels):
    """A linear layer, ReLU if ``relu``, and the head behind it, in one kernel.

    Parameters
    ----------
    x : Tensor (N, I)
    weight, bias : Tensor (H, I), Tensor (H,) or None
    relu : bool
    weight_out, bias_out : Tensor (O, H), Tensor (O,) or None
    labels : int32 Tensor (N,)

    Returns
    -------
    hidden : Tensor (N, H)
    log_probs : Tensor (N, O)
    losses : Tensor (N,)
        -log_probs at the labels, whose mean is the loss; NaN for a label that is no
        class.
    dlogits : Tensor (N, O)
        (softmax - onehot) / N, the gradient of the mean.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    NotImplementedError
        If :func:`tail_supported` says no.
    """
    device = x.device
    hidden_shape = shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    y_shape = n, classes = shapes.linear_output_shape(
        hidden_shape, weight_out.shape, None if bias_out is None else bias_out.shape
    )
    shapes.check_labels("the scores", y_shape, labels.shape)
    plan = tail_plan(
        x.shape[1],
        hidden_shape[1],
        classes,
        bool(relu),
        bias is not None,
        bias_out is not None,
        _machine(device.index),
        _MODES[get_precision()],
        _aligned(x, weight),
    )
    if plan is None:
        raise _unsupported("a tail of", x.shape, weight.shape, weight_out.shape)
    hidden = empty_on_gpu(hidden_shape, _FLOAT32, device)
    log_probs = empty_on_gpu(y_shape, _FLOAT32, device)
    dlogits = empty_on_gpu(y_shape, _FLOAT32, device)
    losses = empty_on_gpu((n,), _FLOAT32, device)
    if n:
        _tail_kernel(plan)(
            _get(device.index).compute,
            plan.grid(n)[0],
            plan.block,
            x,
            weight,
            bias,
            weight_out,
            bias_out,
            labels,
            hidden,
            log_probs,
            losses,
            dlogits,
            n,
            dependent=True,
        )
    return hidden, log_probs, losses, dlogits
