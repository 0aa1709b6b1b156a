"""All implementations of the operations have the same functions."""

import ast
from pathlib import Path

import pytest

from cycnn import ops

HOME = Path(ops.__file__).parent


def signatures(module: str) -> dict:
    """{name: parameters with defaults} of the public functions, from the source: the
    CUDA module cannot be imported everywhere."""
    tree = ast.parse((HOME / f"{module}.py").read_text(encoding="utf-8"))
    return {
        node.name: ast.unparse(node.args)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith(("_", "check_"))
    }


def test_the_specification_is_whole():
    assert set(signatures("reference")) == set(
        """fill add linear_forward linear_backward conv2d_forward conv2d_backward
        maxpool2d_forward maxpool2d_backward relu_forward relu_backward sigmoid_forward
        sigmoid_backward log_softmax_forward log_softmax_backward nll_loss_forward
        nll_loss_backward cross_entropy_forward cross_entropy_backward argmax
        tally rmsprop_step sgd_step permutation gather_images gather_labels
        begin_step end_step""".split()
    )


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_same_functions_and_parameters(module):
    expected = signatures("reference")
    found = signatures(module)
    assert {name: found.get(name) for name in expected} == expected
