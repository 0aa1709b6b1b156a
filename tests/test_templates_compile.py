"""Fused kernels compile for every GPU that has them. None of it needs one.

A template has no kernel until a layer's shapes are filled in; the layers of the reference
network stand for all.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import lru_cache, partial

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from cycnn.gpu import compile as kernel_compile
from cycnn.ops import conv_backward_plan, forward_plan
from cycnn.ops import fused_cuda_backward as backward
from cycnn.ops import fused_cuda_pair_backward as pair_backward

PROCESSORS, BATCH = 132, 128
MODES = {"fp32": 0, "tf32": 1, "bf16": 2}
FUSED_SINCE = (8, 0)
ARCHITECTURES = [
    arch
    for arch in kernel_compile.ARCHITECTURES
    if kernel_compile._capability(arch) >= FUSED_SINCE
]
# Every mode for one architecture, one mode for every architecture.
TARGETS = [("sm_90", mode) for mode in MODES] + [
    (arch, "tf32") for arch in ARCHITECTURES if arch != "sm_90"
]


def block(shape):
    c, h, w, k, r, pool = shape
    return forward_plan.ConvShape(
        c, h, w, k, r, r, (1, 1), (0, 0), pool or (1, 1), True, True, pool is not None
    )


def conv_forward(arch, mode, shape):
    machine = forward_plan.Machine(arch, PROCESSORS)
    plan = forward_plan.conv_plan(block(shape), BATCH, machine, MODES[mode])
    return plan.library, plan.definitions, plan.specific


def conv_pair(arch, mode, shapes, gather=True):
    first, second = map(block, shapes)
    machine = forward_plan.Machine(arch, PROCESSORS)
    plan = forward_plan.pair_plan(first, second, BATCH, machine, MODES[mode], gather)
    return plan.library, plan.definitions, plan.specific


def tail(arch, mode, shape):
    machine = forward_plan.Machine(arch, PROCESSORS)
    plan = forward_plan.tail_plan(*shape, True, True, True, machine, MODES[mode])
    return plan.library, plan.definitions, plan.specific


def conv_tail(arch, mode, shape):
    third, hidden, classes = shape
    machine = forward_plan.Machine(arch, PROCESSORS)
    layout = forward_plan.conv_plan(block(third), BATCH, machine, MODES["tf32"]).layout
    plan = forward_plan.conv_tail_plan(
        block(third), layout, BATCH, hidden, classes, True, True, True, machine
    )
    return plan.library, plan.definitions, plan.specific


def conv_backward(arch, mode, shape):
    c, h, w, k, r, pool = shape
    block = conv_backward_plan.Shape(
        c, h, w, k, (r, r), (1, 1), (0, 0), pool or (0, 0), True
    )
    plan = conv_backward_plan.plan(block, mode, c > 1, settled=True)
    return plan.library, plan.options, False


def linear_forward(arch, mode, shape):
    machine = forward_plan.Machine(arch, PROCESSORS)
    plan = forward_plan.linear_plan(BATCH, *shape, True, True, machine, MODES[mode])
    return plan.library, plan.definitions, plan.specific


def linear_backward(arch, mode, shape):
    kernel = backward._linear(BATCH, *shape, True, mode, PROCESSORS).kernel
    return kernel.library, kernel.options, kernel.specific


def tail_backward(arch, mode, shape):
    kernel = backward._tail(BATCH, *shape, False, True, mode, PROCESSORS).kernel
    return kernel.library, kernel.options, kernel.specific


def conv_tail_backward(arch, mode, shape):
    """What comes behind conv_tail, which makes its x."""
    given = False, True, mode, PROCESSORS
    kernel = backward._tail(BATCH, *shape, *given, x_settled=False).kernel
    return kernel.library, kernel.options, kernel.specific


def head(arch, mode, shape):
    plan = forward_plan.head_plan(
        *shape, True, forward_plan.Machine(arch, PROCESSORS), MODES[mode]
    )
    return plan.library, plan.definitions, plan.specific


def conv_pair_backward(arch, mode, shape, settled=True):
    kernel = pair_backward._kernel(*shape, pair_backward._MODES[mode], settled)
    return kernel.library, kernel.options, kernel.specific


def update(arch, mode, shape):
    return "update", (), False


FIRST, SECOND = (1, 28, 28, 32, 5, (2, 2)), (32, 12, 12, 64, 5, (2, 2))
THIRD = (64, 4, 4, 128, 3, None)
KERNELS = {
    "first convolution": (conv_forward, FIRST),
    "second convolution": (conv_forward, SECOND),
    "first convolution, backward": (conv_backward, FIRST),
    "second convolution, backward": (conv_backward, SECOND),
    "third convolution, backward": (conv_backward, THIRD),
    "linear": (linear_forward, (512, 128)),
    "linear, backward": (linear_backward, (512, 128)),
    "head": (head, (128, 10)),
    "linear and head, backward": (tail_backward, (512, 128, 10)),
    "update": (update, ()),
}


# What not every GPU has, or not in every mode.
SOME_HAVE = [
    (conv_pair, (FIRST, SECOND), "sm_90", "tf32"),
    (conv_pair, (FIRST, SECOND), "sm_90", "bf16"),
    (conv_pair, (FIRST, SECOND), "sm_80", "bf16"),
    (tail, (512, 128, 10), "sm_90", "fp32"),
    (tail, (512, 128, 10), "sm_100", "tf32"),
    (tail, (512, 128, 10), "sm_90", "bf16"),
    (conv_tail, (THIRD, 128, 10), "sm_90", "tf32"),
    (conv_tail, (THIRD, 128, 10), "sm_100", "tf32"),
    (conv_tail_backward, (512, 128, 10), "sm_90", "tf32"),
    (conv_tail_backward, (512, 128, 10), "sm_90", "bf16"),
    (conv_pair_backward, (32, 64), "sm_90", "fp32"),
    (conv_pair_backward, (32, 64), "sm_90", "tf32"),
    (conv_pair_backward, (16, 40), "sm_90", "bf16"),
]


@lru_cache(None)
def compiled(library, options, arch):
    sources = kernel_compile._sources(kernel_compile.source_directory())
    return kernel_compile.compile_source(
        sources[library + ".cu"],
        library + ".cu",
        arch,
        kernel_compile.OPTIONS + tuple(options),
        kernel_compile._headers(sources),
    )


@pytest.mark.parametrize("arch, mode", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel, arch, mode):
    plan, shape = KERNELS[kernel]
    library, options, specific = plan(arch, mode, shape)
    image = compiled(library, options, arch + "a" if specific else arch)
    assert image.startswith(b"\x7fELF")


@pytest.mark.parametrize("plan, shape, arch, mode", SOME_HAVE)
def test_what_some_have_compiles(plan, shape, arch, mode):
    library, options, specific = plan(arch, mode, shape)
    image = compiled(library, options, arch + "a" if specific else arch)
    assert image.startswith(b"\x7fELF")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "plan, shape", [*KERNELS.values(), (conv_pair_backward, (32, 64))]
)
def test_no_double_arithmetic_and_no_float_atomics(plan, shape, mode):
    library, options, specific = plan("sm_80", mode, shape)
    arch = "compute_90a" if specific else "compute_80"
    ptx = compiled(library, options, arch).decode()
    assert ".f32" in ptx
    assert ".f64" not in ptx
    assert not re.findall(r"\b(?:atom|red)\.\S*\.(?:f|bf)\d+\S*", ptx)


def disassembler():
    """nvdisasm: on the path, or of the PyPI wheel; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = [os.environ.get("PATH", ""), *(f"{f}/cu13/bin" for f in folders)]
    return shutil.which("nvdisasm", path=os.pathsep.join(path))


# These read weights and activations, which are older, ahead of the wait, and say by
# load_fresh what must not be.
READ_AHEAD = ("third convolution, backward", "linear and head, backward")


FLOW = r"ACQBULK|EXIT|RET|LDG\S*|\w*MMA|UBLKCP"


def instructions(plan, shape, mode, folder, wanted=FLOW):
    """Of a kernel, in order; by default waits, loads, products and ends of paths."""
    program = disassembler()
    if program is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    library, options, specific = plan("sm_90", mode, shape)
    image = folder / "image.cubin"
    image.write_bytes(compiled(library, options, "sm_90a" if specific else "sm_90"))
    code = subprocess.run(
        [program, "-c", image], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(rf"\b(?:{wanted})\b\S*", code)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in READ_AHEAD])
def test_no_load_is_moved_ahead_of_the_wait(kernel, mode, tmp_path):
    """What the kernel ahead writes is read after griddepcontrol.wait (ACQBULK).

    The assembler may move loads of what is called constant, and has done so.
    """
    # what may run before a wait: since the last instruction that ends a path
    seen, waits = [], 0
    for word in instructions(*KERNELS[kernel], mode, tmp_path):
        if word.startswith("ACQBULK"):
            waits += 1
            assert not [load for load in seen if "CONSTANT" in load]
        if not word.startswith("LDG"):
            seen = []
        seen.append(word)
    assert waits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "plan, shape", [(tail, (512, 128, 10)), (conv_tail, (THIRD, 128, 10))]
)
def test_fresh_loads_stay_behind_the_wait(plan, shape, mode, tmp_path):
    """load_fresh (STRONG) behind the waits, where what is settled is read ahead.

    Each kind of warps has two, of which one is passed.
    """
    waits = fresh = 0
    for word in instructions(plan, shape, mode, tmp_path):
        if word.startswith("ACQBULK"):
            waits += 1
        elif "STRONG" in word or "UBLKCP" in word:
            fresh += 1
            assert waits % 2 == 0
        elif word == "EXIT":
            assert waits % 2 == 0
    assert waits and fresh


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_pair_are_read_behind_the_wait(mode, settled, tmp_path):
    """load_fresh (STRONG), where weights are read ahead of the only wait.

    Where all but the gradients is settled the codes, which are no vectors, are as well.
    """
    plan = partial(conv_pair_backward, settled=settled)
    words = instructions(plan, (32, 64), mode, tmp_path)
    waits = [i for i, word in enumerate(words) if word.startswith("ACQBULK")]
    kind = "128.STRONG" if settled else "STRONG"
    fresh = [i for i, word in enumerate(words) if kind in word]
    assert len(waits) == 1 and fresh
    assert min(fresh) > waits[0]
    assert not [word for word in words[waits[0] :] if "CONSTANT" in word]


@pytest.mark.parametrize("shape", [(32, 64), (8, 16), (16, 40)])
def test_products_of_a_pair_are_not_waited_for_one_by_one(shape, tmp_path):
    """What the assembler does, with little more than a remark, if it sees no way."""
    words = instructions(
        conv_pair_backward, shape, "tf32", tmp_path, r"HGMMA|WARPGROUP"
    )
    products = [word for word in words if word.startswith("HGMMA")]
    waits = [word for word in words if word.startswith("WARPGROUP.DEPBAR")]
    assert len(products) >= 54 and len(waits) < len(products) / 2


def test_every_template_is_compiled_here():
    used = {plan("sm_90", "tf32", shape)[0] for plan, shape in KERNELS.values()}
    used |= {plan("sm_90", mode, shape)[0] for plan, shape, _, mode in SOME_HAVE}
    folder = kernel_compile.source_directory() / "templates"
    assert used == {path.stem for path in folder.glob("*.cu")}
