"""The IDX reader: what it reads, and that it refuses everything else by name."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycnn import DataError
from cycnn.data import load_idx_pair, read_idx, write_idx

DTYPES = ("uint8", "int8", "int16", "int32", "float32", "float64")


def idx_bytes(array):
    codes = dict(u1=8, i1=9, i2=11, i4=12, f4=13, f8=14)
    array = np.asarray(array)
    head = struct.pack(">2xBB", codes[array.dtype.str[1:]], array.ndim)
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return head + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def example(dtype="uint8", shape=(3, 4, 5)):
    values = np.random.default_rng(1).integers(-100, 100, shape)
    return values.astype(dtype)


@pytest.fixture
def file(tmp_path):
    def write(content, name="some-idx3-ubyte"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_every_type_in_native_order(file, dtype, pack):
    array = example(dtype)
    read = read_idx(file(pack(idx_bytes(array))))
    assert read.dtype == np.dtype(dtype) and read.dtype.isnative
    np.testing.assert_array_equal(read, array)
    read[0, 0, 0] = 1  # the caller's own, writable


@pytest.mark.parametrize("shape", [(0,), (7,), (0, 28, 28), (2, 3, 4, 5, 6), (1,) * 9])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_every_shape(file, shape, pack):
    array = example("int16", shape)
    read = read_idx(str(file(pack(idx_bytes(array)))))
    assert read.shape == shape
    np.testing.assert_array_equal(read, array)


def test_content_not_name_says_whether_it_is_gzip(file):
    array = example()
    packed = file(gzip.compress(idx_bytes(array)), "named-plain")
    plain = file(idx_bytes(array), "named-packed.gz")
    np.testing.assert_array_equal(read_idx(packed), array)
    np.testing.assert_array_equal(read_idx(plain), array)


GOOD = idx_bytes(example())
HEADER = GOOD[:16]
BAD = {
    "empty": (b"", "0 bytes are too few"),
    "two bytes": (b"\0\0", "2 bytes are too few"),
    "wrong magic": (b"\x01" + GOOD[1:], "not an IDX file: starts with 0x01000803"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "starts with 0x89504e47"),
    "unknown type": (GOOD[:2] + b"\x0a" + GOOD[3:], "unknown type of elements 0x0a"),
    "no dimensions": (b"\0\0\x08\x00\x05", "0 dimensions: expected 1 to 32"),
    "255 dimensions": (b"\0\0\x08\xff" + bytes(1020), "255 dimensions"),
    "truncated header": (GOOD[:10], "header of 3 dimensions takes 16 bytes.* has 10"),
    "truncated data": (GOOD[:-1], r"truncated: \(3, 4, 5\).* take 60 bytes.* has 59"),
    "no data": (HEADER, "truncated: .* take 60 bytes.* has 0"),
    "absurd": (
        b"\0\0\x08\x03" + b"\xff" * 12,
        r"absurd dimensions \(4294967295, 4294967295, 4294967295\)",
    ),
    "absurd but empty": (
        b"\0\0\x0e\x04" + bytes(4) + b"\xff" * 12,
        r"absurd dimensions \(0, 4294967295",
    ),
    "claims 2**62 bytes": (
        b"\0\0\x08\x02" + struct.pack(">2I", 2**31, 2**31) + b"abc",
        "truncated: .* take 4611686018427387904 bytes.* has 3",
    ),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_refuses_by_name_and_numbers(file, content, message, pack):
    path = file(pack(content))
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_refuses_trailing_bytes(file):
    with pytest.raises(DataError, match="trailing bytes: .* 60 bytes.* has 63"):
        read_idx(file(GOOD + b"abc"))
    with pytest.raises(DataError, match="trailing bytes: .* 60 bytes.* has more"):
        read_idx(file(gzip.compress(GOOD + b"abc")))


def test_refuses_damaged_gzip(file):
    packed = gzip.compress(GOOD)
    wrong_sum = bytearray(packed)
    wrong_sum[-8] ^= 1
    for content in (
        packed[:15],
        packed[:-12],
        packed[:-1],
        bytes(wrong_sum),
        packed[:12] + b"\xff" * 20 + packed[32:],
        packed + b"garbage",
        b"\x1f\x8b",
        b"\x1f\x8b" + bytes(30),
    ):
        with pytest.raises(DataError, match="damaged or truncated gzip file"):
            read_idx(file(content))


def test_takes_no_memory_for_a_claim(file):
    claim = b"\0\0\x08\x02" + struct.pack(">2I", 2**16, 2**16)  # 4 GiB
    for content in (claim + bytes(1000), gzip.compress(claim + bytes(1000))):
        path = file(content)
        tracemalloc.start()
        with pytest.raises(DataError, match="truncated"):
            read_idx(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


def test_a_gzip_bomb_is_unpacked_no_further_than_the_claim(file):
    bomb = gzip.compress(GOOD + bytes(64 << 20), 9)
    tracemalloc.start()
    with pytest.raises(DataError, match="trailing bytes"):
        read_idx(file(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_idx(tmp_path / "absent")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random-bytes"
    path.write_bytes(content)
    try:
        read_idx(path)
    except DataError as error:
        assert str(path) in str(error)


@settings(max_examples=400, deadline=None)
@given(
    packed=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 100),
    tail=st.binary(max_size=5),
)
def test_mutated_files_never_raise_anything_else(
    tmp_path_factory, packed, edits, cut, tail
):
    content = bytearray(gzip.compress(GOOD) if packed else GOOD)
    for at, value in edits:
        content[at % len(content)] = value
    content = content[: len(content) - cut] + tail if cut else content + tail
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(content)
    try:
        array = read_idx(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert array.nbytes <= len(GOOD)


# writing


@pytest.mark.parametrize("dtype", [*DTYPES, ">i4", ">f8"])
@pytest.mark.parametrize("name", ["a-idx", "a-idx.gz"])
def test_writes_what_it_reads(tmp_path, dtype, name):
    array = example(dtype)[:, ::2]
    path = tmp_path / name
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path), array)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    if not name.endswith(".gz"):
        native = array.astype(array.dtype.newbyteorder("="))
        assert path.read_bytes() == idx_bytes(native)


def test_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a-idx"
    write_idx(path, np.zeros(3, np.uint8))
    write_idx(path, np.ones(2, np.uint8))
    assert read_idx(path).tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a-idx"
    write_idx(path, np.zeros(3, np.uint8))

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_idx(path, np.ones(2, np.uint8))
    assert read_idx(path).tolist() == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", ["int64", "uint16", "bool", "complex64", "S3"])
def test_write_refuses_types_that_idx_lacks(tmp_path, dtype):
    with pytest.raises(TypeError, match="IDX has no elements of dtype"):
        write_idx(tmp_path / "a-idx", np.zeros(3, dtype))
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_a_scalar(tmp_path):
    with pytest.raises(ValueError, match=r"IDX cannot hold shape \(\)"):
        write_idx(tmp_path / "a-idx", np.float32(3))


# images with labels


def pair(tmp_path, images, labels):
    paths = tmp_path / "images", tmp_path / "labels"
    write_idx(paths[0], images)
    write_idx(paths[1], labels)
    return paths


def test_pair(tmp_path):
    images = example(shape=(4, 3, 2))
    labels = np.array([0, 9, 1, 1], np.uint8)
    dataset = load_idx_pair(*pair(tmp_path, images, labels), scale=0.5, classes=10)
    np.testing.assert_array_equal(dataset.images, images[:, None])
    assert dataset.labels.tolist() == [0, 9, 1, 1] and dataset.labels.dtype == np.int32
    assert (dataset.scale, dataset.shift, dataset.classes) == (0.5, 0.0, 10)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((3, 2, 2), "u1"), np.zeros(4, "u1"), "3 images but .* 4 labels"),
        (np.zeros((3, 4), "u1"), np.zeros(3, "u1"), r"images: shape \(3, 4\)"),
        (np.zeros(3, "u1"), np.zeros(3, "u1"), r"images: shape \(3,\)"),
        (np.zeros((3, 2, 2), "u1"), np.zeros((3, 1), "u1"), r"labels: shape \(3, 1\)"),
        (np.zeros((3, 2, 2), "u1"), np.zeros(3, "f4"), "labels: .* float32"),
        (np.zeros((2, 2, 2), "u1"), np.array([1, 10], "u1"), "label 1 is 10"),
        (np.zeros((2, 2, 2), "u1"), np.array([-1, 1], "i1"), "label 0 is -1"),
        (np.full((2, 2, 2), np.nan, "f4"), np.zeros(2, "u1"), "image 0 holds nan"),
    ],
)
def test_pair_refuses_what_does_not_fit(tmp_path, images, labels, message):
    paths = pair(tmp_path, images, labels)
    with pytest.raises(DataError, match=message) as caught:
        load_idx_pair(*paths, classes=10)
    assert str(tmp_path) in str(caught.value)
