"""The fused backward without a GPU: plans hold together and their kernels compile."""

import re

import pytest

from cycnn.ops.conv_backward_plan import SHARED_LIMIT, NoPlan, Shape, plan

MODES = ("fp32", "tf32", "bf16")
SHAPES = {
    "first": Shape(1, 28, 28, 32, (5, 5), (1, 1), (0, 0), (2, 2), True),
    "second": Shape(32, 12, 12, 64, (5, 5), (1, 1), (0, 0), (2, 2), True),
    "third": Shape(64, 4, 4, 128, (3, 3), (1, 1), (0, 0), (0, 0), True),
    "wide": Shape(64, 32, 32, 64, (3, 3), (1, 1), (1, 1), (2, 2), True),
    "deep": Shape(256, 4, 4, 256, (3, 3), (1, 1), (1, 1), (0, 0), True),
    "strided": Shape(9, 9, 11, 7, (3, 3), (2, 2), (1, 1), (0, 0), True),
    "oblong": Shape(10, 5, 7, 33, (2, 4), (1, 2), (1, 0), (0, 0), True),
    "large filter": Shape(6, 14, 10, 9, (7, 7), (2, 2), (3, 3), (0, 0), True),
    "small, padded": Shape(64, 4, 4, 64, (3, 3), (1, 1), (1, 1), (0, 0), True),
    "small, oblong": Shape(9, 4, 3, 33, (3, 2), (1, 1), (1, 0), (0, 0), False),
    "uneven pool": Shape(3, 13, 9, 8, (3, 3), (1, 1), (1, 1), (3, 2), False),
    "one pixel": Shape(8, 1, 1, 4, (1, 1), (1, 1), (0, 0), (0, 0), True),
}


@pytest.fixture
def backward():
    return pytest.importorskip("cycnn.ops.fused_cuda_backward")


def ptx_of(name, options):
    pytest.importorskip("cuda.bindings.nvrtc")
    from cycnn.gpu import compile as kernel_compile

    sources = kernel_compile._sources(kernel_compile.source_directory())
    headers = {file: text for file, text in sources.items() if file.endswith(".cuh")}
    image = kernel_compile.compile_source(
        sources[f"{name}.cu"], f"{name}.cu", kernel_compile.PTX_ARCHITECTURE,
        (*kernel_compile.OPTIONS, *options), headers,
    )  # fmt: skip
    return image.rstrip(b"\0").decode()


def check_arithmetic(ptx):
    assert ".f64" not in ptx
    assert not re.findall(r"\b(?:atom|red)\.\S*\.(?:f|bf)\d+\S*", ptx)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_fits_a_multiprocessor(name, mode):
    found = plan(SHAPES[name], mode, True)
    macros = dict(found.macros)
    assert 0 < found.shared == macros["SHARED"] <= SHARED_LIMIT
    if found.library == "conv_small_backward":
        assert 8 % macros["DX_WI"] == 8 % macros["DW_VK"] == 0
        return
    for role, axes in (("DX", "CGRIK"), ("DW", "KCRP")):
        letter = "W" if role == "DX" else "V"
        warps = 1
        for axis in axes:
            warps *= macros[f"{role}_{letter}{axis}"]
        assert warps == 8


@pytest.mark.parametrize("mode", MODES)
def test_small_images_have_a_kernel_of_their_own(mode):
    def library(shape):
        return plan(shape, mode, True).library

    assert library(SHAPES["third"]) == "conv_small_backward"
    for name in ("second", "deep", "strided"):
        assert library(SHAPES[name]) == "conv_block_backward"


@pytest.mark.parametrize("batch", [1, 2, 7, 96, 128, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_splits_cover_the_batch_once(name, batch):
    found = plan(SHAPES[name], "tf32", True)
    splits, each = found.splits(batch, 132)
    stages = -(-batch // found.weight_images) * found.weight_rows
    assert (splits - 1) * each < stages <= splits * each
    assert found.data_blocks(batch) * found.data_images >= batch * found.data_tiles


@pytest.mark.parametrize(
    "name, mode, need_dx",
    [
        ("first", "tf32", False),
        ("second", "tf32", True),
        ("third", "fp32", True),
        ("strided", "bf16", True),
        ("uneven pool", "fp32", True),
        ("oblong", "tf32", True),
        ("third", "tf32", False),
        ("small, padded", "bf16", True),
        ("small, oblong", "tf32", True),
        ("one pixel", "fp32", True),
    ],
)
def test_a_plan_compiles(name, mode, need_dx):
    """The kernel itself asserts that its shared memory has the planned size."""
    found = plan(SHAPES[name], mode, need_dx)
    ptx = ptx_of(found.library, found.options)
    check_arithmetic(ptx)
    parameters = re.search(rf"\.entry {found.library}\((.*?)\)", ptx, re.DOTALL)[1]
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * 8 + ["u32"] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 3, 48, 128, 5000])
@pytest.mark.parametrize("shape", [(512, 128, 10), (33, 21, 7), (9000, 256, 32)])
def test_the_tail_fits_a_multiprocessor(backward, shape, n, mode):
    made = backward._tail_for(n, *shape, False, False, mode, 132)
    assert made.shared <= SHARED_LIMIT
    splits, images = backward._split(n, made.depth, 132)
    assert images % made.depth == 0
    assert (splits - 1) * images < n <= splits * images


@pytest.mark.parametrize(
    "shape, mode",
    [((512, 128, 10), "tf32"), ((33, 21, 7), "fp32"), ((7, 256, 32), "bf16")],
)
def test_the_tail_compiles(backward, shape, mode):
    """The kernel itself asserts that its shared memory is enough."""
    kernel = backward._tail_for(5, *shape, True, True, mode, 132).kernel
    ptx = ptx_of(kernel.library, kernel.options)
    check_arithmetic(ptx)
    parameters = re.search(r"\.entry tail_backward\((.*?)\)", ptx, re.DOTALL)[1]
    kinds = {"u64": "P", "u32": "i"}
    found = "".join(kinds[kind] for kind in re.findall(r"\.param \.(\w+)", parameters))
    assert found == kernel.signature


def test_the_update_compiles():
    ptx = ptx_of("update", ())
    check_arithmetic(ptx)
    kinds = {
        name: "".join({"u64": "P", "u32": "i", "f32": "f"}[kind] for kind in
                      re.findall(r"\.param \.(\w+)", parameters))
        for name, parameters in re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    }  # fmt: skip
    assert kinds == {
        "reduce_partials": "PPiPPii",
        "update_rmsprop": "PiPPPPPffff",
        "update_sgd": "PiPPPPffi",
        "update_adam": "PiPPPPPiPffffffffi",
        "update_adagrad": "PiPPPPiPfff",
    }


def test_a_layer_that_fits_nowhere():
    huge = Shape(4, 300, 300, 4, (299, 299), (1, 1), (0, 0), (0, 0), True)
    with pytest.raises(NoPlan, match="fits a multiprocessor"):
        plan(huge, "tf32", True)
