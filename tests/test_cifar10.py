"""The reader of CIFAR-10's binary version, on generated files of fewer records."""

import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cycnn import DataError
from cycnn.data import CIFAR10_CLASSES, cifar10

RECORDS = 5
NAMES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
LENGTH = RECORDS * 3073


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    monkeypatch.setattr(sys.modules["cycnn.data.cifar10"], "_RECORDS", RECORDS)


@pytest.fixture
def files(tmp_path):
    """{name: (images, labels)} of the files in ``tmp_path``."""
    written, rng = {}, np.random.default_rng(1)
    for name in NAMES:
        images = rng.integers(0, 256, (RECORDS, 3, 32, 32), np.uint8)
        labels = rng.integers(0, 10, RECORDS, np.uint8)
        records = np.column_stack([labels, images.reshape(RECORDS, -1)])
        records.tofile(tmp_path / name)
        written[name] = images, labels
    return written


@pytest.mark.parametrize("inner", [False, True])
def test_reads_train_and_test(tmp_path, files, inner):
    root = tmp_path
    if inner:  # as the archive unpacks
        root = tmp_path / "root"
        (root / "cifar-10-batches-bin").mkdir(parents=True)
        for name in NAMES:
            (tmp_path / name).rename(root / "cifar-10-batches-bin" / name)
    train, test = cifar10(str(root))
    assert train.images.shape == (5 * RECORDS, 3, 32, 32)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    for dataset, names in ((train, NAMES[:5]), (test, NAMES[5:])):
        for number, part in enumerate((0, 1)):
            stored = [dataset.images, dataset.labels][number]
            expected = np.concatenate([files[name][part] for name in names])
            np.testing.assert_array_equal(stored, expected)
        assert (dataset.classes, dataset.scale, dataset.shift) == (10, 1 / 255, -0.5)


def test_scale_and_classes(tmp_path, files):
    train, test = cifar10(tmp_path, scale=2.0, shift=1.0)
    assert (train.scale, train.shift, test.scale, test.shift) == (2.0, 1.0) * 2
    assert len(CIFAR10_CLASSES) == 10 and CIFAR10_CLASSES[3] == "cat"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change, what", [(-1, "truncated"), (-3073, "truncated"), (1, "trailing bytes")]
)
def test_wrong_lengths_are_refused(tmp_path, files, name, change, what):
    content = (tmp_path / name).read_bytes() + b"\0"
    (tmp_path / name).write_bytes(content[: LENGTH + change])
    with pytest.raises(
        DataError, match=f"{name}: {what}: 5 .* {LENGTH} bytes.* has {LENGTH + change}"
    ):
        cifar10(tmp_path)


def test_lengths_are_compared_before_memory_is_taken(tmp_path, files, monkeypatch):
    (tmp_path / NAMES[5]).write_bytes(b"")
    monkeypatch.setattr(np, "empty", None)
    monkeypatch.setattr(np, "fromfile", None)
    with pytest.raises(DataError, match=r"test_batch\.bin: truncated: .* has 0"):
        cifar10(tmp_path)


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path, files, monkeypatch):
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args: fromfile(*args)[:-7])
    with pytest.raises(DataError, match=rf"truncated: .* has {LENGTH - 7}"):
        cifar10(tmp_path)


@pytest.mark.parametrize("label", [10, 255])
def test_labels_above_9_are_refused(tmp_path, files, label):
    path = tmp_path / NAMES[3]
    content = bytearray(path.read_bytes())
    content[2 * 3073] = content[4 * 3073] = label
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"4.bin: record 2 has label {label}: .* 0 to 9"
    ):
        cifar10(tmp_path)


def test_missing_files_are_named_with_what_to_do(tmp_path, files):
    (tmp_path / NAMES[1]).unlink()
    (tmp_path / NAMES[5]).unlink()
    with pytest.raises(DataError) as caught:
        cifar10(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} lacks data_batch_2.bin, test_batch.bin:" in message
    assert "cifar-10-binary.tar.gz" in message
    with pytest.raises(DataError, match="lacks data_batch_1.bin"):
        cifar10(tmp_path / "absent")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    content=st.one_of(
        st.binary(max_size=100),
        st.tuples(st.integers(-2, 2), st.binary(min_size=1, max_size=7)),
    ),
)
def test_any_content_gives_a_set_or_a_data_error(tmp_path, files, name, content):
    if isinstance(content, tuple):  # about the right length
        extra, pattern = content
        content = (pattern * LENGTH)[: LENGTH + extra]
    original = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    valid = len(content) == LENGTH and max(content[::3073]) < 10
    try:
        cifar10(tmp_path)
        assert valid
    except DataError as error:
        assert not valid and name in str(error)
    finally:
        (tmp_path / name).write_bytes(original)
