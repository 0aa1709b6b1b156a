"""The record of the GPU tests: when it counts, and that nothing green is false."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cycnn

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location(
    "gpu_record", ROOT / "tools" / "gpu_record.py"
)
gpu_record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_record)

CLEAN = "========= ERROR SUMMARY: 0 errors\n"
NO_LEAKS = "========= LEAK SUMMARY: 0 bytes leaked in 0 allocations\n"


@pytest.fixture
def tree(tmp_path):
    """The covered sources of this checkout, to change at will."""
    for pattern in gpu_record.COVERED:
        for path in ROOT.glob(pattern):
            to = tmp_path / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    return tmp_path


def write_record(path, digest):
    content = {
        "tests": {"passed": 12},
        "device": "a GPU",
        "date": "2026-01-02T03:04:05+00:00",
        "sanitizer": {"memcheck": {}},
        "digest": digest,
    }
    path.write_text(json.dumps(content))


def test_record_of_these_sources_is_current(tree):
    write_record(tree / "record", gpu_record.digest(tree))
    current, line = gpu_record.check(tree / "record", tree)
    assert current and "12 tests passed on a GPU on 2026-01-02" in line


def neighbours(path):
    """Modules beside the tests that a module imports, or names as a script to run."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and str(node.value).endswith(".py"):
            names = [str(node.value)[:-3]]
        else:
            continue
        for name in names:
            if (found := ROOT / "tests" / f"{name}.py").is_file():
                yield found


def test_what_tests_on_a_gpu_import_is_covered():
    covered = {path for pattern in gpu_record.COVERED for path in ROOT.glob(pattern)}
    left = sorted((ROOT / "tests" / "gpu").glob("*.py"))
    # fixtures come unasked
    left.append(ROOT / "tests" / "conftest.py")
    seen = set(left)
    while left:
        for path in neighbours(left.pop()):
            if path not in seen:
                seen.add(path)
                left.append(path)
    names = {path.name for path in seen}
    assert {"bounds.py", "demos.py", "killed_run.py", "test_ops_reference.py"} <= names
    assert not seen - covered, "put these into COVERED of tools/gpu_record.py"


@pytest.mark.parametrize("pattern", gpu_record.COVERED)
def test_every_pattern_covers_something(pattern):
    assert list(ROOT.glob(pattern))


@pytest.mark.parametrize(
    "name",
    [
        "cuda/gemm.cu",
        "cycnn/ops/reference_loss.py",
        "cycnn/train/trainer.py",
        "tests/bounds.py",
        "tests/gpu/conftest.py",
        "tools/leak_check.py",
    ],
)
def test_what_runs_and_what_judges_count(tree, name):
    before = gpu_record.digest(tree)
    (tree / name).write_bytes((tree / name).read_bytes() + b"\n")
    assert gpu_record.digest(tree) != before


@pytest.mark.parametrize("change", ["edit", "add", "rename", "remove"])
def test_any_change_of_a_source_makes_the_record_stale(tree, change):
    write_record(tree / "record", gpu_record.digest(tree))
    source = tree / "cycnn" / "gpu" / "memory.pyx"
    if change == "edit":
        source.write_bytes(source.read_bytes() + b"\n")
    elif change == "add":
        source.with_name("another.py").write_text("")
    elif change == "rename":
        source.rename(source.with_name("memories.pyx"))
    else:
        source.unlink()
    current, line = gpu_record.check(tree / "record", tree)
    assert not current and line.startswith("STALE")


@pytest.mark.parametrize(
    "name",
    ["cycnn/gpu/memory.cpp", "cycnn/gpu/memory.so", "tests/gpu/__pycache__/a.pyc"],
)
def test_generated_files_do_not_count(tree, name):
    before = gpu_record.digest(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"made")
    assert gpu_record.digest(tree) == before


def test_missing_and_damaged_records(tree):
    record = tree / "record"
    assert gpu_record.check(record, tree)[1].startswith("MISSING")
    for content in ("", "{}", "[]", '{"digest": 1}'):
        record.write_text(content)
        current, line = gpu_record.check(record, tree)
        assert not current and line.startswith("DAMAGED")


@pytest.mark.parametrize(
    "status, output",
    [
        (86, CLEAN),
        (0, "12 passed in 1.00s"),
        (0, "========= ERROR SUMMARY: 3 errors\n"),
        (0, CLEAN + "========= ERROR SUMMARY: 10 errors\n"),
        (255, "Target application terminated before first instrumented API call\n"),
    ],
)
def test_a_sanitizer_run_that_does_not_count(status, output):
    with pytest.raises(gpu_record.Failed, match="memcheck"):
        gpu_record.judge_sanitizer("memcheck", status, output)


def test_a_clean_sanitizer_run():
    gpu_record.judge_sanitizer("memcheck", 0, CLEAN)
    racecheck = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    gpu_record.judge_sanitizer("racecheck", 0, racecheck)


@pytest.mark.parametrize(
    "counts, left_out",
    [
        ({"passed": 9, "failed": 0, "skipped": 0}, 2),
        ({"passed": 10, "failed": 0, "skipped": 2}, 0),
        ({"passed": 10, "failed": 2, "skipped": 0}, 0),
        ({"passed": 0, "failed": 0, "skipped": 0}, 12),
    ],
)
def test_sanitized_tests_must_be_those_of_the_plain_run(counts, left_out):
    with pytest.raises(gpu_record.Failed):
        gpu_record.judge_sanitized_tests(counts, left_out, {"passed": 12})


def test_leaks():
    gpu_record.judge_leaks(0, NO_LEAKS + CLEAN)
    for output in (CLEAN, NO_LEAKS.replace("0 bytes", "512 bytes") + CLEAN, NO_LEAKS):
        with pytest.raises(gpu_record.Failed):
            gpu_record.judge_leaks(0, output)


@pytest.mark.parametrize(
    "status, counts",
    [
        (0, {"passed": 0, "failed": 0, "skipped": 0}),
        (0, {"passed": 5, "failed": 0, "skipped": 1}),
        (1, {"passed": 5, "failed": 1, "skipped": 0}),
        (3, {"passed": 5, "failed": 0, "skipped": 0}),
    ],
)
def test_a_plain_run_that_does_not_count(status, counts):
    with pytest.raises(gpu_record.Failed, match="passed"):
        gpu_record.judge_tests(status, counts)


TESTS = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_good(n): pass
def test_left_out(): pass
{}
"""


@pytest.mark.parametrize(
    "extra, passed, failed, skipped",
    [("", 3, 0, 0), ("def test_bad(): assert 0", 3, 1, 0)]
    + [("def test_skip(): pytest.skip()", 3, 0, 1), ("1 / 0", 0, 1, 0)],
)
def test_counts_are_what_pytest_says(pytester, extra, passed, failed, skipped):
    pytester.makepyfile(TESTS.format(extra))
    done = pytester.runpytest("--junitxml=report.xml", "-k", "not left_out")
    counts = gpu_record.junit_counts(Path("report.xml"))
    assert counts == {"passed": passed, "failed": failed, "skipped": skipped}
    if passed:
        assert gpu_record.deselected(done.stdout.str()) == 1


def test_a_run_without_report_or_closing_line(tmp_path):
    with pytest.raises(gpu_record.Failed):
        gpu_record.junit_counts(tmp_path / "report.xml")
    with pytest.raises(gpu_record.Failed):
        gpu_record.deselected("collected 3 items\n")


def test_every_test_is_in_one_share(tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    (tests / "gpu").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "gpu" / "test_some.py").write_text(TESTS.format(""))
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cycnn.__file__).resolve().parents[1]))
    judged = []
    counts = gpu_record.run_tests(3, [], lambda *given: judged.append(given))
    # without a GPU they fail, since they are required to run
    assert counts["passed"] + counts["failed"] == 4
    assert sorted(sum(c.values()) for _, _, c in judged) == [1, 1, 2]


def test_the_tests_run_on_all_gpus_of_one_kind(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_record, "ask_driver", lambda field: ["A", "B", "A"])
    assert gpu_record.visible_gpus() == ["0", "2"]
    monkeypatch.setattr(gpu_record, "ask_driver", lambda field: [])
    assert gpu_record.visible_gpus() == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu_record.visible_gpus() == ["3", "1"]


def test_what_is_checked_for_leaks_runs_to_its_end(tmp_path):
    package = Path(cycnn.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "leak_check.py", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def gpu_machine(monkeypatch, tmp_path, driver="1"):
    """A machine on which racecheck finds something; what ran there, tool by tool."""
    counts = {"passed": 3, "failed": 0, "skipped": 0, "left_out": 0, "seconds": 1.0}
    ran = []

    def run_tests(jobs, prefix, judge, **environment):
        ran.append(prefix[-1] if prefix else "plain")
        if "racecheck" in prefix:
            raise gpu_record.Failed("compute-sanitizer racecheck: 1 hazard")
        return counts

    for name, stand_in in {
        "ROOT": tmp_path,
        "RECORD": tmp_path / "record.json",
        "query_device": lambda: {"device": "a GPU", "driver": driver},
        "find_sanitizer": lambda: "sanitizer",
        "sanitizer_command": lambda sanitizer, tool: [sanitizer, "--tool", tool],
        "sanitizer_version": lambda sanitizer: "1.2",
        "check_leaks": lambda sanitizer: {"bytes": 0, "seconds": 1.0},
        "run_tests": run_tests,
        "digest": lambda *_: "of the sources",
    }.items():
        monkeypatch.setattr(gpu_record, name, stand_in)
    return ran


def test_the_first_tool_has_to_pass(monkeypatch, tmp_path):
    ran = gpu_machine(monkeypatch, tmp_path)
    assert record_with(monkeypatch, "--tool=racecheck", "--tool=memcheck") == 1
    assert ran == ["plain", "racecheck"]
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("options", [["--num-cuda-barriers", "256"], []])
def test_options_that_the_tool_lacks_are_left_out(tmp_path, options):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho Version 1.2 {' '.join(options[:1])}\n")
    tool.chmod(0o755)
    command = gpu_record.sanitizer_command(str(tool), "synccheck")
    assert command[3 + len(gpu_record.COMMON) :] == options
    assert gpu_record.sanitizer_version(str(tool)) == "1.2"


def record_with(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", *arguments])
    return gpu_record.main()


def test_a_record_holds_the_tools_that_passed_and_no_other(monkeypatch, tmp_path):
    gpu_machine(monkeypatch, tmp_path)
    tools = [f"--tool={tool}" for tool in ("memcheck", "racecheck", "initcheck")]
    assert record_with(monkeypatch, *tools) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    # a further tool that finds something does not keep the others from their turn
    assert list(record["sanitizer"]) == ["initcheck", "memcheck"]
    assert record["tests"]["passed"] == 3 and record["digest"] == "of the sources"


def test_tools_are_added_to_a_current_record(monkeypatch, tmp_path):
    ran = gpu_machine(monkeypatch, tmp_path)
    # there is none yet
    assert record_with(monkeypatch, "--add", "--tool=memcheck") == 0
    assert record_with(monkeypatch, "--add", "--tool=memcheck", "--tool=initcheck") == 0
    assert ran == ["plain", "memcheck", "initcheck"]
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["sanitizer"]) == ["initcheck", "memcheck"]
    # other sources, another machine
    monkeypatch.setattr(gpu_record, "digest", lambda *_: "of others")
    assert record_with(monkeypatch, "--add") == 0
    assert ran[3:] == ["plain", "memcheck"]
    gpu_machine(monkeypatch, tmp_path, driver="2")
    monkeypatch.setattr(gpu_record, "digest", lambda *_: "of others")
    assert record_with(monkeypatch, "--add", "--tool=initcheck") == 1
