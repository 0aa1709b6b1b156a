"""The tests that the package onnx has for implementations of its operators.

Each is one operator, with inputs and the outputs that they must lead to. cycnn reads
networks of one input: what else a test gives its operator is made a constant first. The
tests in ``INCLUDED`` run, here and in tests/gpu. Each other test of these operators has
its reason in ``EXCLUDED``, and a test that a newer onnx adds is noticed.
"""

import importlib
import re

import pytest

import cycnn
from cycnn import DataError

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper
from onnx.backend.base import Backend, BackendRep
from onnx.backend.test.runner import Runner

MODULES = (
    "add", "averagepool", "batch_normalization", "clip", "concat", "constant", "conv",
    "convtranspose", "dropout", "flatten", "gelu", "gemm", "globalaveragepool",
    "identity", "layernormalization", "leakyrelu", "logsoftmax", "matmul", "maxpool",
    "pad", "relu", "reshape", "sigmoid", "softmax", "tanh",
)  # fmt: skip
OPERATORS = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Constant", "Conv",
    "ConvTranspose", "Dropout", "Flatten", "Gelu", "Gemm", "GlobalAveragePool",
    "Identity", "LayerNormalization", "LeakyRelu", "LogSoftmax", "MatMul", "MaxPool",
    "Pad", "Relu", "Reshape", "Sigmoid", "Softmax", "Tanh",
}  # fmt: skip

INCLUDED = """
    averagepool_2d_ceil averagepool_2d_ceil_last_window_starts_on_pad
    averagepool_2d_default averagepool_2d_pads averagepool_2d_pads_count_include_pad
    averagepool_2d_precomputed_pads averagepool_2d_precomputed_pads_count_include_pad
    averagepool_2d_precomputed_same_upper averagepool_2d_precomputed_strides
    averagepool_2d_same_lower averagepool_2d_same_upper averagepool_2d_strides
    basic_conv_with_padding basic_conv_without_padding
    batchnorm_epsilon batchnorm_example
    clip clip_default_inbounds clip_default_max clip_default_min clip_example
    clip_inbounds clip_outbounds clip_splitbounds
    conv_with_autopad_same conv_with_strides_and_asymmetric_padding
    conv_with_strides_no_padding conv_with_strides_padding
    convtranspose convtranspose_autopad_same convtranspose_dilations
    convtranspose_group_2 convtranspose_group_2_image_3 convtranspose_kernel_shape
    convtranspose_output_shape convtranspose_pad convtranspose_pads
    dropout_default dropout_default_old dropout_default_ratio dropout_random_old
    flatten_axis1 flatten_default_axis flatten_negative_axis3
    gelu_default_1 gelu_default_2 gelu_tanh_1 gelu_tanh_2
    gemm_alpha gemm_beta gemm_default_no_bias gemm_default_scalar_bias
    gemm_default_single_elem_vector_bias gemm_default_vector_bias
    gemm_default_zero_bias gemm_transposeB
    globalaveragepool globalaveragepool_precomputed
    identity
    layer_normalization_2d_axis1 layer_normalization_2d_axis_negative_1
    layer_normalization_3d_axis1_epsilon layer_normalization_3d_axis2_epsilon
    layer_normalization_3d_axis_negative_1_epsilon
    layer_normalization_3d_axis_negative_2_epsilon
    layer_normalization_4d_axis1 layer_normalization_4d_axis2
    layer_normalization_4d_axis3 layer_normalization_4d_axis_negative_1
    layer_normalization_4d_axis_negative_2 layer_normalization_4d_axis_negative_3
    layer_normalization_default_axis
    leakyrelu leakyrelu_default leakyrelu_example
    logsoftmax_example_1 logsoftmax_large_number
    matmul_2d
    maxpool_2d_ceil maxpool_2d_ceil_output_size_reduce_by_one maxpool_2d_default
    maxpool_2d_pads maxpool_2d_precomputed_pads maxpool_2d_precomputed_same_upper
    maxpool_2d_precomputed_strides maxpool_2d_same_lower maxpool_2d_same_upper
    maxpool_2d_strides
    relu
    reshape_reduced_dims
    sigmoid sigmoid_example
    softmax_example softmax_large_number
    tanh tanh_example
""".split()  # noqa: SIM905

# patterns that match the whole name
EXCLUDED = {
    r"add|add_bcast": "adds two inputs of the network, and cycnn reads one",
    r"add_u?int\d+|clip_default_int8_.*|maxpool_2d_uint8": "integers: all is float32",
    r"(averagepool|convtranspose|maxpool)_(1d|3d).*": "no images of two dimensions",
    r"(averagepool|maxpool)_2d_dilations": "no dilated windows in the pooling layers",
    r"batchnorm_.*_training_mode|training_dropout.*": (
        "ops in training mode; networks are read for inference, and trained by cycnn"
    ),
    r"clip_min_greater_than_max": "the same number for any input, which no layer gives",
    r"concat_.*": "joins two inputs of the network, and cycnn reads one",
    r"constant": "has no input",
    r"constant_pad.*": "pads by 1.2: there is only ZeroPad2d",
    r"(edge|reflect|wrap)_pad": "integers, and there is only ZeroPad2d",
    r"dropout_default_mask.*": "has a second output, the mask",
    r"flatten_(axis[023]|negative_axis[124])": (
        "joins the images of a batch, or not all axes of an image"
    ),
    r"gemm_(transposeA|all_attributes)": "the batch is not the first axis",
    r"gemm_default_matrix_bias": "adds another number to each image of the batch",
    r"identity_(opt|sequence)": "the value is no tensor",
    r"layer_normalization_(2d_axis(0|_negative_2)|3d_axis(0|_negative_3)_epsilon"
    r"|4d_axis(0|_negative_4))": "normalises over the images of the batch",
    r"(log)?softmax_(axis_\d|default_axis|negative_axis)": (
        "not over the rows of (N, F), the only input that the layers take"
    ),
    r"matmul_(1d_1d|1d_3d|3d|4d|4d_1d|bcast)": "not (N, inputs) x (inputs, outputs)",
    r"maxpool_with_argmax_.*": "has a second output, the positions",
    r"reshape_.*": "to another shape than one row for each image",
}


def load_cases() -> dict:
    """The tests of these operators, by name without "test_"."""
    # onnx.backend.test.loader would compute those of all operators, for half a minute
    package = importlib.import_module("onnx.backend.test.case.node")
    for module in MODULES:
        importlib.import_module(f"{package.__name__}.{module}")
    return {
        case.name.removeprefix("test_"): case
        for case in package._NodeTestCases
        if {node.op_type for node in case.model.graph.node} & OPERATORS
        # what an operator amounts to, in many small ones
        and "_expanded" not in case.name
    }


@pytest.fixture(scope="session")
def cases():
    return load_cases()


class Network(BackendRep):
    def __init__(self, model, device):
        self.model, self.device = model, device

    def run(self, inputs, **kwargs):
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        # newer versions of these operators take more types, and nothing else is new
        for opset in model.opset_import:
            opset.version = min(opset.version, 22)
        for value, array in list(zip(graph.input, inputs))[1:]:
            graph.initializer.append(numpy_helper.from_array(array, value.name))
            graph.input.remove(value)
        # mean and deviation, beside the output, are for a backward
        if graph.node[0].op_type == "LayerNormalization":
            del graph.output[1:]
        network = cycnn.onnx.load(model).to(self.device)
        return (network(inputs[0]).numpy(),)


class Cycnn(Backend):
    """cycnn as onnx knows implementations of its operators."""

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        super().prepare(model, device, **kwargs)
        return Network(model, device.lower())


def check(cases, name, device):
    if name not in cases:
        pytest.skip(f"not in onnx {onnx.__version__}")
    case = cases[name]
    network = Cycnn.prepare(case.model, device)
    for inputs, outputs in case.data_sets:
        made = network.run(inputs)
        Runner.assert_similar_outputs(outputs[:1], made, case.rtol, case.atol)


@pytest.mark.parametrize("name", INCLUDED)
def test_node(cases, name):
    check(cases, name, "CPU")


def test_each_test_runs_or_has_a_reason(cases):
    reasons = {
        name: [
            reason
            for pattern, reason in EXCLUDED.items()
            if re.fullmatch(pattern, name)
        ]
        for name in cases
        if name not in INCLUDED
    }
    assert not [name for name, found in reasons.items() if len(found) != 1]


def test_what_is_excluded_is_refused(cases):
    """And not read as something else."""
    for name in sorted(cases.keys() - set(INCLUDED)):
        with pytest.raises(DataError):
            check(cases, name, "CPU")
