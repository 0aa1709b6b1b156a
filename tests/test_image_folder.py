"""Folders of images: which files count, how they are decoded, what is refused."""

import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cycnn import DataError
from cycnn.data import DataLoader, image_folder

Image = pytest.importorskip("PIL.Image")

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
REAL = os.environ.get("CYCNN_TEST_CIFAR10")


def flat(path, colour=(10, 20, 30), size=(6, 4), mode="RGB", **options):
    """An image of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def noise(height, width, seed=0):
    shape = height, width, 3
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def colours(tmp_path):
    for name, colour in COLOURS.items():
        for number in (10, 2, 1):
            flat(tmp_path / name / f"{number}.png", colour)
    return tmp_path


def only(root, **options):
    """The one image below a folder, (C, H, W)."""
    dataset, _ = image_folder(root, **options)
    assert len(dataset) == 1
    return dataset.images[0]


def test_classes_are_the_sorted_folders(colours):
    dataset, names = image_folder(str(colours))
    assert names == ["blue", "green", "red"]
    assert dataset.images.dtype == np.uint8 and dataset.images.shape == (9, 3, 4, 6)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (dataset.classes, dataset.scale, dataset.shift) == (3, 1 / 255, -0.5)
    for image, label in zip(dataset.images, dataset.labels):
        assert image[:, 0, 0].tolist() == list(COLOURS[names[label]])
    images, _ = next(iter(DataLoader(dataset, 9, device="cpu")))
    assert images.numpy()[0, :, 0, 0].tolist() == [-0.5, -0.5, 0.5]


def test_order_is_that_of_the_names_at_any_depth(tmp_path):
    names = ["b.png", "a.PNG", "z/b.png", "c/d/e.bmp", "c/a.gif", "B.ppm"]
    for name in names:
        flat(tmp_path / "x" / name, (len(name),) * 3)
    dataset, _ = image_folder(tmp_path)
    expected = ["B.ppm", "a.PNG", "b.png", "c/a.gif", "c/d/e.bmp", "z/b.png"]
    assert dataset.images[:, 0, 0, 0].tolist() == [len(name) for name in expected]


def test_many_images_in_threads_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["cycnn.data.image_folder"], "_BLOCK", 7)
    for number in range(100):
        flat(tmp_path / "x" / f"{number:03}.png", (number,) * 3)
    dataset, _ = image_folder(tmp_path, scale=1.0, shift=0.0)
    assert dataset.images[:, 1, 2, 3].tolist() == list(range(100))
    assert (dataset.scale, dataset.shift) == (1.0, 0.0)


def test_other_files_are_left_out_and_counted_once(colours, caplog):
    for name in ("README.md", "red/notes.txt", "red/.hidden.png", "blue/Thumbs.db"):
        (colours / name).write_bytes(b"no image")
    flat(colours / ".thumbnails" / "a.png")
    flat(colours / "red" / ".cache" / "a.png")
    with caplog.at_level(logging.INFO, "cycnn"):
        dataset, names = image_folder(colours)
    assert len(dataset) == 9 and names == list(COLOURS)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert "9 images of 3 classes; 4 files" in record.getMessage()


def test_nothing_left_out_says_nothing(colours, caplog):
    with caplog.at_level(logging.INFO, "cycnn"):
        image_folder(colours)
    assert not caplog.records


def test_given_classes_give_the_labels(colours):
    given = ["red", "yellow", "green", "blue"]
    dataset, names = image_folder(colours, classes=given)
    assert names == given and dataset.classes == 4
    assert dataset.labels.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert dataset.images[0, :, 0, 0].tolist() == [255, 0, 0]


# sizes


@pytest.mark.parametrize(
    "size, shape", [(5, (5, 5)), ((3, 7), (3, 7)), ([8, 8], (8, 8))]
)
def test_images_of_any_size_become_one(tmp_path, size, shape):
    for number, (width, height) in enumerate(
        [(6, 4), (4, 6), (50, 3), (1, 1), (64, 64)]
    ):
        flat(tmp_path / "x" / f"{number}.png", (7, 8, 9), (width, height))
    dataset, _ = image_folder(tmp_path, size)
    assert dataset.images.shape == (5, 3, *shape)
    assert (dataset.images == np.array([7, 8, 9])[:, None, None]).all()


def test_what_stands_out_is_cut_off_on_both_sides(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "wide.png")
    assert (only(tmp_path, size=4) == 200).all()
    Image.fromarray(pixels.swapaxes(0, 1)).save(tmp_path / "x" / "wide.png")
    assert (only(tmp_path, size=4) == 200).all()


def test_the_right_size_is_kept_bit_by_bit(tmp_path):
    (tmp_path / "x").mkdir()
    pixels = noise(9, 5)
    Image.fromarray(pixels).save(tmp_path / "x" / "a.png")
    for options in ({}, {"size": (9, 5)}):
        np.testing.assert_array_equal(
            only(tmp_path, **options), pixels.transpose(2, 0, 1)
        )


def test_a_large_jpeg_shrinks_as_a_png_does(tmp_path):
    """The decoder's own shrinking must not show, nor go below the size."""
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 128), -1).astype(
        np.uint8
    )
    for kind in ("jpg", "png"):
        (tmp_path / kind / "x").mkdir(parents=True)
        path = tmp_path / kind / "x" / f"a.{kind}"
        Image.fromarray(pixels).save(path, **({"quality": 95} if kind == "jpg" else {}))
    jpeg, png = (only(tmp_path / kind, size=(20, 10)) for kind in ("jpg", "png"))
    assert np.abs(jpeg.astype(int) - png.astype(int)).max() <= 4


def test_the_first_image_of_another_size_is_named(tmp_path):
    for name, size in (("a", (6, 4)), ("b", (6, 4)), ("c", (6, 5)), ("d", (7, 4))):
        flat(tmp_path / "x" / f"{name}.png", size=size)
    with pytest.raises(DataError, match=r"c\.png: 5x6 pixels, .*a\.png has 4x6: size="):
        image_folder(tmp_path)


# orientation, modes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, orientation, kind):
    """What is stored so that it looks upright when turned as the tag says."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 240, 160, 80
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "x").mkdir()
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.save(tmp_path / "x" / f"a.{kind}", exif=exif)
    for size in (None, (16, 32)):
        found = only(tmp_path, size=size).transpose(1, 2, 0)
        assert np.abs(found.astype(int) - upright).max() <= 3


@pytest.mark.parametrize(
    "mode, colour, suffix, rgb, grey",
    [
        ("RGB", (10, 200, 30), "png", (10, 200, 30), 124),
        ("L", 77, "png", (77, 77, 77), 77),
        ("1", 1, "png", (255, 255, 255), 255),
        ("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0), 76),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0), 76),
        ("RGBA", (100, 0, 0, 255), "png", (100, 0, 0), 30),
        ("RGBA", (100, 0, 0, 0), "png", (255, 255, 255), 255),
        ("RGBA", (100, 0, 0, 51), "webp", (224, 204, 204), 210),
        ("LA", (50, 0), "png", (255, 255, 255), 255),
        ("LA", (50, 255), "png", (50, 50, 50), 50),
    ],
)
def test_every_mode_becomes_rgb_or_grey(tmp_path, mode, colour, suffix, rgb, grey):
    flat(tmp_path / "x" / f"a.{suffix}", colour, mode=mode)
    image = only(tmp_path)
    assert image.shape == (3, 4, 6)
    assert np.abs(image[:, 1, 1].astype(int) - rgb).max() <= 1
    image = only(tmp_path, channels=1)
    assert image.shape == (1, 4, 6) and abs(int(image[0, 1, 1]) - grey) <= 1


@pytest.mark.parametrize("transparent, rgb", [(None, (9, 99, 199)), (0, (255,) * 3)])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes(tmp_path, suffix, transparent, rgb):
    image = Image.new("P", (6, 4), 0)
    image.putpalette([9, 99, 199, 1, 2, 3])
    (tmp_path / "x").mkdir()
    options = {} if transparent is None else {"transparency": transparent}
    image.save(tmp_path / "x" / f"a.{suffix}", **options)
    assert only(tmp_path)[:, 1, 1].tolist() == list(rgb)


def test_a_transparent_colour(tmp_path):
    flat(tmp_path / "x" / "a.png", (1, 2, 3), transparency=(1, 2, 3))
    assert (only(tmp_path) == 255).all()


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("L", (6, 4), 50 * n) for n in (1, 2, 3)]
    (tmp_path / "x").mkdir()
    frames[0].save(tmp_path / "x" / "a.gif", save_all=True, append_images=frames[1:])
    assert (only(tmp_path) == 50).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, mode):
    flat(tmp_path / "x" / "a.tif", 300, mode=mode)
    with pytest.raises(DataError, match=rf"a\.tif: .*mode {mode} do not fit 8 bits"):
        image_folder(tmp_path)


# damaged files


def jpeg(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(40, 40)).save(path)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "ppm", "tif", "webp"])
@pytest.mark.parametrize("first", [True, False])
def test_truncated_images_are_named(tmp_path, suffix, first):
    good, bad = ("b", "a") if first else ("a", "b")
    for name in (good, bad):
        path = jpeg(tmp_path / "x" / f"{name}.{suffix}")
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(
            DataError, match=rf"/{bad}\.{suffix}: no image, or a damaged"
        ):
            image_folder(tmp_path)


def test_the_first_of_several_bad_files_is_named(tmp_path):
    for number in range(40):
        flat(tmp_path / "x" / f"{number:02}.png")
    for number in (17, 18, 30):
        (tmp_path / "x" / f"{number:02}.png").write_bytes(b"junk")
    for _ in range(5):
        with pytest.raises(DataError, match=r"/17\.png"):
            image_folder(tmp_path)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"MZ"])
def test_other_formats_under_the_name_of_an_image(tmp_path, content):
    flat(tmp_path / "x" / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: no image"):
        image_folder(tmp_path)


def test_damaged_bytes_give_an_image_or_a_data_error(tmp_path):
    rng = np.random.default_rng(3)
    for suffix in ("jpg", "png", "gif", "tif", "webp"):
        path = jpeg(tmp_path / suffix / "x" / f"a.{suffix}")
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            places = rng.integers(0, min(len(content), 400), 4)
            damaged[places] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about metadata
                try:
                    assert only(tmp_path / suffix, size=8).shape == (3, 8, 8)
                except DataError as error:
                    assert str(path) in str(error)


def test_the_limit_against_decompression_bombs_holds(tmp_path, monkeypatch):
    flat(tmp_path / "x" / "a.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(DataError, match=r"a\.png: .*bomb"):
        image_folder(tmp_path)


# what is no set


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"channels": 4}, ValueError, "channels must be 1 .* got 4"),
        ({"size": 0}, ValueError, "1 or more, got size=0"),
        ({"size": (4, -1)}, ValueError, r"1 or more, got size=\(4, -1\)"),
        ({"size": 2.5}, TypeError, "int or .height, width., got 2.5"),
        ({"size": (1, 2, 3)}, TypeError, r"got \(1, 2, 3\)"),
        ({"classes": "red"}, TypeError, "sequence of names, got 'red'"),
        ({"classes": ["red", "red"]}, ValueError, "differ from each other"),
        ({"classes": ["red", "blue"]}, DataError, "'green' is none of the classes"),
    ],
)
def test_what_is_refused(colours, options, error, message):
    with pytest.raises(error, match=message):
        image_folder(colours, **options)


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError):
        image_folder(tmp_path / "absent")
    flat(tmp_path / "a.png")
    with pytest.raises(NotADirectoryError):
        image_folder(tmp_path / "a.png")
    with pytest.raises(DataError, match="no images: expected a folder for each class"):
        image_folder(tmp_path)
    with pytest.raises(DataError, match="no images"):
        image_folder(tmp_path, classes=["red"])
    flat(tmp_path / "red" / "a.png")
    (tmp_path / "green").mkdir()
    with pytest.raises(DataError, match="green: a class without images"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, classes=["green", "red"])[0].labels.tolist() == [1]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    flat(tmp_path / "red" / "a.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "red":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="red"):
        image_folder(tmp_path)


def test_without_pillow(colours, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ImportError, match=r'needs Pillow.*pip install "cycnn\[images\]"'
    ):
        image_folder(colours)


def test_pillow_is_imported_when_it_is_needed(run_python):
    code = "import sys, cycnn.data; print('PIL' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.skipif(REAL is None, reason="CYCNN_TEST_CIFAR10 names no folder")
def test_real_images():
    """A folder of CIFAR-10 as JPEG, one folder a class, in folders train and test."""
    train, names = image_folder(Path(REAL, "train"))
    test, _ = image_folder(Path(REAL, "test"), classes=names)
    assert len(names) == train.classes == test.classes == 10
    for dataset in (train, test):
        assert dataset.image_shape == (3, 32, 32)
        counts = np.bincount(dataset.labels)
        assert (counts == counts[0]).all()
        # CIFAR-10's own means of red, green and blue are 125.3, 123.0 and 113.9
        means = dataset.images.mean((0, 2, 3))
        np.testing.assert_allclose(means, (125.3, 123.0, 113.9), atol=3)
        assert len(np.unique(dataset.images, axis=0)) > 0.99 * len(dataset)
