"""The examples under demo/ but for train_mnist.py, run as a person runs them."""

import os
import re

import demos
import numpy as np
import pytest
from training import write_mnist

import cycnn
from cycnn import DataError, data, nn


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a small set in MNIST's format that is easy to learn."""
    return write_mnist(tmp_path_factory.mktemp("digits"), 640, 128)


def on_cpu(name, *arguments, **settings):
    return demos.run(name, "--device", "cpu", *arguments, **settings)


@pytest.mark.parametrize("name", demos.NAMES)
def test_help(name):
    shown = demos.run(name, "--help")
    assert f"python demo/{name}.py" in shown
    for option in ("--epochs", "--device", "--precision", "--images", "--data"):
        assert option in shown


def test_bad_arguments():
    assert "--epochs must be at least 1" in demos.refused("lenet", "--epochs", 0)
    assert "tpu" in demos.refused("lenet", "--device", "tpu")


def test_lenet(digits, tmp_path):
    weights = tmp_path / "weights"
    shown = on_cpu("lenet", "--data", digits, "--epochs", 2, "--save", weights)
    assert "61,706 parameters on cpu" in shown
    assert float(re.search(r"([\d.]+)% of 128 test images wrong", shown)[1]) < 10
    layers = [0, 3, 6, 9, 11]
    expected = {f"{i}.{kind}" for i in layers for kind in ("weight", "bias")}
    assert set(nn.weights.read(weights)[0]) == expected


def test_modern_lenet_on_few_images(digits):
    shown = on_cpu(
        "lenet", "--data", digits, "--epochs", 1, "--images", 100, "--modern"
    )
    assert "ReLU()" in shown and "MaxPool2d" in shown


def test_lenet_on_real_digits():
    """One epoch of 4,000 digits of MNIST."""
    folder = os.environ.get("CYCNN_TEST_MNIST") or os.environ.get("CYCNN_DATA")
    try:
        data.mnist(folder, download=False)
    except DataError:
        pytest.skip("MNIST is not on this machine: name its folder with CYCNN_DATA")
    options = ["--images", 4000, "--epochs", 1, "--batch-size", 32]
    if folder is not None:
        options += ["--data", folder]
    shown = on_cpu("lenet", *options)
    assert float(re.search(r"([\d.]+)% of", shown)[1]) < 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("PIL")
    root = tmp_path_factory.mktemp("folders")
    demos.write_folders(root / "train", 32)
    demos.write_folders(root / "test", 8, seed=1)
    return root


SMALL = ("--width", 4, "--depth", 1, "--batch-size", 16)


def test_resnet_on_folders(folders, tmp_path):
    weights = tmp_path / "weights"
    shown = on_cpu(
        "resnet_cifar10", "--data", folders, "--epochs", 4, *SMALL, "--save", weights
    )
    assert "64 images to train on, 16 to test, 2 classes" in shown
    shares = dict(re.findall(r"(\w+) +([\d.]+)% right", shown))
    assert set(shares) == {"red", "blue", "all"}
    assert float(shares["all"]) > 80
    names = set(nn.weights.read(weights)[0])
    assert {"0.weight", "1.running_mean", "5.shortcut.0.weight"} <= names


def test_resnet_on_the_binary_files(tmp_path):
    # the reader wants files of full length; one serves as all of them
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (10_000, 3073), np.uint8)
    records[:, 0] %= 10
    first = tmp_path / "test_batch.bin"
    records.tofile(first)
    for number in range(1, 6):
        os.link(first, tmp_path / f"data_batch_{number}.bin")
    arguments = ["--data", tmp_path, "--images", 32, "--epochs", 1, "--width", 1]
    shown = on_cpu("resnet_cifar10", *arguments, "--depth", 1)
    assert "32 images to train on, 10,000 to test, 10 classes" in shown
    assert len(re.findall("% right", shown)) == 11


def test_resnet_without_data(tmp_path):
    message = demos.refused("resnet_cifar10", "--data", tmp_path)
    assert "cifar-10-binary.tar.gz" in message and "train/CLASS" in message


def test_autoencoder(digits, tmp_path):
    arguments = ["--data", digits, "--epochs", 3, "--batch-size", 16, "--images", 320]
    shown = on_cpu("autoencoder", *arguments, "--save", tmp_path / "weights")
    assert "accuracy" not in shown
    error, of_mean = re.search(r": ([\d.]+) from 16 .*: ([\d.]+)\n", shown).groups()
    assert float(error) < 0.7 * float(of_mean)
    # an input channel a number of the code
    weights, _ = nn.weights.read(tmp_path / "weights")
    assert weights["7.weight"].shape == (16, 32, 7, 7)


def test_picture_of_the_autoencoder(digits, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    arguments = ["--data", digits, "--epochs", 1, "--images", 32, "--numbers", 2]
    on_cpu("autoencoder", *arguments, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_picture_without_matplotlib(digits, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    message = demos.refused(
        "autoencoder", "--data", digits, "--plot", "x.png",
        env=demos.environment(tmp_path),
    )  # fmt: skip
    assert message == "--plot needs matplotlib: pip install matplotlib"


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which PyTorch cannot be imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise ImportError('none here')")
    return demos.environment(tmp_path / "path")


def test_transfer_without_pytorch(digits, tmp_path, no_torch):
    pytest.importorskip("onnx")
    cycnn.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 5),
    ).to("cpu")  # fmt: skip
    model.save(tmp_path / "weights")
    path = tmp_path / "net.onnx"
    shown = on_cpu(
        "from_pytorch", "--data", digits, "--weights", tmp_path / "weights",
        "--epochs", 2, "--few", 200, "--onnx", path, env=no_torch,
    )  # fmt: skip
    assert "digits 5 to 9, 200 images to learn from" in shown
    assert float(re.search(r"epoch 2/2 .* test +([\d.]+)%", shown)[1]) > 90
    assert float(re.search(r"ONNX file: the same up to (\S+)", shown)[1]) < 1e-5
    assert len(cycnn.onnx.load(path)) == 10
    assert "PyTorch" not in shown

    message = demos.refused("from_pytorch", "--data", digits, env=no_torch)
    assert "pip install torch" in message and "--weights" in message
    message = demos.refused(
        "from_pytorch", "--data", digits, "--weights", tmp_path / "none", env=no_torch
    )
    assert message.startswith("--weights: ")


def test_transfer_from_pytorch_and_back(digits, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "weights"
    # PyTorch's threads spin while they wait, which is slow where cores are few and busy
    env = {**demos.environment(), "OMP_WAIT_POLICY": "passive"}
    arguments = ["--data", digits, "--epochs", 3, "--few", 200, "--keep", path]
    shown = on_cpu("from_pytorch", *arguments, env=env)
    for where in ("as PyTorch's, up to", "back in PyTorch: the same up to"):
        assert float(re.search(rf"{where} (\S+)", shown)[1]) < 1e-4
    assert float(re.search(r"digits 0 to 4: ([\d.]+)% right", shown)[1]) > 90
    assert "0.weight" in nn.weights.read(path)[0]


def test_folder_of_images(folders, tmp_path):
    weights = tmp_path / "weights"
    common = ["--data", folders, "--size", 16, "--width", 4, "--batch-size", 8]
    shown = on_cpu("image_folder", *common, "--epochs", 4, "--save", weights)
    assert "64 images to train on, 16 to test; 2 classes: blue, red" in shown
    assert float(re.search(r"epoch 4/4 .* test +([\d.]+)%", shown)[1]) > 80

    files = [folders / "test" / name / "0.png" for name in ("red", "blue")]
    arguments = ["--load", weights, "--predict", *files]
    red, blue = on_cpu("image_folder", *arguments).splitlines()[1:]
    assert red.startswith(f"{files[0]}: red ")
    assert blue.startswith(f"{files[1]}: blue ")
    message = demos.refused("image_folder", *arguments, tmp_path / "none.png")
    assert message.startswith("--predict: ")
    message = demos.refused("image_folder", "--load", "none", "--predict", files[0])
    assert message.startswith("--load: ")


def test_one_folder_is_split(folders):
    common = ["--size", 8, "--width", 1, "--epochs", 1]
    shown = on_cpu("image_folder", "--data", folders / "train", *common)
    assert "52 images to train on, 12 to test" in shown


def test_drawn_images():
    pytest.importorskip("PIL")
    shown = on_cpu("image_folder", "--epochs", 1, "--images", 64, "--width", 4)
    assert "3 classes: circle, square, triangle" in shown


def test_folder_of_images_without_pillow(tmp_path):
    (tmp_path / "PIL.py").write_text("raise ImportError('none here')")
    message = demos.refused("image_folder", env=demos.environment(tmp_path))
    assert message.endswith("pip install pillow")


def test_folder_that_is_none(tmp_path):
    message = demos.refused("image_folder", "--data", tmp_path)
    assert "a folder of images for each class" in message
