"""The arrows of the house point down, and importing cycnn costs next to nothing."""

import ast
import re
from pathlib import Path

import pytest

import cycnn

PACKAGE = Path(__file__).resolve().parent.parent / "cycnn"

# A room may import from rooms with a smaller number, and from itself.
FLOORS = {
    "__main__": 10,
    "cli": 9,
    "sklearn": 9,
    "train": 8,
    "onnx": 7,
    "nn": 6,
    "optim": 7,  # sees nn.Parameter
    "data": 6,
    "ops": 5,
    "tensor": 4,
    "shapes": 3,
    "random": 3,
    "precision": 3,
    "devices": 2,
    "gpu": 1,
    "errors": 0,
}
# Rooms that must load where there is no cuda-python: gpu only inside functions.
NO_GPU_AT_IMPORT = (
    "errors", "devices", "random", "precision", "shapes", "tensor", "ops",
)  # fmt: skip
# Cython's import statements; `ast` does not read .pyx files.
CYTHON_IMPORT = re.compile(
    r"^([ \t]*)(?:from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n#]*)"
    r"|c?import[ \t]+([\w.]+))",
    re.MULTILINE,
)


def sources():
    found = [p for s in ("py", "pyx", "pxd") for p in PACKAGE.rglob(f"*.{s}")]
    return sorted(p for p in found if p != PACKAGE / "__init__.py")


def room(module):
    """The room of a module of cycnn: of ``cycnn.gpu.memory``, ``gpu``."""
    parts = module.split(".")
    if len(parts) < 2 or parts[0] != "cycnn":
        return None
    # `from . import Tensor` goes through the package to the room that has it
    name = cycnn._HOME.get(parts[1], parts[1])
    return "tensor" if name == "_dlpack" else name


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(path, level, name):
    """What ``from <level dots><name> import`` means in the file ``path``."""
    if not level:
        return name or ""
    package = list(path.relative_to(PACKAGE.parent).parts[:-1])
    base = package[: len(package) - level + 1]
    return ".".join([*base, *([name] if name else [])])


def expand(path, level, name, names):
    """Modules that an import names: `from . import gpu` means the room gpu."""
    base = absolute(path, level, name)
    return [f"{base}.{n}" for n in names] if base == "cycnn" else [base]


def python_imports(path):
    """(line, module, whether it runs when the file is imported) for each import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = expand(path, node.level, node.module, names)
        else:
            continue
        for module in modules:
            yield node.lineno, module, id(node) not in inside


def cython_imports(path):
    text = path.read_text(encoding="utf-8")
    for match in CYTHON_IMPORT.finditer(text):
        indent, source, names, plain = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if plain:
            modules = [plain]
        else:
            name = source.lstrip(".")
            imported = re.findall(r"(\w+)(?:\s+as\s+\w+)?", names.strip("()"))
            modules = expand(path, len(source) - len(name), name or None, imported)
        for module in modules:
            yield line, module, not indent


def imports(path):
    return (python_imports if path.suffix == ".py" else cython_imports)(path)


def test_the_walk_sees_imports_of_every_kind():
    seen = {
        (path.name, module)
        for path in sources()
        for _, module, _ in imports(path)
        if room(module)
    }
    assert ("devices.py", "cycnn.errors") in seen
    assert ("devices.py", "cycnn.gpu") in seen  # inside a function
    assert ("memory.pyx", "cycnn.gpu._check") in seen  # a relative cimport
    assert ("memory.pyx", "cycnn.errors") in seen


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = room(module_of(path))
    assert own in FLOORS, f"cycnn.{own} has no floor: give it one in this file"
    for line, module, at_import in imports(path):
        target = room(module)
        if target is None or target == own or target == "__version__":
            continue
        where = f"{path.relative_to(PACKAGE.parent)}:{line}: {module}"
        assert target in FLOORS, f"{where} is no room of the house"
        assert FLOORS[target] < FLOORS[own], f"{where} points up from {own}"
        if at_import and own in NO_GPU_AT_IMPORT and "cuda" not in path.stem:
            assert target != "gpu", f"{where} imports gpu when it is imported"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_gpu_knows_cuda_python(path):
    if room(module_of(path)) != "gpu":
        for line, module, _ in imports(path):
            assert module.split(".")[0] != "cuda", f"{path.name}:{line}: {module}"


def test_import_brings_neither_numpy_nor_cuda(run_python):
    code = "import sys, cycnn; print({'numpy', 'cuda'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_every_public_name_is_there(run_python):
    run_python("import cycnn\nfor name in cycnn.__all__: getattr(cycnn, name)")


def test_importing_everything_is_quick(run_python):
    """Beyond NumPy, and without looking for a GPU: under 0.15 s, the best of five.

    Of the processor's time, which others that are busy add little to.
    """
    code = """
import time, numpy
start = time.process_time()
import cycnn
cycnn.Tensor, cycnn.nn, cycnn.optim, cycnn.data, cycnn.Trainer
print(time.process_time() - start)
"""
    assert min(float(run_python(code)) for _ in range(5)) < 0.15
