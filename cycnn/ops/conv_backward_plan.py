"""How the backward of a convolution is cut for a layer: tiles, warps, bytes.

The kernel is cuda/templates/conv_block_backward.cu, or conv_small_backward.cu for a
layer so small that all of its blocks run at once.

Pure integer arithmetic on shapes; it needs no GPU. The constants have the names of the
kernels' macros, where their meaning is explained.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

WARPS = 8
THREADS = 32 * WARPS
# Registers for accumulators and operands: of the 128 that a thread may have when two
# blocks share a multiprocessor, addresses and loads in flight take the others.
_DATA_REGISTERS, _WEIGHT_REGISTERS = 100, 96
# ... and what a block that has a multiprocessor for itself has more.
_REGISTERS_ALONE = 100
# Bytes of shared memory that a block can have on every GPU from 8.0 on; on 9.0 and 10.0
# two such blocks share a multiprocessor.
SHARED_LIMIT = 99 * 1024
# Multiprocessors that the choice of tiles is made for, and a typical batch.
_PROCESSORS, _BATCH = 132, 128
_MODES = {"fp32": 0, "tf32": 1, "bf16": 2}
# Clocks of a multiprocessor: a product of 16 x 8 x 8 words, a word of an operand for
# each lane of a warp. In fp32 a product is three and four additions, and operands are
# split.
_MMA = {"fp32": 5.8, "tf32": 1.6, "bf16": 1.6}
_LOAD = {"fp32": 1.35, "tf32": 0.6, "bf16": 0.6}
# ... a float that a block fetches into shared memory
_FETCH = 0.1


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
    """A kernel's macros, and what a launch needs to know of them."""

    library: str
    macros: tuple  # of (name, value)
    shared: int
    weight_tiles: int  # blocks that share a part of the batch
    weight_images: int  # images of a stage
    weight_rows: int  # stages of a group of images
    data_tiles: int  # blocks of a group of images
    data_images: int  # images of such a group
    weight_share: float = 2  # blocks on dweight that are wanted, a multiprocessor

    @property
    def options(self) -> tuple:
        return tuple(f"-D{name}={value}" for name, value in self.macros)

    def data_blocks(self, batch: int) -> int:
        """Blocks that work on dx."""
        return (
            self.data_tiles * _ceil(batch, self.data_images) if self.data_images else 0
        )

    def splits(self, batch: int, processors: int) -> tuple:
        """(partial weight gradients, stages of each)."""
        stages = _ceil(batch, self.weight_images) * self.weight_rows
        wanted = max(1, int(self.weight_share * processors) // self.weight_tiles)
        each = _ceil(stages, min(stages, wanted))
        return _ceil(stages, each), each


def _ceil(a, b):
    return -(-a // b)


def _up(a, b):
    return _ceil(a, b) * b


def _stride(size, residue, modulus):
    return size + (residue - size) % modulus


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


def _data_tile_words(
    shape, mode, columns, low, high, rows, images, channels, row_tiles
):
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


def _warps(kinds):
    """All ways to give 8 warps to ``kinds`` axes."""
    if kinds == 1:
        return [(WARPS,)]
    found = []
    for first in (1, 2, 4, 8):
        for rest in itertools.product((1, 2, 4, 8), repeat=kinds - 2):
            last, remainder = divmod(WARPS, first * math.prod(rest))
            if not remainder:
                found.append((first, *rest, last))
    return found


def _row_choices(shape):
    """Rows of dx for a warp: the height in equal parts."""
    step, height = shape.stride[0], shape.height
    parts = {_ceil(height, n) for n in range(1, height + 1)}
    return sorted(
        {_up(n, step) for n in parts if _up(n, step) <= 16} | (parts & {height})
    )


def _data_plans(shape, mode, registers):
    """All ways to cut the work on dx: (clocks, macros, bytes, blocks, images)."""
    taps_h, taps_w = shape.taps
    height, step = shape.height, shape.stride[0]
    k_words = _up(_ceil(shape.filters, 2 if mode == "bf16" else 1), 8)
    row_work = {}
    for nr in _row_choices(shape):
        strips = [_row_pairs(shape, h, nr) for h in range(0, height, nr)]
        # the strip with most work sets the pace
        row_work[nr] = tuple(map(max, zip(*strips)))
    for columns in (8, 4, 2):
        groups, low, high = _column_groups(shape, columns)
        for wc, wg, wr, wi, wk in _warps(5):
            ng = _ceil(len(groups), wg)
            if ng > 6 or (wg > 1 and _ceil(len(groups), wg // 2) == ng):
                continue
            if 8 * wk > k_words:
                continue
            reached = max(sum(groups[i * ng : (i + 1) * ng]) for i in range(wg))
            for (nr, (rows_read, pairs)), mt, ni in itertools.product(
                row_work.items(), (1, 2, 4), (1, 2, 4)
            ):
                accumulators = 4 * mt * nr * ni * ng
                fragments = taps_h * mt * 4 * (2 if mode == "fp32" else 1)
                if accumulators + fragments > _DATA_REGISTERS + registers:
                    continue
                rows, images, channels = nr * wr, 8 // columns * ni * wi, 16 * mt * wc
                if wr > 1 and nr * (wr // 2) >= height or nr % step and wr > 1:
                    continue
                if channels >= 2 * _up(shape.channels, 16):
                    continue
                row_tiles = _ceil(height, rows)
                c_tiles = _ceil(shape.channels, channels)
                if row_tiles > 1 and nr % step:
                    continue
                dz, weights = _data_tile_words(
                    shape, mode, columns, low, high, rows, images, channels, row_tiles
                )
                unit = 8 * wk
                depth = SHARED_LIMIT // 4 // (dz + weights) // unit * unit
                if depth == 0:
                    continue
                stages = _ceil(k_words, depth)
                depth = _up(_ceil(k_words, stages), unit)
                sums = WARPS * accumulators * 32 if wk > 1 else 0
                shared = 4 * max(depth * (dz + weights), sums)
                if shared > SHARED_LIMIT:
                    continue
                steps = _up(k_words, unit) // unit
                mma = steps * pairs * reached * ni * mt
                words = steps * (
                    min(taps_w, reached) * taps_h * mt * 4
                    + rows_read * reached * ni * 2
                )
                fetch = k_words * (
                    images * min(shape.covered[0], rows + taps_h) * shape.covered[1]
                    + channels * taps_h * taps_w
                )
                clocks = WARPS * (_MMA[mode] * mma + _LOAD[mode] * words)
                clocks += _FETCH * fetch + 1500 + 300 * wk + 1000 * stages
                blocks = c_tiles * row_tiles * _ceil(_BATCH, images)
                waves = blocks / _PROCESSORS
                if waves < 2:
                    waves = _ceil(blocks, _PROCESSORS)
                macros = {
                    "DX_COLUMNS": columns, "DX_MT": mt, "DX_NG": ng, "DX_NR": nr,
                    "DX_NI": ni, "DX_WC": wc, "DX_WG": wg, "DX_WR": wr, "DX_WI": wi,
                    "DX_WK": wk, "DX_KC": depth,
                }  # fmt: skip
                yield clocks * waves, macros, shared, c_tiles * row_tiles, images


# dweight


def _weight_tile_words(shape, mode, flat, columns, rows, images):
    """Words of an output channel of dz, an input channel of x, a window, a row of x."""
    per_word = 2 if mode == "bf16" else 1
    x_per_word = 1 if flat else per_word
    align = 2 if columns == 2 * per_word else 0
    quads = _ceil(shape.covered[1], columns)

    def plane(pitch, height, residue):
        return _stride(images * _stride(height * pitch, align, 4), residue, 32)

    step, taps, pad = shape.stride[1], shape.taps[1], shape.padding[1]
    left = _up(pad, 4 * x_per_word) if pad else 0
    skip = 0 if flat else (left - pad) % x_per_word
    window = _ceil(skip + taps + (per_word - 1) * step, x_per_word)
    last = left - pad - skip + (quads * columns - per_word) * step + window * x_per_word
    pitch = _up(max(left + shape.width, last), 4 * x_per_word) // x_per_word
    height = (rows - 1) * shape.stride[0] + shape.taps[0]
    return (
        plane(_up(quads * columns // per_word, 4), rows, 4),
        plane(pitch, height, 4 * step),
        window,
        pitch,
    )


def _weight_plans(shape, mode, registers):
    """All ways to cut the work on dweight.

    (clocks, macros, bytes, blocks, images, stages of these images)
    """
    taps_h, taps_w = shape.taps
    taps, step = taps_h * taps_w, shape.stride[0]
    height, width = shape.covered
    lane = 4 if mode == "bf16" else 2
    flat_columns = shape.channels * taps
    flat = shape.channels <= 4 and flat_columns <= 256
    window_h = max(1, shape.pool[0])
    tiles = []  # columns of a step, rows and images of a stage; their words
    row_parts = {_up(_ceil(height, n), window_h) for n in range(1, height + 1)}
    rows_tried = sorted(n for n in row_parts if n <= 64)
    for columns, rows, steps in itertools.product(
        (4 * lane, 2 * lane, lane), rows_tried, (1, 2, 4, 8)
    ):
        images = 4 * lane // columns * steps
        words = _weight_tile_words(shape, mode, flat, columns, rows, images)
        if 4 * (16 * words[0] + words[1]) <= SHARED_LIMIT:
            tiles.append((columns, rows, images, *words))
    for (vk, vc, vr, vp), mt, nt in itertools.product(
        _warps(4), (1, 2, 4), (1, 2, 3, 4)
    ):
        k_tile = 16 * mt * vk
        if k_tile >= 2 * _up(shape.filters, 16):
            continue
        if flat:
            rt, warp_taps, channels, out_row = 1, 1, shape.channels, 8 * nt * vc
            if vr > 1 or not 0 <= out_row - flat_columns < 8 * vc:
                continue
        else:
            rt, channels = _ceil(taps_h, vr), 8 * nt * vc
            warp_taps, out_row = rt * taps_w, channels * taps
            if (
                vr > 1
                and _ceil(taps_h, vr // 2) == rt
                or channels >= 2 * _up(shape.channels, 8)
            ):
                continue
        accumulators = 4 * mt * nt * warp_taps
        for columns, rows, images, dz, x, window, pitch in tiles:
            held = 2 * nt * (1 if flat else rt * window) + 4 * mt
            if mode == "fp32":
                held += 4 * mt + 4 * nt
            if accumulators + held > _WEIGHT_REGISTERS + registers:
                continue
            words = k_tile * dz + channels * x
            if not flat:
                words += max(0, vr * rt - taps_h) * pitch
            parts = 1 if vp * k_tile * out_row <= words else 2 * mt
            shared = 4 * max(words, vp * k_tile // parts * out_row)
            if shared > SHARED_LIMIT:
                continue
            k_tiles = _ceil(shape.filters, k_tile)
            c_tiles = 1 if flat else _ceil(shape.channels, channels)
            row_steps = _ceil(height, rows)
            stages = _ceil(_BATCH, images) * row_steps * k_tiles * c_tiles
            x_rows = min((rows - 1) * step + taps_h, shape.height)
            fetch = images * (k_tile * rows * width + channels * x_rows * shape.width)
            out_clocks = k_tile * out_row * (20 + 2 * vp) / THREADS
            for segment in {rows, *(n for n in (1, 2, 3, 4, 6, 8) if rows % n == 0)}:
                quads, per_step = _ceil(width, columns), 4 * lane // columns
                units = _ceil(images // per_step * quads * (rows // segment), vp)
                warp_rows = units * segment * height / (row_steps * rows)
                mma = warp_rows * mt * nt * warp_taps
                if flat:
                    loads = warp_rows * (4 * mt + 2 * nt * lane // 2)
                else:
                    loads = warp_rows * (4 * mt + 2 * nt * window * min(rt, step))
                    loads += 2 * units * nt * window * max(0, rt - step)
                clocks = WARPS * (_MMA[mode] * mma + _LOAD[mode] * loads)
                # what a unit, a row of it and a stage take to begin and end
                clocks += WARPS * (40 * units + 10 * warp_rows) + _FETCH * fetch + 1000
                per_block = _ceil(stages, 2 * _PROCESSORS)
                total = 2 * (per_block * clocks + parts * 200 + out_clocks + 1500)
                if stages < 2 * _PROCESSORS:
                    total *= max(0.5, stages / (2 * _PROCESSORS))
                macros = {
                    "DW_FLAT": int(flat), "DW_COLUMNS": columns, "DW_MT": mt,
                    "DW_NT": nt, "DW_RT": rt, "DW_VK": vk, "DW_VC": vc, "DW_VR": vr,
                    "DW_VP": vp, "DW_TI": images, "DW_TP": rows,
                    "DW_SEGMENT": segment,
                }  # fmt: skip
                yield total, macros, shared, k_tiles * c_tiles, images, row_steps


# Small images


def _small_plan(shape, mode, need_dx, settled):
    """A plan of conv_small_backward.cu, or None where another kernel does better.

    A block is made to wait for memory once. That pays where each block of a batch finds
    a multiprocessor of its own; larger layers would rather share what they fetch.
    """
    height, width = shape.height, shape.width
    taps_h, taps_w = shape.taps
    rows, columns = shape.conv_output
    pixels = rows * columns
    if shape.stride != (1, 1) or shape.pool != (0, 0) or max(height, width) > 4:
        return None
    if taps_h * taps_w > 9 or pixels > 16:
        return None
    per_word = 2 if mode == "bf16" else 1
    wi = vk = 2
    unit = 8 * per_word * WARPS // wi
    steps = _ceil(shape.filters, unit)
    taps = taps_h * taps_w
    registers = 4 * taps_w * height * _ceil(columns, 2) + 2 * steps * pixels + 2 * taps
    if registers > _DATA_REGISTERS + _REGISTERS_ALONE:
        return None
    data_words = max(steps * unit * _stride(8 * taps, 4, 16), WARPS * 2 * height * 128)
    weight_words = 16 * WARPS * (_stride(8 * taps, 12, 32) + 1)
    shared = 4 * max(weight_words, data_words if need_dx else 0)
    c_tiles = _ceil(shape.channels, 8)
    macros = {
        "DX_WI": wi, "DW_VK": vk, "SHARED": shared, "SETTLED": int(settled),
    }  # fmt: skip
    plan = Plan(
        "conv_small_backward",
        (*_layer_macros(shape, mode, need_dx), *macros.items()),
        shared,
        _ceil(shape.filters, 16 * vk) * c_tiles,
        8 * per_word * WARPS // vk,
        1,
        c_tiles if need_dx else 0,
        8 * wi if need_dx else 0,
        0.5,
    )
    splits, _ = plan.splits(_BATCH, _PROCESSORS)
    together = plan.data_blocks(_BATCH) + plan.weight_tiles * splits
    fits = together <= _PROCESSORS and shared <= SHARED_LIMIT
    return plan if fits else None


def _layer_macros(shape, mode, need_dx):
    return tuple({
        "MODE": _MODES[mode], "C": shape.channels, "H": shape.height,
        "W": shape.width, "K": shape.filters, "R": shape.taps[0], "S": shape.taps[1],
        "STRIDE_H": shape.stride[0], "STRIDE_W": shape.stride[1],
        "PAD_H": shape.padding[0], "PAD_W": shape.padding[1],
        "POOL_H": shape.pool[0], "POOL_W": shape.pool[1], "RELU": int(shape.relu),
        "NEED_DX": int(need_dx),
    }.items())  # fmt: skip


def _best(plans, shape, mode):
    """(blocks a multiprocessor, the cheapest plan)."""
    for blocks, more in ((2, 0), (1, _REGISTERS_ALONE)):
        found = min(
            plans(shape, mode, more), key=lambda plan: plan[0], default=None
        )
        if found is not None:
            return blocks, found
    raise NoPlan(f"no tile of the gradients of {shape} fits a multiprocessor")


@functools.lru_cache(maxsize=None)
def plan(shape: Shape, mode: str, need_dx: bool, settled: bool = False) -> Plan:
    """The cheapest cut for a layer, by a count of its instructions.

    Parameters
    ----------
    shape : Shape
    mode : {"fp32", "tf32", "bf16"}
    need_dx : bool
    settled : bool
        Whether weight and x are complete before the kernel ahead starts.

    Raises
    ------
    NoPlan
        If no tile fits into shared memory and registers.
    """
    small = _small_plan(shape, mode, need_dx, settled)
    if small is not None:
        return small
    macros = dict(_layer_macros(shape, mode, need_dx))
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
        "conv_block_backward",
        tuple(macros.items()),
        shared,
        weight_tiles,
        weight_images,
        weight_rows,
        data_tiles,
        data_images,
    )
