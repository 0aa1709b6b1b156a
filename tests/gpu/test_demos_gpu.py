"""The examples under demo/ on a GPU, in each precision that one would take there."""

import re

import demos
import pytest
from training import write_mnist

pytestmark = pytest.mark.no_sanitizer  # programs of their own, which it does not see


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("PIL")
    root = tmp_path_factory.mktemp("folders")
    demos.write_folders(root / "train", 128)
    demos.write_folders(root / "test", 32, seed=1)
    return root


def on_gpu(name, *arguments):
    shown = demos.run(name, "--device", "cuda", *arguments)
    assert shown.startswith("cuda:0: ")
    return shown


def test_lenet(digits):
    shown = on_gpu("lenet", "--data", digits, "--epochs", 3, "--precision", "tf32")
    assert "on cuda:0" in shown
    assert float(re.search(r"([\d.]+)% of 256 test images wrong", shown)[1]) < 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resnet(folders, precision):
    shown = on_gpu(
        "resnet_cifar10", "--data", folders, "--epochs", 5, "--width", 8,
        "--batch-size", 16, "--precision", precision,
    )  # fmt: skip
    assert float(re.search(r"all +([\d.]+)% right", shown)[1]) > 80


def test_autoencoder(digits):
    shown = on_gpu("autoencoder", "--data", digits, "--epochs", 3, "--batch-size", 16)
    error, of_mean = re.search(r": ([\d.]+) from 16 .*: ([\d.]+)\n", shown).groups()
    assert float(error) < 0.7 * float(of_mean)


def test_transfer(digits):
    pytest.importorskip("torch")
    shown = on_gpu("from_pytorch", "--data", digits, "--epochs", 3, "--few", 200)
    # another device sums in another order
    for where in ("as PyTorch's, up to", "back in PyTorch: the same up to"):
        assert float(re.search(rf"{where} (\S+)", shown)[1]) < 1e-3
    assert float(re.search(r"epoch 3/3 .* test +([\d.]+)%", shown)[1]) > 90


def test_folder_of_images(folders):
    shown = on_gpu(
        "image_folder", "--data", folders, "--size", 16, "--epochs", 4,
        "--predict", folders / "test" / "red" / "0.png",
    )  # fmt: skip
    assert "0.png: red " in shown.splitlines()[-1]
