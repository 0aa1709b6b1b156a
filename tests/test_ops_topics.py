"""Operations that have modules of their own: the same functions in all three."""

import ast

import pytest
from test_ops_contract import HOME, signatures

from cycnn.ops import cpu, reference

TOPICS = sorted(
    path.stem.removeprefix("reference_")
    for path in HOME.glob("reference_*.py")
    if path.stem != "reference_common"
)


def exported(module):
    """Names that a module of operations takes from its topics, from the source."""
    tree = ast.parse((HOME / f"{module}.py").read_text(encoding="utf-8"))
    return {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


@pytest.mark.parametrize("topic", TOPICS)
def test_same_functions_and_parameters(topic):
    expected = signatures(f"reference_{topic}")
    assert expected
    for module in ("cpu", "cuda"):
        found = signatures(f"{module}_{topic}")
        assert {name: found.get(name) for name in expected} == expected, module


@pytest.mark.parametrize("topic", TOPICS)
def test_every_function_is_exported(topic):
    names = set(signatures(f"reference_{topic}"))
    assert names <= exported("cuda")
    for module in (reference, cpu):
        assert names <= set(vars(module)), module.__name__
