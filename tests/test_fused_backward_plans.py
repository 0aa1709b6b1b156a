"""The fused backward without a GPU: plans hold together and their kernels compile."""

import re

import pytest

from cycnn.ops.conv_backward_plan import NoPlan, Shape, plan

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
    "uneven pool": Shape(3, 13, 9, 8, (3, 3), (1, 1), (1, 1), (3, 2), False),
    "one pixel": Shape(8, 1, 1, 4, (1, 1), (1, 1), (0, 0), (0, 0), True),
}


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
    assert 0 < found.shared == macros["SHARED"] <= 99 * 1024
    for role, axes in (("DX", "CGRIK"), ("DW", "KCRP")):
        letter = "W" if role == "DX" else "V"
        warps = 1
        for axis in axes:
            warps *= macros[f"{role}_{letter}{axis}"]
        assert warps == 8


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
    [("first", "tf32", False), ("second", "tf32", True), ("third", "fp32", True),
     ("strided", "bf16", True), ("uneven pool", "fp32", True), ("oblong", "tf32", True)],
)  # fmt: skip
def test_a_plan_compiles(name, mode, need_dx):
    """The kernel itself asserts that its shared memory has the size that was planned."""
    ptx = ptx_of("conv_block_backward", plan(SHAPES[name], mode, need_dx).options)
    check_arithmetic(ptx)
    parameters = re.search(r"\.entry conv_block_backward\((.*?)\)", ptx, re.DOTALL)[1]
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * 8 + ["u32"] * 3


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
    }


def test_a_layer_that_fits_nowhere():
    huge = Shape(4, 300, 300, 4, (299, 299), (1, 1), (0, 0), (0, 0), True)
    with pytest.raises(NoPlan, match="fits a multiprocessor"):
        plan(huge, "tf32", True)
