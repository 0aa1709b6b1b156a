"""What the tests of the demos share: running them, and sets to run them on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

DEMOS = Path(__file__).resolve().parent.parent / "demo"
NAMES = ("lenet", "resnet_cifar10", "autoencoder", "from_pytorch", "image_folder")


def environment(folder=None):
    """Without MNIST, and no mirror is reached; ``folder`` comes first on the path."""
    closed = "http://127.0.0.1:9"
    found = {**os.environ, "https_proxy": closed, "http_proxy": closed}
    found.pop("CYCNN_DATA", None)
    if folder is not None:
        path = [str(folder), os.environ.get("PYTHONPATH")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return found


def attempt(name, *arguments, env=None):
    return subprocess.run(
        [sys.executable, DEMOS / f"{name}.py", *map(str, arguments)],
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(name, *arguments, env=None):
    """What a demo printed; it has to succeed."""
    done = attempt(name, *arguments, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(name, *arguments, env=None):
    """What a demo said when it gave up, which it has to do in words."""
    done = attempt(name, *arguments, env=env)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def write_folders(root, count, size=32, seed=0):
    """PNG files in two class folders: one class is red, the other one is blue."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 100, (size, size, 3), np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
