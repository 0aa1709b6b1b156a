"""The command ``cycnn``."""

import subprocess
import sys

import pytest

import cycnn
from cycnn.cli import main
from cycnn.gpu import cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of two kernels; returns its folder."""
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    cache.write("a" * 8, b"x" * 500_000)
    cache.write("b" * 8, b"y" * 700_000)
    return cache.kernels()


def test_info(cached, capsys):
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["cycnn"] == cycnn.__version__
    assert "NumPy" in rows["python"]
    if cycnn.cuda_available():
        assert "SMs" in rows["cuda:0"] and rows["driver"].startswith("CUDA ")
    else:
        assert rows["gpu"] == f"none: {cycnn.cuda_unavailable_reason()}"
    assert "nvrtc" in rows
    assert "files" in rows["kernels"]
    assert rows["cache"] == f"{cached}: 2 kernels, 1.2 MB"


def test_cache(cached, capsys):
    assert main(["cache", "info"]) == 0
    assert capsys.readouterr().out == f"{cached}: 2 kernels, 1.2 MB\n"
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"{cached}: 2 kernels deleted\n"
    assert main(["cache", "info"]) == 0
    assert capsys.readouterr().out == f"{cached}: 0 kernels, 0.0 MB\n"


def test_clearing_kernels_leaves_other_files(cached):
    data = cached.parent / "mnist" / "train-images-idx3-ubyte"
    data.parent.mkdir()
    data.write_bytes(b"digits")
    main(["cache", "clear"])
    assert data.read_bytes() == b"digits"


@pytest.mark.parametrize("arguments", [[], ["cache"], ["cache", "burn"], ["train"]])
def test_unknown_commands(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: cycnn" in capsys.readouterr().err


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "cycnn", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"cycnn {cycnn.__version__}\n")
