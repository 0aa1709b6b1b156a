"""The operator tests of the package onnx on a GPU."""

import pytest

pytest.importorskip("onnx")
from test_onnx_backend import INCLUDED, cases, check  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", INCLUDED)
def test_node(cases, name):  # noqa: F811
    check(cases, name, "CUDA")
