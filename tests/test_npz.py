"""Archives of NumPy: which arrays are taken, how they lie, what is refused."""

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cycnn import DataError
from cycnn.data import load_npz

LABELS = np.array([0, 2, 1, 2])


def pixels(*shape, dtype=np.uint8):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


def npy(array, **changes):
    """An array as .npy; changes replace text of the header."""
    file = io.BytesIO()
    np.save(file, array)
    content = file.getvalue()
    for old, new in changes.items():
        content = content.replace(old.encode(), new)
    return content


def pack(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", ["images", "x", "X"])
@pytest.mark.parametrize("labels", ["labels", "y", "Y"])
def test_the_usual_names(path, save, images, labels):
    array = pixels(4, 3, 5, 6)
    save(path, **{images: array, labels: LABELS, "other": np.zeros(2)})
    dataset = load_npz(str(path), scale=0.5, shift=1.0, classes=7)
    assert dataset.images.dtype == np.uint8 and dataset.images.flags.c_contiguous
    np.testing.assert_array_equal(dataset.images, array)
    np.testing.assert_array_equal(dataset.labels, LABELS)
    assert (dataset.scale, dataset.shift, dataset.classes) == (0.5, 1.0, 7)


def test_given_names(path):
    train, test = pixels(4, 8, 9), pixels(3, 8, 9)
    np.savez(path, x_train=train, y_train=LABELS, x_test=test, y_test=LABELS[:3, None])
    dataset = load_npz(path, "x_train", "y_train")
    np.testing.assert_array_equal(dataset.images, train[:, None])
    dataset = load_npz(path, images="x_test", labels="y_test")
    np.testing.assert_array_equal(dataset.labels, LABELS[:3])


@pytest.mark.parametrize(
    "shape, layout, becomes",
    [
        ((4, 1, 8, 9), None, (1, 8, 9)),
        ((4, 8, 9, 1), None, (1, 8, 9)),
        ((4, 3, 8, 9), None, (3, 8, 9)),
        ((4, 8, 9, 3), None, (3, 8, 9)),
        ((4, 8, 9, 4), None, (4, 8, 9)),
        ((4, 3, 8, 3), "NCHW", (3, 8, 3)),
        ((4, 3, 8, 3), "NHWC", (3, 3, 8)),
        ((4, 8, 9, 5), "NHWC", (5, 8, 9)),
        ((4, 8, 9), None, (1, 8, 9)),
        ((4, 8, 9), "NHWC", (1, 8, 9)),
        ((4, 20), None, (20,)),
    ],
)
def test_layouts(path, shape, layout, becomes):
    array = pixels(*shape)
    np.savez(path, x=array, y=LABELS)
    dataset = load_npz(path, layout=layout)
    assert dataset.image_shape == becomes and dataset.images.flags.c_contiguous
    if len(shape) == 4 and becomes != shape[1:]:
        array = np.moveaxis(array, 3, 1)
    np.testing.assert_array_equal(dataset.images.ravel(), array.ravel())


@pytest.mark.parametrize(
    "shape, which", [((4, 3, 8, 1), "both"), ((4, 8, 9, 5), "neith")]
)
def test_a_layout_is_not_guessed(path, shape, which):
    np.savez(path, x=pixels(*shape), y=LABELS)
    with pytest.raises(DataError, match=rf'set\.npz: x .* {which}.*layout="NCHW" or'):
        load_npz(path)


def test_fortran_order_and_floats(path):
    array = np.asfortranarray(pixels(4, 3, 5, 6, dtype=np.float64))
    np.savez(path, x=array, y=LABELS.astype(">u2"))
    dataset = load_npz(path)
    assert dataset.images.dtype == np.float32
    np.testing.assert_array_equal(dataset.images, array)
    np.testing.assert_array_equal(dataset.labels, LABELS)


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"a": LABELS}, {}, r"no array named images, x or X: .* holds a \(4,\) int64"),
        ({}, {}, "no array named images, x or X: .* holds no arrays"),
        ({"x": LABELS, "X": LABELS}, {}, "several .* the images, x, X: .* images="),
        ({"x": LABELS}, {"images": "z"}, r"no array 'z': .* images=.* x \(4,\) int64"),
        ({"x": LABELS}, {}, "no array named labels, y or Y: name one with labels="),
        ({"x": pixels(3, 8, 9), "y": LABELS}, {}, "x with y: 3 images but 4 labels"),
        ({"x": pixels(4, 8, 9), "y": np.eye(4, dtype=int)}, {}, "x with y: .* one-hot"),
        (
            {"x": pixels(4, 8, 9), "y": np.ones(4)},
            {},
            "x with y: labels of dtype float",
        ),
        ({"x": np.array(["a"] * 4), "y": LABELS}, {}, "x with y: images of shape"),
        (
            {"x": pixels(4, 8, 9), "y": LABELS},
            {"classes": 2},
            "label 1 is 2: .* 0 to 1",
        ),
        ({"x": np.array([None] * 4), "y": LABELS}, {}, "x holds Python objects"),
        (
            {"x": pixels(4, 8, 9), "y": np.array([None] * 4)},
            {},
            "y holds Python objects",
        ),
    ],
)
def test_what_is_no_set(path, arrays, options, message):
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(path, **options)
    assert str(path) in str(caught.value)


def test_other_mistakes(path, tmp_path):
    with pytest.raises(ValueError, match="layout must be .* got 'CHW'"):
        load_npz(path, layout="CHW")
    with pytest.raises(FileNotFoundError):
        load_npz(path)
    np.save(tmp_path / "array.npy", LABELS)
    with pytest.raises(DataError, match=r"array\.npy: .* not a zip file"):
        load_npz(tmp_path / "array.npy")


GOOD, CLASSES = npy(pixels(4, 8, 9)), npy(LABELS)


@pytest.mark.parametrize(
    "content, message",
    [
        (npy(pixels(4, 8, 9), **{"(4, 8, 9), ": b"(4, 8,99999), "}), "x.npy claims"),
        (GOOD[:-1], "x.npy claims"),
        (GOOD + b"\0", "x.npy claims"),
        (b"junk", "damaged, or no .npz file"),
        (b"", "damaged, or no .npz file"),
        (
            GOOD[:6] + b"\x03\0" + struct.pack("<I", 118) + GOOD[10:],
            "version .3, 0. of",
        ),
        (GOOD.replace(b"fortran_order", b"fortran-order"), "damaged, or no .npz file"),
        (GOOD.replace(b"'|u1'", b"'|u0'"), "set.npz"),
    ],
)
def test_damaged_arrays(path, content, message):
    pack(path, x=content, y=CLASSES)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(path)
    assert str(path) in str(caught.value)


def test_memory_is_not_taken_for_a_claim(path):
    """The sizes in the archive's directory may lie as much as an array's header."""
    claim, file = 2**32 - 2, io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (claim - 128,)}
    np.lib.format.write_array_header_1_0(file, description)
    pack(path, x=file.getvalue(), y=CLASSES)
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")  # 20 bytes before the sizes
    sizes = struct.pack("<2I", claim, claim)
    path.write_bytes(content[: directory + 20] + sizes + content[directory + 28 :])
    with pytest.raises(DataError, match=f"claims {claim} .* has {claim} in {claim}"):
        load_npz(path)


def test_packings_that_numpy_does_not_write(path):
    pack(path, zipfile.ZIP_LZMA, x=GOOD, y=CLASSES)
    with pytest.raises(DataError, match="claims"):
        load_npz(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    compressed=st.booleans(),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    length=st.floats(0, 1),
)
def test_any_damage_gives_a_set_or_a_data_error(path, compressed, edits, length):
    save = np.savez_compressed if compressed else np.savez
    save(path, x=pixels(4, 8, 9), y=LABELS)
    content = bytearray(path.read_bytes())
    for place, value in edits:
        content[int(place * (len(content) - 1))] ^= value
    if length > 0.5:
        del content[int(length * len(content)) :]
    path.write_bytes(content)
    try:
        assert len(load_npz(path)) == 4
    except DataError as error:
        assert str(path) in str(error)
