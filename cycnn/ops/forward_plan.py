"""How the fused forward kernels are compiled and launched for a layer.

The kernels (``cuda/templates/*_forward.cu``) are specialised for a layer: its shape,
its tile and the precision are options of the compiler, only the batch is known later. A
plan is what is chosen here: all plain integers, made without a GPU.

``mode`` is the precision, as in the kernels: 0 "fp32", 1 "tf32", 2 "bf16".
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..shapes import ceil_div

FEW_CHANNELS = 4  # of an input: as many as the kernels of first convolutions take
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
    def channels_of_unit(self) -> int:
        """Channels that 16 bytes hold."""
        return 8 if self.mode == 2 else 4

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
        shared = 4 * (parts * words + 8 * steps)
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
    so that must fit its shared memory beside the second filter. Not for "fp32", nor for
    batches so large that other blocks hide the time between the two.
    """
    quad = 8 if mode == 2 else 4
    positions = first.pool[0] * first.pool[1]
    m_tiles = ceil_div(first.K, 16)
    if mode == 0 or machine.capability < (8, 0) or first.C > FEW_CHANNELS:
        return None
    if n > 2 * machine.sm_count:
        return None
    if min(*first.pooled, *second.pooled) < 1 or (first.K, *first.pooled) != second[:3]:
        return None
    if m_tiles * positions > _MAX_POSITIONS:
        return None
    cq = _round_up(ceil_div(second.C, quad), 2)
    steps = ceil_div(first.C * first.R * first.S, 8)
    rows = (second.H * first.pool[0] - 1) * first.stride[0] + first.R
    image_bytes = first.C * rows * (first.W + 2 * first.padding[1])
    extra = 4 * (image_bytes + 16 * m_tiles * (8 * steps + 4) + 8 * steps) + 16
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


# A convolution with the linear layer and the head behind it


@lru_cache(None)
def conv_tail_plan(
    shape, layout, n, hidden, o, relu, bias, bias_out, machine, aligned=True
):
    """The plan of ``conv_tail_forward.cu``, or None.

    ``shape`` is that of the convolution, ``layout`` that of its filter, packed for
    "tf32"; ``relu`` and ``bias`` are of the linear layer. Not for more images than
    there are multiprocessors, where two kernels are as fast.
    """
    clusters = (9, 0) <= machine.capability < (12, 0)
    if not clusters or layout is None or shape.code:
        return None
    if n > machine.sm_count or hidden > 128 or o > 16:
        return None
    p, q = shape.output
    inputs = shape.K // 8 * p * q  # of a block
    # a warp keeps its filters and weights in registers
    words = ceil_div(shape.C, 64) * shape.R * shape.S
    if shape.C % 8 or shape.K % 8 or shape.K > 128 or words > 9:
        return None
    if min(p, q) < 1 or p * q > 4 or inputs % 16 or inputs > 64:
        return None
    image = shape.C * shape.H * shape.W
    floats = 8 * (image + (36 - image % 32) % 32) + 8 * 128 * p * q
    floats += 8 * (_round_up(inputs, 32) + 16) + 8 * 128
    # two blocks a multiprocessor
    if 4 * floats + 1024 > machine.shared[1] * 512:
        return None
    options = (
        *(
            option
            for option in _shape_options(shape)
            if option[0] not in ("POOL_H", "POOL_W", "HAS_CODE")
        ),
        ("HID", hidden),
        ("O", o),
        ("HIDDEN_RELU", relu),
        ("HAS_BIAS_HIDDEN", bias),
        ("HAS_BIAS_OUT", bias_out),
        ("VECTORS", aligned),
        ("SLOT_TAPS", layout.slot_taps),
        ("QUADS", layout.quads),
        ("TILE_K", layout.outputs),
        ("CHUNKS", layout.chunks),
        ("SHARED_BYTES", 4 * floats),
    )
    return Plan("conv_tail_forward", options, False, 288, 4 * floats, 8, 8, 1)
