"""How cuda/templates/conv_block_backward.cu is cut for a layer: tiles, warps, bytes.

Pure integer arithmetic on shapes; it needs no GPU. The constants have the names of the
kernel's macros, where their meaning is explained.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

WARPS = 8
THREADS = 32 * WARPS
# Registers for accumulators and operands: of the 128 that a thread may have when two blocks
# share a multiprocessor, addresses and loads in flight take the others. The loads of the
# weight gradient keep more numbers in flight.
_DATA_REGISTERS, _WEIGHT_REGISTERS = 100, 84
# ... and what a block that has a multiprocessor for itself has more.
_REGISTERS_ALONE = 100
# What one block may use on every GPU from compute capability 8.0 on.
_SHARED_LIMIT = 99 * 1024
# Multiprocessors that the choice of tiles is made for, and a typical batch.
_PROCESSORS, _BATCH = 132, 128
_MODES = {"fp32": 0, "tf32": 1, "bf16": 2}
# Clocks: a tensor-core product of a warp, a word of shared memory for each of its lanes,
# a float fetched into shared memory by a block.
_MMA, _LOAD, _FETCH = 1.6, 0.6, 0.15


class NoPlan(ValueError):
    """A layer whose tiles fit no multiprocessor."""


@dataclass(frozen=True)
class Shape:
    """A conv block: x (N, C, H, W), weight (K, C, R, S), pool (0, 0) for none."""

    channels: int
    height: int
    width: int
    filters: int
    taps: tuple
    stride: tuple
    padding: tuple
    pool: tuple
    relu: bool

    @property
    def conv_output(self) -> tuple:
        return tuple(
            (size + 2 * pad - taps) // step + 1
            for size, pad, taps, step in zip(
                (self.height, self.width), self.padding, self.taps, self.stride
            )
        )

    @property
    def output(self) -> tuple:
        """(PP, QQ): height and width of y."""
        return tuple(
            size // max(1, window) for size, window in zip(self.conv_output, self.pool)
        )

    @property
    def covered(self) -> tuple:
        """(P, Q): rows and columns of z that reach y."""
        return tuple(
            size * max(1, window) for size, window in zip(self.output, self.pool)
        )


@dataclass(frozen=True)
class Plan:
    """Macros of the kernel, and what a launch needs to know of them."""

    macros: tuple  # of (name, value)
    shared: int
    weight_tiles: int  # blocks that share a part of the batch
    weight_images: int  # images of a stage
    weight_rows: int  # stages of a group of images
    data_tiles: int  # blocks of a group of images
    data_images: int  # images of such a group

    @property
    def options(self) -> tuple:
        return tuple(f"-D{name}={value}" for name, value in self.macros)

    def data_blocks(self, batch: int) -> int:
        """Blocks that work on dx."""
        return self.data_tiles * _ceil(batch, self.data_images) if self.data_images else 0

    def splits(self, batch: int, processors: int) -> tuple:
        """(partial weight gradients, stages of each), for two blocks a multiprocessor."""
        stages = _ceil(batch, self.weight_images) * self.weight_rows
        wanted = max(1, 2 * processors // self.weight_tiles)
        each = _ceil(stages, min(stages, wanted))
        return _ceil(stages, each), each


def _ceil(a, b):
    return -(-a // b)


def _up(a, b):
    return _ceil(a, b) * b


def _stride(size, residue, modulus):
    return size + (residue - size) % modulus


def _powers(limit):
    return [n for n in (1, 2, 4, 8) if n <= limit]


def _pooled(shape):
    return shape.pool[0] > 0


# dx


def _column_groups(shape, columns):
    """For each group of columns the taps s that reach it, and the columns read."""
    step, pad, taps = shape.stride[1], shape.padding[1], shape.taps[1]
    width, out = shape.width, shape.covered[1]
    blocks = _ceil(_ceil(width, step), columns)
    groups, low, high = [], 0, out
    for phase in range(min(step, width)):
        for block in range(blocks):
            reached = 0
            for s in range(taps):
                if (phase + pad - s) % step:
                    continue
                first = (phase + pad - s) // step + block * columns
                if first + columns > 0 and first < out:
                    reached += 1
                    low, high = min(low, first), max(high, first + columns)
            groups.append(reached)
    return groups, low, high


def _row_pairs(shape, first_row, rows):
    """(rows of dz that reach these rows of dx, pairs of such a row and a tap r)."""
    step, pad, taps = shape.stride[0], shape.padding[0], shape.taps[0]
    reached = pairs = 0
    for p in range(shape.covered[0]):
        count = sum(
            first_row <= p * step + r - pad < first_row + rows for r in range(taps)
        )
        reached += count > 0
        pairs += count
    return reached, pairs


def _data_tile_words(shape, mode, columns, low, high, rows, images, channels, row_tiles):
    """(words of a k word of dz, words of a k word of weights)."""
    step, pad = shape.stride[0], shape.padding[0]
    taps, covered = shape.taps[0] * shape.taps[1], shape.covered[0]
    first = -((shape.taps[0] - 1 - pad) // step)
    last = (rows - 1 + pad) // step
    height = last - first + 1
    if row_tiles == 1:
        height = min(last + 1, covered) - max(first, 0)
    left = _up(-low, 4)
    pitch = _up(left + high, 4)
    several = columns < 8
    image = _stride(height * pitch, columns if several else 0, 8 if several else 4)
    return _stride(images * image, 8, 32), _stride(channels * taps, 8 * taps % 32, 32)


def _data_plans(shape, mode, registers=0):
    """All ways to cut the work on dx, each with its cost in clocks."""
    taps_h, taps_w = shape.taps
    step = shape.stride[0]
    k_words = _up(_ceil(shape.filters, 2 if mode == "bf16" else 1), 8)
    products = 3 if mode == "fp32" else 1
    row_choices = sorted(
        {n for n in range(1, 17) if n % step == 0} | {min(shape.height, 16)}
    )
    for columns in (8, 4, 2):
        groups, low, high = _column_groups(shape, columns)
        per_group = 8 // columns
        for wg in _powers(8):
            ng = _ceil(len(groups), wg)
            if ng > 6 or (wg > 1 and _ceil(len(groups), wg // 2) == ng):
                continue
            reached = max(
                sum(groups[i * ng : (i + 1) * ng]) for i in range(wg)
            )
            for mt, nr, ni in itertools.product((1, 2, 4), row_choices, (1, 2, 4)):
                accumulators = 4 * mt * nr * ni * ng
                fragments = taps_h * mt * 4 * (2 if mode == "fp32" else 1)
                if accumulators + fragments > _DATA_REGISTERS + registers:
                    continue
                if nr % step and nr < shape.height:
                    continue
                if 16 * mt >= 2 * shape.channels and mt > 1:
                    continue
                for wc, wr, wi in itertools.product(_powers(8), repeat=3):
                    wk, rest = divmod(WARPS, wc * wg * wr * wi)
                    if rest or wk not in (1, 2, 4, 8) or 8 * wk > k_words:
                        continue
                    if wr > 1 and nr * (wr // 2) >= shape.height:
                        continue
                    if nr * wr > shape.height and nr % step:
                        if wr > 1:
                            continue
                    rows, images = nr * wr, per_group * ni * wi
                    channels = 16 * mt * wc
                    if wc > 1 and channels >= 2 * _up(shape.channels, 16):
                        continue
                    row_tiles = _ceil(shape.height, rows)
                    c_tiles = _ceil(shape.channels, channels)
                    dz, weights = _data_tile_words(
                        shape, mode, columns, low, high, rows, images, channels, row_tiles
                    )
                    depth = _SHARED_LIMIT // 4 // (dz + weights) // (8 * wk) * 8 * wk
                    if depth == 0:
                        continue
                    depth = min(depth, _up(k_words, 8 * wk))
                    stages = _ceil(k_words, depth)
                    depth = _up(_ceil(k_words, stages), 8 * wk)
                    sums = (WARPS // wk) * accumulators * 32 if wk > 1 else 0
                    shared = 4 * max(depth * (dz + weights), sums)
                    if shared > _SHARED_LIMIT:
                        continue
                    # the strip with most work sets the pace
                    strips = {
                        _row_pairs(shape, h, nr) for h in range(0, shape.height, nr)
                    }
                    rows_read = max(s[0] for s in strips)
                    pairs = max(s[1] for s in strips)
                    steps = _up(k_words, 8 * wk) // 8 // wk
                    mma = steps * pairs * reached * ni * mt * products
                    words = steps * (
                        min(taps_w, reached) * taps_h * mt * 4
                        + rows_read * reached * ni * 2
                    )
                    fetch = k_words * (
                        images * min(shape.covered[0], rows + taps_h) * shape.covered[1]
                        + channels * taps_h * taps_w
                    )
                    blocks = c_tiles * row_tiles * _ceil(_BATCH, images)
                    resident = 2 if shared <= 110 * 1024 else 1
                    clocks = WARPS * (_MMA * mma + _LOAD * words) + _FETCH * fetch
                    clocks += 1500 + 300 * wk + 1000 * stages
                    # whole waves of blocks
                    waves = blocks / _PROCESSORS
                    if waves < resident:
                        waves = max(waves, _ceil(blocks, _PROCESSORS))
                    yield clocks * max(1.0, waves), {
                        "DX_COLUMNS": columns, "DX_MT": mt, "DX_NG": ng, "DX_NR": nr,
                        "DX_NI": ni, "DX_WC": wc, "DX_WG": wg, "DX_WR": wr, "DX_WI": wi,
                        "DX_WK": wk, "DX_KC": depth,
                    }, shared, c_tiles * row_tiles, images  # fmt: skip


# dweight


def _weight_tile_words(shape, mode, flat, columns, rows, images):
    """Words of an output channel of dz, an input channel of x, a window, a row of x."""
    per_word = 2 if mode == "bf16" else 1
    x_per_word = 1 if flat else per_word
    lane = 2 * per_word
    several = columns < 4 * lane
    quads = _ceil(shape.covered[1], columns)

    def plane(pitch, height, unit):
        residue = columns // unit % 8 if several else 0
        image = _stride(height * pitch, residue, 8 if several else 4)
        return _stride(images * image, 8, 32)

    step, taps, pad = shape.stride[1], shape.taps[1], shape.padding[1]
    left = _up(pad, 4 * x_per_word) if pad else 0
    skip = 0 if flat else (left - pad) % (2 * x_per_word)
    window = _up(_ceil(skip + taps + (lane - 1) * step, x_per_word), 2)
    last = left - pad - skip + (quads * columns - lane) * step + window * x_per_word
    pitch = _up(max(left + shape.width, last), 4 * x_per_word) // x_per_word
    height = (rows - 1) * shape.stride[0] + shape.taps[0]
    return (
        plane(_up(quads * columns // per_word, 4), rows, per_word),
        plane(pitch, height, x_per_word),
        window,
        pitch,
    )


def _weight_plans(shape, mode, registers=0):
    """All ways to cut the work on dweight, each with its cost in clocks."""
    taps_h, taps_w = shape.taps
    taps = taps_h * taps_w
    height, width = shape.covered
    lane = 4 if mode == "bf16" else 2
    products = 3 if mode == "fp32" else 1
    flat_columns = shape.channels * taps
    flat = shape.channels <= 4 and flat_columns <= 256
    padded = {c: _up(width, c) for c in (4 * lane, 2 * lane, lane)}
    columns = min(padded, key=lambda c: (padded[c], -c))
    per_step = 4 * lane // columns
    window_h = max(1, shape.pool[0])
    row_choices = [n for n in range(window_h, height + 1, window_h) if n <= 64]
    for mt, nt, vk, vp in itertools.product((1, 2, 4), (1, 2, 4), _powers(8), _powers(8)):
        if vk * vp > WARPS:
            continue
        if 16 * mt * vk >= 2 * _up(shape.filters, 16):
            continue
        for vc, rt in itertools.product(_powers(8), range(1, taps_h + 1)):
            vr, rest = divmod(WARPS, vk * vp * vc)
            if rest:
                continue
            if flat:
                n_columns = 8 * nt * vc
                if vr != 1 or rt != 1 or n_columns < flat_columns:
                    continue
                if n_columns >= flat_columns + 8 * nt:
                    continue
                channels, warp_taps = shape.channels, 1
            else:
                channels = 8 * nt * vc
                if vr * rt < taps_h or (vr // 2) * rt >= taps_h > 1 or (vr > taps_h):
                    continue
                if channels >= 2 * _up(shape.channels, 8):
                    continue
                warp_taps = rt * taps_w
            accumulators = 4 * mt * nt * warp_taps
            for rows in row_choices:
                for images in {per_step, 2 * per_step, 4 * per_step}:
                    dz, x, window, pitch = _weight_tile_words(
                        shape, mode, flat, columns, rows, images
                    )
                    held = (2 * nt if flat else rt * nt * window) + 4 * mt
                    if mode == "fp32":
                        held += 4 * mt + 4 * nt
                    if accumulators + held > _WEIGHT_REGISTERS + registers:
                        continue
                    k_tile = 16 * mt * vk
                    out_row = 8 * nt * vc if flat else channels * taps
                    words = k_tile * dz + channels * x
                    if not flat:
                        words += max(0, vr * rt - taps_h) * pitch
                    parts = 1 if vp * k_tile * out_row <= words else 2 * mt
                    shared = 4 * max(words, vp * k_tile // parts * out_row)
                    if shared > _SHARED_LIMIT:
                        continue
                    quads = padded[columns] // columns
                    for segment in {rows, *(n for n in (1, 2, 3, 4, 6, 8) if rows % n == 0)}:
                        units = images // per_step * quads * (rows // segment)
                        if units % vp:
                            continue
                        k_tiles = _ceil(shape.filters, k_tile)
                        c_tiles = 1 if flat else _ceil(shape.channels, channels)
                        stages = _ceil(_BATCH, images) * _ceil(height, rows)
                        row_steps = units // vp * segment * height / _up(height, rows)
                        mma = row_steps * mt * nt * warp_taps * products
                        if flat:
                            words = row_steps * (4 * mt + 2 * nt * (lane // 2))
                            extra = row_steps * nt * 4
                        else:
                            words = row_steps * (4 * mt + nt * window * max(1, rt if
                                shape.stride[0] >= rt else shape.stride[0]))
                            words += units // vp * nt * window * max(0, rt - 1)
                            extra = row_steps * (rt - 1) * nt * window / 8
                        x_rows = min((rows - 1) * shape.stride[0] + taps_h, shape.height)
                        fetch = images * (
                            k_tile * rows * width + channels * x_rows * shape.width
                        )
                        clocks = WARPS * (_MMA * mma + _LOAD * words + 0.5 * extra)
                        # a unit, a row of it and a stage take this long to begin
                        clocks += WARPS * (40 * units // vp + 10 * row_steps)
                        clocks += _FETCH * fetch + 1000
                        tiles = k_tiles * c_tiles
                        per_block = _ceil(stages * tiles, 2 * _PROCESSORS)
                        resident = 1.0 if shared <= 110 * 1024 else 1.3
                        finish = parts * 200 + k_tile * out_row * (20 + 2 * vp) / THREADS + 1500
                        total = 2 * (per_block * clocks + finish) * resident
                        if stages * tiles < 2 * _PROCESSORS:
                            total *= max(0.5, stages * tiles / (2 * _PROCESSORS))
                        yield total, {
                            "DW_FLAT": int(flat), "DW_COLUMNS": columns, "DW_MT": mt,
                            "DW_NT": nt, "DW_RT": rt, "DW_VK": vk, "DW_VC": vc,
                            "DW_VR": vr, "DW_VP": vp, "DW_TI": images, "DW_TP": rows,
                            "DW_SEGMENT": segment,
                        }, shared, tiles, images, _ceil(height, rows)  # fmt: skip


def _best(plans, shape, mode):
    """(blocks a multiprocessor, the cheapest plan)."""
    for blocks, more in ((2, 0), (1, _REGISTERS_ALONE)):
        found = min(plans(shape, mode, more), key=lambda plan: plan[0], default=None)
        if found is not None:
            return blocks, found
    raise NoPlan(f"no tile of the gradients of {shape} fits a multiprocessor")


@functools.lru_cache(maxsize=None)
def plan(shape: Shape, mode: str, need_dx: bool) -> Plan:
    """The cheapest cut for a layer, by a count of its instructions.

    Parameters
    ----------
    shape : Shape
    mode : {"fp32", "tf32", "bf16"}
    need_dx : bool

    Raises
    ------
    NoPlan
        If no tile fits into shared memory and registers.
    """
    macros = {
        "MODE": _MODES[mode], "C": shape.channels, "H": shape.height,
        "W": shape.width, "K": shape.filters, "R": shape.taps[0], "S": shape.taps[1],
        "STRIDE_H": shape.stride[0], "STRIDE_W": shape.stride[1],
        "PAD_H": shape.padding[0], "PAD_W": shape.padding[1],
        "POOL_H": shape.pool[0], "POOL_W": shape.pool[1], "RELU": int(shape.relu),
        "NEED_DX": int(need_dx),
    }  # fmt: skip
    blocks, found = _best(_weight_plans, shape, mode)
    _, chosen, shared, weight_tiles, weight_images, weight_rows = found
    macros.update(chosen)
    data_tiles = data_images = 0
    if need_dx:
        data_blocks, found = _best(_data_plans, shape, mode)
        _, chosen, data_shared, data_tiles, data_images = found
        macros.update(chosen)
        shared, blocks = max(shared, data_shared), min(blocks, data_blocks)
    macros.update(SHARED=shared, MIN_BLOCKS=blocks)
    return Plan(
        tuple(macros.items()),
        shared,
        weight_tiles,
        weight_images,
        weight_rows,
        data_tiles,
        data_images,
    )
