"""Run the GPU tests, also under compute-sanitizer, and write down that they passed.

    python tools/gpu_record.py              run; writes tests/gpu_record.json
    python tools/gpu_record.py --check      does the record belong to the sources?

The record carries a digest of every source that runs on a GPU or judges what ran. It is
written when the tests have passed, plainly and under the first tool, and again after
each further tool; what did not pass is never in it. compute-sanitizer's exit status
alone does not say so (a program that never ran a kernel can look clean), so its summary
and pytest's own counts are demanded too.

This script needs nothing but Python; what it runs needs a GPU, cycnn and pytest.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_record.json"
# What runs on the GPU, what tests it, and what those tests share and compare with.
# Generated files have other suffixes.
COVERED = (
    "cuda/**/*.cu",
    "cuda/**/*.cuh",
    "cycnn/gpu/*.py",
    "cycnn/gpu/*.pyx",
    "cycnn/gpu/*.pxd",
    "cycnn/ops/cuda*.py",
    "cycnn/ops/*fused*.py",
    "cycnn/ops/*plan.py",
    "cycnn/nn/fuse.py",
    "cycnn/nn/inference.py",
    "cycnn/data/window.py",
    "cycnn/ops/reference*.py",
    "cycnn/train/steps.py",
    "cycnn/train/trainer.py",
    "cycnn/tensor.pyx",
    "cycnn/_dlpack.pyx",
    "tools/leak_check.py",
    "tests/gpu/*.py",
    "tests/any_shape.py",
    "tests/bounds.py",
    "tests/conftest.py",
    "tests/demos.py",
    "tests/extremes.py",
    "tests/killed_run.py",
    "tests/random_blocks.py",
    "tests/rounded.py",
    "tests/training.py",
    # of these the tests on a GPU take cases and helpers
    "tests/test_activation.py",
    "tests/test_augment.py",
    "tests/test_batch_norm.py",
    "tests/test_blocks.py",
    "tests/test_conv_transpose.py",
    "tests/test_dropout.py",
    "tests/test_fuse.py",
    "tests/test_onnx_backend.py",
    "tests/test_ops_reference.py",
)
# Apart from a test's own failure (1) and a crash, so that the cause can be told.
ERROR_EXIT = 86
# The compiler's count of a kernel's barriers does not see those in dynamic shared
# memory. So many a block: memory is set aside for them, for all blocks of a launch.
BARRIERS = ["--num-cuda-barriers", "256"]
# Options of each tool, left out where it lacks them.
TOOLS = {
    "memcheck": ["--padding", "512"],
    "racecheck": BARRIERS,
    "initcheck": [],
    "synccheck": BARRIERS,
}
# Libraries probe the driver with calls that may fail: those are not our errors.
COMMON = [
    "--target-processes", "all",
    "--error-exitcode", str(ERROR_EXIT),
    "--report-api-errors", "no",
    "--print-limit", "50",
    # With backtraces of the host it looks at Python's frames at every launch, and never
    # lets go of them (2025.3): no tensor in a local variable would ever be freed.
    "--show-backtrace", "device",
]  # fmt: skip

DEVICE_QUERY = """
import json
import cycnn
from cuda.bindings import __version__ as bindings, runtime
from cycnn.gpu import compile, device
reason = cycnn.cuda_unavailable_reason()
if reason is not None:
    raise SystemExit("no GPU: " + reason)
try:
    nvrtc = compile.nvrtc_version_text()
except cycnn.CudaError:
    nvrtc = None
gpu = device.get(0)
print(json.dumps({
    "device": gpu.name,
    "compute_capability": "%d.%d" % tuple(gpu.capability),
    "cuda_driver_api": runtime.cudaDriverGetVersion()[1],
    "cuda_runtime": runtime.cudaRuntimeGetVersion()[1],
    "cuda_bindings": bindings,
    "nvrtc": nvrtc,
    "cycnn": cycnn.__version__,
}))
"""


class Failed(Exception):
    """A step did not pass; the text says what is wrong."""


def digest(root: Path = ROOT) -> str:
    """SHA-256 over the paths and contents of the covered sources."""
    found = hashlib.sha256()
    files = {path for pattern in COVERED for path in root.glob(pattern)}
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix().encode()
        found.update(b"%d %s %d\n" % (len(name), name, len(content)) + content)
    return found.hexdigest()


def check(record: Path = RECORD, root: Path = ROOT) -> tuple[bool, str]:
    """Whether the record belongs to the sources as they are, and a line that says so."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        ran = (
            f"{content['tests']['passed']} tests passed on {content['device']} on "
            f"{content['date'][:10]}"
        )
        recorded = content["digest"]
    except FileNotFoundError:
        return False, f"MISSING: there is no {record.name}; run make gpu"
    except (ValueError, KeyError, TypeError) as error:
        return False, f"DAMAGED: {record.name}: {error!r}; run make gpu"
    if recorded != digest(root):
        return False, f"STALE: {ran}, but the sources changed since; run make gpu"
    return True, f"CURRENT: {ran}, and under {', '.join(content['sanitizer'])}"


# Reading what the tools say


def junit_counts(path: Path) -> dict:
    """Counts of a pytest run from its JUnit file."""
    if not path.is_file():
        raise Failed("pytest wrote no report: it did not come to its end")
    root = xml.etree.ElementTree.parse(path).getroot()
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    number = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    bad = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - bad - number["skipped"],
        "failed": bad,
        "skipped": number["skipped"],
    }


def deselected(output: str) -> int:
    """How many tests pytest left out, from its last line."""
    lines = re.findall(r"^=+ .*\bin [\d.:]+s?.* =+$", output, re.MULTILINE)
    if not lines:
        raise Failed("pytest's closing line is missing")
    found = re.search(r"(\d+) deselected", lines[-1])
    return int(found[1]) if found else 0


def judge_tests(status: int, counts: dict) -> None:
    if status or counts["failed"] or counts["skipped"] or not counts["passed"]:
        raise Failed(
            f"the GPU tests: {counts['passed']} passed, {counts['failed']} failed, "
            f"{counts['skipped']} skipped (exit status {status})"
        )


def judge_sanitizer(tool: str, status: int, output: str) -> None:
    """Passes only where the tool itself says that it saw the end and found nothing."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    clean = [s for s in summaries if re.match(r"0 (errors|hazards)", s)]
    if status or not summaries or len(clean) != len(summaries):
        said = "; ".join(summaries) or "no summary: the tool did not come to its end"
        raise Failed(f"compute-sanitizer {tool}: {said} (exit status {status})")


def judge_sanitized_tests(counts: dict, left_out: int, plain: dict) -> None:
    if counts["failed"] or counts["skipped"]:
        raise Failed(
            f"under the sanitizer {counts['failed']} tests failed and "
            f"{counts['skipped']} were skipped"
        )
    if not counts["passed"] or counts["passed"] + left_out != plain["passed"]:
        raise Failed(
            f"under the sanitizer {counts['passed']} tests passed and {left_out} were "
            f"left out, which is not the {plain['passed']} of the plain run"
        )


def judge_leaks(status: int, output: str) -> None:
    judge_sanitizer("memcheck --leak-check full", status, output)
    summaries = re.findall(r"LEAK SUMMARY: (\d+) bytes leaked in (\d+)", output)
    if not summaries or any(summary != ("0", "0") for summary in summaries):
        raise Failed(f"leak check: {summaries or 'no leak summary'}")


# Running


def find_sanitizer() -> str:
    """compute-sanitizer: of the PyPI wheel, on the path, or of a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    folders = [
        Path(folder) / "cu13" / "bin"
        for folder in (spec.submodule_search_locations or () if spec else ())
    ]
    folders += os.get_exec_path()
    folders += [
        Path(home) / "bin"
        for home in (
            os.environ.get("CUDA_HOME"),
            os.environ.get("CUDA_PATH"),
            "/usr/local/cuda",
        )
        if home
    ]
    path = os.pathsep.join(map(str, folders))
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        raise Failed(
            "compute-sanitizer is not in site-packages (pip install "
            "nvidia-cuda-sanitizer-api), on PATH, in CUDA_HOME or /usr/local/cuda"
        )
    return found


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    options = TOOLS[tool]
    if options and options[0] not in known:
        options = []
    return [sanitizer, "--tool", tool, *COMMON, *options]


def sanitizer_version(sanitizer: str) -> str:
    said = subprocess.run(
        [sanitizer, "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"Version (\S+)", said)[1]


_printing = threading.Lock()


def run(command, **environment) -> tuple[int, str]:
    """Run a command in tests/, then show what it printed; (status, output)."""
    done = subprocess.run(
        command,
        # not in the root: there `python -m pytest` would import cycnn from the sources
        cwd=ROOT / "tests",
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with _printing:
        print("$", " ".join(map(str, command)))
        print(done.stdout, end="", flush=True)
    return done.returncode, done.stdout


def run_tests(jobs, prefix, judge, **environment) -> dict:
    """The GPU tests, dealt to processes that run side by side on all GPUs; their counts.

    Each process must pass ``judge(status, output, counts)``.
    """
    start = time.monotonic()
    gpus = visible_gpus()

    def one(job):
        report = Path(folder) / f"{job}.xml"
        command = [
            *prefix, sys.executable, "-m", "pytest", "-m", "gpu",
            "-p", "no:cacheprovider", f"--junitxml={report}",
            str(ROOT / "tests" / "gpu"),
        ]  # fmt: skip
        status, output = run(
            command,
            CYCNN_REQUIRE_GPU="1",
            CYCNN_SHARE=f"{job}/{jobs}",
            CUDA_VISIBLE_DEVICES=gpus[job % len(gpus)],
            **environment,
        )
        counts = junit_counts(report)
        judge(status, output, counts)
        return {**counts, "left_out": deselected(output)}

    with tempfile.TemporaryDirectory() as folder:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            parts = list(pool.map(one, range(jobs)))
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return {**total, "seconds": round(time.monotonic() - start, 1)}


def query_device() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", DEVICE_QUERY],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip() or "the GPU could not be asked"
        raise Failed(said.splitlines()[-1])
    found = json.loads(done.stdout)
    found["driver"] = driver_version()
    return found


def ask_driver(field: str) -> list[str]:
    """What nvidia-smi says of each GPU; nothing if it cannot be had."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def driver_version() -> str | None:
    return next(iter(ask_driver("driver_version")), None)


def visible_gpus() -> list[str]:
    """The GPUs that the tests may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        # of one kind: the record names the first
        names = ask_driver("name")
        return [str(i) for i, name in enumerate(names) if name == names[0]] or ["0"]
    return chosen.split(",")


def make_record(tools: list[str], jobs: int, begun: dict | None = None):
    """Run everything, yielding the record after each tool that passes.

    ``begun``: a record of these sources, to which tools that it lacks are added. Failed
    at the first step that does not pass; in the end, if that was a further tool.
    """
    covered = digest()
    record = query_device()
    print(f"GPU: {record['device']}, driver {record['driver']}", flush=True)
    sanitizer = find_sanitizer()
    version = sanitizer_version(sanitizer)
    if begun is None:
        record["leaks"] = check_leaks(sanitizer)
        plain = run_tests(
            jobs, [], lambda status, _, counts: judge_tests(status, counts)
        )
        record["tests"] = {k: v for k, v in plain.items() if k != "left_out"}
        record["sanitizer"] = {}
    else:
        for name in ("device", "driver"):
            if begun[name] != record[name]:
                raise Failed(f"the record is of {begun[name]}, this is {record[name]}")
        record, plain = begun, begun["tests"]
    failures = []
    for tool in tools:
        if tool in record["sanitizer"]:
            continue
        try:
            counts = run_tests(
                jobs,
                sanitizer_command(sanitizer, tool),
                lambda status, output, _: judge_sanitizer(tool, status, output),
                CYCNN_SANITIZE=tool,
                CYCNN_PLAIN_ALLOC="1",
            )
            judge_sanitized_tests(counts, counts["left_out"], plain)
        except Failed as error:
            if not record["sanitizer"]:
                raise
            print(f"gpu: {error}", flush=True)
            failures.append(str(error))
            continue
        record["sanitizer"][tool] = {
            "errors": 0,
            "passed": counts["passed"],
            "left_out": counts["left_out"],
            "seconds": counts["seconds"],
            "version": version,
        }
        if digest() != covered:
            raise Failed("the sources changed while the tests ran")
        now = datetime.datetime.now(datetime.timezone.utc)
        record["date"] = now.isoformat(timespec="seconds")
        record["digest"] = covered
        yield record
    if failures:
        raise Failed("; ".join(failures))


def check_leaks(sanitizer: str) -> dict:
    start = time.monotonic()
    status, output = run(
        [
            *sanitizer_command(sanitizer, "memcheck"),
            *("--leak-check", "full", sys.executable),
            ROOT / "tools" / "leak_check.py",
        ],
        CYCNN_PLAIN_ALLOC="1",
    )
    judge_leaks(status, output)
    return {"bytes": 0, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="only compare the record with the sources"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="test the checkout as built in place, not the installed package",
    )
    parser.add_argument(
        "--tool",
        action="append",
        choices=TOOLS,
        help="sanitizer tool to run the tests under; may be repeated (memcheck)",
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="to a record that belongs to the sources, add the tools that it lacks; "
        "where there is none, begin one",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that share the tests, each with some GPU memory (%(default)s)",
    )
    options = parser.parse_args()
    if options.check:
        current, line = check()
        print(f"gpu-check: {line}")
        return 0 if current else 1
    if options.in_place:
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    written = "left as it was"
    begun = None
    if options.add and check(RECORD)[0]:
        begun = json.loads(RECORD.read_text(encoding="utf-8"))
    try:
        tools = options.tool or ["memcheck"]
        for record in make_record(tools, max(options.jobs, 1), begun):
            write(record)
            written = f"written: {check()[1]}"
            print(f"gpu: {RECORD.relative_to(ROOT)} is {written}", flush=True)
    except Failed as error:
        print(f"gpu: FAILED, {error}. {RECORD.name} is {written}")
        return 1
    print("gpu: passed")
    return 0


def write(record: dict) -> None:
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    temporary.replace(RECORD)


if __name__ == "__main__":
    sys.exit(main())
