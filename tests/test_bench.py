"""The benchmarks run, and tell who has learned."""

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training import write_mnist

from cycnn import nn

BENCH = Path(__file__).resolve().parent.parent / "bench"


def bench(name, *arguments):
    return subprocess.run(
        [sys.executable, BENCH / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def peers(folder, *arguments):
    return bench(
        "peers", "--device", "cpu", "--threads", 1, "--data", folder,
        "--json", folder / "out.json",
        *arguments,
    )


def results(folder):
    return json.loads((folder / "out.json").read_text())["results"]


def test_training(tmp_path):
    folder = write_mnist(tmp_path, 3000)
    done = peers(
        folder, "--contestants", "cycnn-*", "--epochs", 4, "--chart", folder / "out.png"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["about"]["device"] and content["about"]["date"]
    assert list(content["results"]) == ["reference-128"]
    result = content["results"]["reference-128"]["cycnn-fp32"]
    assert len(result["seconds"]) == 4
    assert min(result["seconds"]) <= result["median"] <= max(result["seconds"])
    assert result["learned"] and result["accuracy"] > 0.97
    row = r"^cycnn-fp32 +[\d.]+ +[\d.]+\.\.[\d.]+ +1\.00 "
    assert re.search(row, done.stdout, re.MULTILINE)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")

    again = bench("peers", "--read", folder / "out.json")
    assert again.returncode == 0
    assert again.stdout == done.stdout


def test_who_has_not_learned_has_not_run(tmp_path):
    folder = write_mnist(tmp_path, 128)
    done = peers(
        folder, "--contestants", "cycnn-*", "--epochs", 1, "--chart", folder / "out.png"
    )
    assert done.returncode == 1
    assert "accuracy too low" in done.stdout
    assert "nothing to draw" in done.stderr


def test_other_tasks(tmp_path):
    """Inference with the weights of a training, the start, other networks."""
    folder = write_mnist(tmp_path, 3000)
    done = peers(
        folder, "--contestants", "cycnn-*", "--networks", "predict-*,start,lenet-128",
        "--quick",
    )
    found = {name: row["cycnn-fp32"] for name, row in results(folder).items()}
    assert set(found) == {
        "lenet-128", "predict-10000", "predict-10000-resident", "predict-1", "start"
    }, done.stderr
    for name in ("predict-10000", "predict-10000-resident", "predict-1"):
        assert found[name]["accuracy"] > 0.3, done.stdout  # chance: 0.1
    phases = found["start"]["phases"]
    assert list(phases) == [
        "imports", "data", "model", "epoch 1", "epoch 2", "epoch 3", "test"
    ]
    assert sum(phases.values()) == pytest.approx(found["start"]["median"])


def test_larger_networks(tmp_path):
    folder = write_mnist(tmp_path, 1, 1)
    done = peers(
        folder, "--contestants", "cycnn-*", "--networks",
        "vgg-*,resnet-*,separable-*", "--images", 12, "--epochs", 1,
    )
    assert done.returncode == 1, done.stderr  # nobody learns from 12 images
    found = results(folder)
    names = "vgg", "resnet", "separable"
    assert list(found) == [f"{name}-{batch}" for name in names for batch in (128, 512)]
    assert all("median" in row["cycnn-fp32"] for row in found.values())


@pytest.mark.parametrize("name", ["reference", "lenet", "vgg", "resnet", "separable"])
def test_everybody_computes_the_same(name, monkeypatch):
    """Scores and running statistics, from the same weights."""
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(BENCH / "peers")
    import networks
    import run_jax
    import run_torch

    network = networks.NETWORKS[name]
    weights = networks.starting_weights(network)
    ours = networks.build(network, nn, nn.Residual).to("cpu")
    for parameter, array in zip(ours.parameters(), weights, strict=True):
        parameter.data.copy_(array)
    theirs = run_torch.build(network)
    options = argparse.Namespace(device="cpu", folder=None)
    contestant = run_jax.Contestant("jax-scan", "fp32", options)
    parameters = run_jax.to_jax(network, weights)
    statistics = run_jax.starting_statistics(network)
    x = networks.load(network, None, 4)[0].floats() if network.data == "patterns" else (
        np.random.default_rng(0).random((4, 1, 28, 28), np.float32)
    )
    for training in True, False:
        ours.train(training)
        theirs.train(training)
        want = ours(x).numpy()
        found = theirs(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
        given = parameters, statistics, run_jax.nhwc(x), training
        for pooling in "reduce_window", "reshape":
            scores, statistics = contestant.log_probs(network, pooling, *given)
            np.testing.assert_allclose(np.asarray(scores), want, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(statistics) == jax.tree.structure(
        run_jax.starting_statistics(network)
    )


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_everybody_trains_the_same(optimizer, monkeypatch):
    """The weights afterwards: optimizer, falling rate, smaller last batch."""
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(BENCH / "peers")
    import networks
    import run_cycnn
    import run_jax
    import run_torch

    # large enough to show in a few steps
    for name, value in ("DECAY", 0.1), ("EPS", 0.01), ("ALPHA", 0.7):
        monkeypatch.setattr(networks, name, value)
    layers = networks.Conv(1, 4, 5, pool=True), networks.Linear(576, 10)
    network = networks.Network(layers, optimizer=optimizer, rate=0.01)
    monkeypatch.setitem(networks.NETWORKS, "small", network)
    setting = networks.Setting("train", "small", 2, "")
    # the same image over and over, since everybody has an order of its own
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28), np.uint8)
    part = networks.Images(image.repeat(5, 0), np.full(5, 3, np.int32))

    def trained(module, kind):
        options = argparse.Namespace(device="cpu", threads=1, folder=None)
        contestant = module.Contestant(kind, "fp32", options)
        seconds, accuracy, _ = contestant.train(setting, [part, part], 2)
        assert len(seconds) == 2 and accuracy == 1
        return contestant.weights

    want = trained(run_cycnn, "cycnn")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for found, array in zip(trained(run_torch, "torch-eager"), want, strict=True):
        close(found.numpy(), array)
    jax.tree.map(close, trained(run_jax, "jax-scan"), run_jax.to_jax(network, want))


def run_of(folder, name, device, date, **figures):
    """A file as --json writes it: figures of reference-128 of some contestants."""
    found = {
        who.replace("_", "-"): {
            "seconds": [second], "median": second, "accuracy": 0.99, "learned": True,
            "version": "1", "settings": "none",
        }
        for who, second in figures.items()
    }
    about = {"date": date, "device": device}
    content = {"about": about, "results": {"reference-128": found}}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_runs_are_read_as_one(tmp_path):
    chart = tmp_path / "out.png"
    runs = [
        run_of(tmp_path, "a", "GPU 1", "Monday", jax_scan_fp32=4.0, cycnn_fp32=1.0),
        run_of(tmp_path, "b", "GPU 1", "Tuesday", cycnn_fp32=2.0, torch_graph_fp32=3.0),
        run_of(tmp_path, "c", "GPU 2", "Friday", torch_eager_fp32=8.0),
    ]
    done = bench("peers", "--read", *runs, "--chart", chart)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "[1] date Monday, device GPU 1",
        "[2] date Tuesday, device GPU 1",
        "[3] date Friday, device GPU 2",
    ]
    rows = [line.split() for line in lines if "99.00%" in line]
    # in the usual order; the later of two counts; ratios to cycnn in the same run, even
    # where that figure is not the one that counts
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        ("cycnn-fp32", "[2]", "2000", "1.00"),
        ("torch-eager-fp32", "[3]", "8000", "-"),
        ("torch-graph-fp32", "[2]", "3000", "1.50"),
        ("jax-scan-fp32", "[1]", "4000", "4.00"),
    ]
    assert chart.read_bytes().startswith(b"\x89PNG")


def stand_in(folder, script):
    """An interpreter that has every peer installed, and runs ``script`` instead."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{script}\n')
    python.chmod(0o755)
    return python


def test_who_fails_is_reported_and_the_rest_goes_on(tmp_path):
    folder = write_mnist(tmp_path)
    python = stand_in(folder, "echo no luck >&2; exit 3")
    peers(
        folder, "--contestants", "torch-eager-*,cycnn-*", "--peer-python", python,
        "--networks", "reference-*,lenet-128", "--epochs", 1, "--images", 128,
    )
    found = results(folder)
    names = "reference-128", "reference-32", "reference-1024", "lenet-128"
    assert tuple(found) == names
    assert all("median" in row["cycnn-fp32"] for row in found.values())
    errors = [found[name]["torch-eager-fp32"]["error"] for name in names]
    assert errors[:3] == ["exit status 3\nno luck\n"] * 3
    assert errors[3] == "left out: 3 failures in a row before"


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path):
    folder = write_mnist(tmp_path, 256)
    python = stand_in(folder, "sleep 600 & echo $! > $0.pid; wait")
    process = subprocess.Popen(
        [sys.executable, BENCH / "peers", "--device", "cpu", "--data", folder,
         "--contestants", "cycnn-*,torch-eager-*", "--epochs", "1",
         "--peer-python", python, "--json", folder / "out.json"],
        stdout=subprocess.PIPE, text=True,
    )
    started = folder / "python.pid"
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cycnn-fp32" in printed
    assert "median" in results(folder)["reference-128"]["cycnn-fp32"]
    # what a contestant started is gone, too; a zombie has no command line
    command = Path("/proc", started.read_text().strip(), "cmdline")
    deadline = time.monotonic() + 10
    while command.exists() and command.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_limit(tmp_path):
    folder = write_mnist(tmp_path, 1, 1)
    python = stand_in(folder, "sleep 600")
    done = peers(
        folder, "--contestants", "torch-eager-*", "--peer-python", python, "--limit", 1
    )
    assert done.returncode == 1
    (result,) = results(folder)["reference-128"].values()
    assert result == {"error": "not done after 1 s"}


def test_unknown_names():
    done = bench("peers", "--contestants", "tensorflow")
    assert done.returncode == 2 and "torch-graph-tf32" in done.stderr
    done = bench("peers", "--networks", "resnet")
    assert done.returncode == 2 and "vgg-512" in done.stderr


def test_chart_without_matplotlib(tmp_path, monkeypatch):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = bench("peers", "--chart", tmp_path / "out.png")
    assert done.returncode == 1
    assert done.stderr == "--chart needs matplotlib: pip install matplotlib\n"


def test_the_table_of_errors():
    done = bench("errors.py", "--device", "cpu", "--shapes", 2)
    assert done.returncode == 0, done.stderr
    kinds = dict(re.findall(r"^(\S.*?) +fp32  (.*)$", done.stdout, re.M))
    assert len(kinds) == done.stdout.count("\n") - 1 == 35
    errors = {
        kind: [float(error) for error in re.findall(r"\d\.\de[+-]\d+", figures)]
        for kind, figures in kinds.items()
    }
    assert len(errors["Conv2d"]) == 4 and min(map(len, errors.values())) >= 1
    # a variance that is the difference of two large numbers
    assert max(errors.pop("RMSprop, centered")) < 1e-2
    assert max(sum(errors.values(), [])) < 1e-5


def test_import_time():
    done = bench("import_time.py", "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^numpy, then .* [\d.]+ +-?[\d.]+$", done.stdout, re.M)) == 2
