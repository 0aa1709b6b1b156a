"""Fixtures that every test may use, and what happens to GPU tests without a GPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cycnn

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ROOT / "tests" / "gpu"
# Set where a GPU must be there (make gpu): a GPU test that is skipped has failed.
REQUIRE_GPU = os.environ.get("CYCNN_REQUIRE_GPU") == "1"
SANITIZER = os.environ.get("CYCNN_SANITIZE")  # the tool of compute-sanitizer, if any
# "2/8": the third of eight processes that share the tests.
SHARE = os.environ.get("CYCNN_SHARE", "0/1")


# A shell starts its background jobs with Ctrl-C ignored, and what they start inherits it.
# Tests of Ctrl-C mean a program that a person runs.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    reason = cycnn.cuda_unavailable_reason()
    return [
        f"cycnn {cycnn.__version__} from {Path(cycnn.__file__).parent}",
        f"GPU tests: {'run' if reason is None else f'skipped, {reason}'}",
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    share, shares = map(int, SHARE.split("/"))
    # neighbours are alike, and go to different processes
    items[:] = items[share::shares]
    left_out = []
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if SANITIZER and item.get_closest_marker("no_sanitizer"):
            left_out.append(item)
        elif SANITIZER == "racecheck" and item.get_closest_marker("long"):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        reason = cycnn.cuda_unavailable_reason()
        if reason is not None:
            pytest.skip(f"no GPU: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REQUIRE_GPU and report.skipped and item.get_closest_marker("gpu"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        report.outcome = "failed"
        report.longrepr = f"CYCNN_REQUIRE_GPU=1, and this GPU test did not run. {why}"
    return report


@pytest.fixture
def run_python(tmp_path):
    """A function that runs code in a fresh interpreter, away from the checkout.

    It imports the same cycnn as this process does, wherever that lies. Keyword
    arguments set environment variables (None unsets one). Returns what the code
    printed; the code must exit with status 0.
    """

    def run(code, **environment):
        env = dict(os.environ)
        env["PYTHONPATH"] = str(Path(cycnn.__file__).resolve().parent.parent)
        for name, value in environment.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
