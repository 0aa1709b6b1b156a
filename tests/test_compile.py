"""NVRTC, shipped kernels and the cache. None of it needs a GPU."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from cycnn.errors import CompileError, CudaError
from cycnn.gpu import cache
from cycnn.gpu import compile as kernel_compile

pytest.importorskip("cuda.bindings.nvrtc")

SOURCE = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A source folder of one kernel file, and a cache of its own."""
    kernels = tmp_path / "cuda"
    kernels.mkdir()
    (kernels / "one.cu").write_text('#include "own.cuh"\n' + SOURCE)
    (kernels / "own.cuh").write_text("#define UNUSED 1\n")
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_compile, "source_directory", lambda: kernels)
    monkeypatch.setattr(cache, "_told", set())
    kernel_compile._sources.cache_clear()
    kernel_compile._manifest.cache_clear()
    yield kernels
    kernel_compile._sources.cache_clear()
    kernel_compile._manifest.cache_clear()


def fresh():
    kernel_compile._sources.cache_clear()
    kernel_compile._manifest.cache_clear()


def forbid_nvrtc(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(kernel_compile, "compile_source", refuse)


def test_cubin_and_ptx():
    assert kernel_compile.compile_source(SOURCE, "k.cu", "sm_90")[:4] == b"\x7fELF"
    ptx = kernel_compile.compile_source(SOURCE, "k.cu", "compute_80")
    assert b".target sm_80" in ptx


def test_a_compile_error_shows_file_line_and_log():
    with pytest.raises(CompileError, match=r"wrong\.cu\(2\)") as caught:
        kernel_compile.compile_source("\nint x = y;", "wrong.cu", "sm_90")
    assert "2 int x = y;" in caught.value.source
    assert "undefined" in caught.value.log


def test_shipped_images_need_no_compiler(folder, monkeypatch):
    files = kernel_compile.build_all(folder, folder / "cubin", 2)
    assert len(files) == len(kernel_compile.ARCHITECTURES) + 2
    forbid_nvrtc(monkeypatch)
    for arch in kernel_compile.ARCHITECTURES:
        assert kernel_compile.load("one", arch)[:4] == b"\x7fELF"
    # a later minor of a shipped major, and GPUs that only PTX serves
    assert kernel_compile.load("one", "sm_87") == kernel_compile.load("one", "sm_86")
    assert kernel_compile.load("one", "sm_103") == kernel_compile.load("one", "sm_100")
    assert b".target sm_80" in kernel_compile.load("one", "sm_110")


def test_the_build_makes_only_what_changed(folder):
    kernel_compile.build_all(folder, folder / "cubin", 2)
    image = folder / "cubin" / "one.sm_90.cubin"
    before = image.stat().st_mtime_ns
    kernel_compile.build_all(folder, folder / "cubin", 2)
    assert image.stat().st_mtime_ns == before
    image.write_bytes(b"damaged")
    kernel_compile.build_all(folder, folder / "cubin", 2)
    assert image.read_bytes()[:4] == b"\x7fELF"
    (folder / "own.cuh").write_text("#define UNUSED 2\n")
    (folder / "cubin" / "gone.sm_90.cubin").write_bytes(b"stale")
    fresh()
    kernel_compile.build_all(folder, folder / "cubin", 2)
    assert image.stat().st_mtime_ns != before
    assert not (folder / "cubin" / "gone.sm_90.cubin").exists()


def test_a_changed_source_is_not_served_by_a_stale_image(folder, monkeypatch):
    kernel_compile.build_all(folder, folder / "cubin", 2)
    shipped = kernel_compile.load("one", "sm_90")
    (folder / "one.cu").write_text(SOURCE.replace("1.0f", "2.0f"))
    fresh()
    changed = kernel_compile.load("one", "sm_90")
    assert changed != shipped
    forbid_nvrtc(monkeypatch)
    assert kernel_compile.load("one", "sm_90") == changed, "from the cache"


def test_a_damaged_shipped_image_is_refused(folder):
    kernel_compile.build_all(folder, folder / "cubin", 2)
    (folder / "cubin" / "one.sm_90.cubin").write_bytes(b"\x7fELF no")
    with pytest.raises(CudaError, match="damaged: install cycnn again"):
        kernel_compile.load("one", "sm_90")


def test_options_belong_to_the_key(folder, monkeypatch):
    plain = kernel_compile.load("one", "sm_90")
    monkeypatch.setenv("CYCNN_LINEINFO", "1")
    assert kernel_compile.load("one", "sm_90") != plain


def test_cache_entries_are_private_whole_and_checked(folder, caplog):
    image = kernel_compile.load("one", "sm_90")
    (entry,) = cache.entries()
    assert cache.kernels().stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o077 == 0
    data = entry.read_bytes()
    assert data == hashlib.sha256(image).digest() + image
    for damaged in (b"", data[:20], data[:-1], data[:50] + b"\0" + data[51:]):
        cache._told.clear()
        caplog.clear()
        entry.write_bytes(damaged)
        assert kernel_compile.load("one", "sm_90") == image
        assert "damaged" in caplog.text
        assert entry.read_bytes() == data, "made anew"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_entries_others_could_write_are_not_read(folder, caplog):
    image = kernel_compile.load("one", "sm_90")
    (entry,) = cache.entries()
    entry.chmod(0o666)
    assert cache.read(entry.stem) is None
    assert "others may write" in caplog.text
    entry.chmod(0o600)
    assert cache.read(entry.stem) == image
    cache.kernels().chmod(0o777)
    assert cache.read(entry.stem) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_what_somebody_else_owns_is_not_used(folder, caplog, monkeypatch):
    image = kernel_compile.load("one", "sm_90")
    (entry,) = cache.entries()
    key, me = entry.stem, os.geteuid()
    try:
        os.chown(entry, me + 1, -1)
    except OSError:
        # only root can give files away: let this process be the other user then
        owner, me = me, me + 1
        monkeypatch.setattr(os, "geteuid", lambda: me)
    else:
        owner = me + 1
        assert cache.read(key) is None
        assert f"{entry} is not used: user {owner} owns it, not {me}" in caplog.text
        assert kernel_compile.load("one", "sm_90") == image
        assert entry.stat().st_uid == me and cache.read(key) == image, "made anew"
        os.chown(cache.kernels(), owner, -1)
    cache._told.clear()
    caplog.clear()
    before = entry.read_bytes(), entry.stat().st_mtime_ns
    assert cache.read(key) is None
    assert f"user {owner} owns it, not {me}" in caplog.text
    assert not cache.usable()
    cache.write(key, b"other")
    assert kernel_compile.load("one", "sm_90") == image, "without the folder"
    assert (entry.read_bytes(), entry.stat().st_mtime_ns) == before


def test_a_cache_that_cannot_be_written_is_said_once(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert kernel_compile.load("one", "sm_90")[:4] == b"\x7fELF"
    assert caplog.text.count("cannot be written") == 1


def test_clear_empties_the_cache(folder):
    kernel_compile.load("one", "sm_90")
    kernel_compile.load("one", "sm_80")
    assert cache.clear() == 2
    assert cache.entries() == []


def test_two_processes_at_once_leave_one_good_entry(folder, tmp_path):
    code = (
        "import sys, pathlib\n"
        "from cycnn.gpu import compile as c\n"
        f"c.source_directory = lambda: pathlib.Path({str(folder)!r})\n"
        "sys.stdout.buffer.write(c.load('one', 'sm_90'))\n"
    )
    environment = {**os.environ, "CYCNN_CACHE_DIR": str(tmp_path / "shared")}
    root = os.path.dirname(os.path.dirname(os.path.abspath(kernel_compile.__file__)))
    environment["PYTHONPATH"] = os.path.dirname(root)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    images = {process.communicate()[0] for process in running}
    assert len(images) == 1 and images.pop()[:4] == b"\x7fELF"
    assert len(list((tmp_path / "shared" / "kernels").iterdir())) == 1


def test_no_nvrtc_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setattr("cuda.bindings.nvrtc", None, raising=False)
    import cuda.bindings

    monkeypatch.delattr(cuda.bindings, "nvrtc", raising=False)
    with pytest.raises(CudaError, match=r"cycnn\[jit\]"):
        kernel_compile.load("one", "sm_90")


def test_manifest_names_every_file(folder):
    kernel_compile.build_all(folder, folder / "cubin", 2)
    manifest = json.loads((folder / "cubin" / "manifest.json").read_text())
    names = {f["file"] for f in manifest["libraries"]["one"]["files"].values()}
    present = {path.name for path in (folder / "cubin").iterdir()} - {"manifest.json"}
    assert names == present
