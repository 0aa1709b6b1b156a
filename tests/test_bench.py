"""The benchmarks run, and tell who has learned."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training import write_mnist

BENCH = Path(__file__).resolve().parent.parent / "bench"


def bench(name, *arguments):
    return subprocess.run(
        [sys.executable, BENCH / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def peers(folder, json_file, *arguments):
    return bench(
        "peers.py", "--device", "cpu", "--contestants", "cycnn-*", "--data", folder,
        "--json", json_file, *arguments,
    )


def test_peers(tmp_path):
    folder = write_mnist(tmp_path, 3000)
    done = peers(folder, tmp_path / "out.json", "--epochs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    result = content["results"]["cycnn-fp32"]
    assert len(result["seconds"]) == 2
    assert result["median"] == pytest.approx(sum(result["seconds"]) / 2)
    assert result["learned"] and result["accuracy"] > 0.97
    assert content["device"] and content["date"] and content["batch_size"] == 128
    row = r"^cycnn-fp32 +[\d.]+ +[\d.]+\.\.[\d.]+ +1\.00 "
    assert re.search(row, done.stdout, re.MULTILINE)


def test_who_has_not_learned_has_not_run(tmp_path):
    folder = write_mnist(tmp_path, 128)
    done = peers(folder, tmp_path / "out.json", "--epochs", 1, "--warmup", 0)
    assert done.returncode == 1
    assert "has not learned" in done.stdout


def test_unknown_contestants(tmp_path):
    done = bench("peers.py", "--contestants", "tensorflow")
    assert done.returncode == 2 and "torch-graph-tf32" in done.stderr


def test_import_time():
    done = bench("import_time.py", "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^numpy, then .* [\d.]+ +-?[\d.]+$", done.stdout, re.M)) == 2
