"""Downloads from servers that behave and misbehave; all of them are on 127.0.0.1."""

import gzip
import hashlib
import io
import random
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import cycnn
from cycnn import DataError
from cycnn.data import download, mnist
from cycnn.data.download import fetch

CONTENT = random.Random(3).randbytes(300_000)
PACKED = gzip.compress(CONTENT, mtime=0)
NAMES = {"a.gz": (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())}


class Server(ThreadingHTTPServer):
    """Serves ``files`` in the ``manner`` set, and remembers the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/a.gz": PACKED}
        self.manner = "good"
        self.asked = []  # (path, Range)
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """The client may go away, which is no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        body = server.files.get(self.path)
        manner = server.manner
        if manner == "mute":
            server.over.wait(30)
            return
        if body is None:
            return self.send_error(404)
        start = 0
        if wanted and manner != "no ranges":
            start = int(re.match(r"bytes=(\d+)-$", wanted)[1])
            if start >= len(body):
                return self.send_error(416)
        if manner == "wrong range":
            start = max(start - 100, 0)
        body, total = body[start:], len(body)
        self.send_response(206 if wanted and manner != "no ranges" else 200)
        if wanted and manner != "no ranges":
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if manner == "endless":
            self.end_headers()
            while not server.over.is_set():
                self.wfile.write(bytes(1 << 16))
        if manner != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if manner == "breaks off":
            body = body[: len(body) // 2]
        elif manner == "stalls":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            server.over.wait(30)
            return
        elif manner == "drips":
            for start in range(0, len(body), 10_000):
                self.wfile.write(body[start : start + 10_000])
                self.wfile.flush()
                if server.over.wait(0.05):
                    return
            return
        self.wfile.write(body)


@pytest.fixture
def serve():
    started = []

    def start(manner="good", **files):
        server = Server()
        server.manner = manner
        server.files.update({f"/{name}.gz": body for name, body in files.items()})
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_good_server(serve, tmp_path):
    server = serve()
    folder = tmp_path / "new" / "mnist"
    fetch(NAMES, [server.url], folder)
    assert (folder / "a.gz").read_bytes() == PACKED
    assert names_in(folder) == ["a.gz"]
    assert server.asked == [("/a.gz", None)]
    fetch(NAMES, [server.url], folder)
    assert len(server.asked) == 1  # what is there is not asked for


def test_content_counts_not_the_packing(serve, tmp_path):
    for number, body in enumerate((gzip.compress(CONTENT, 1), CONTENT)):
        server = serve(a=body)
        fetch(NAMES, [server.url], tmp_path / str(number))
        assert (tmp_path / str(number) / "a.gz").read_bytes() == body


def test_a_server_that_tells_no_length(serve, tmp_path):
    (tmp_path / "a.gz.part").write_bytes(PACKED[:1000])
    fetch(NAMES, [serve("no length").url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED


def test_the_next_mirror_goes_on_where_the_first_broke_off(serve, tmp_path):
    broken, good = serve("breaks off"), serve()
    fetch(NAMES, [broken.url, good.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert good.asked == [("/a.gz", f"bytes={len(PACKED) // 2}-")]
    assert names_in(tmp_path) == ["a.gz"]


def test_a_later_call_goes_on(serve, tmp_path):
    server = serve("breaks off")
    with pytest.raises(DataError, match=f"broke off after .* of {len(PACKED)} bytes"):
        fetch(NAMES, [server.url], tmp_path)
    assert names_in(tmp_path) == ["a.gz.part"]
    server.manner = "good"
    fetch(NAMES, [server.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert server.asked[1] == ("/a.gz", f"bytes={len(PACKED) // 2}-")
    assert names_in(tmp_path) == ["a.gz"]


def test_a_server_without_ranges_starts_over(serve, tmp_path):
    (tmp_path / "a.gz.part").write_bytes(PACKED[:1000])
    server = serve("no ranges")
    fetch(NAMES, [server.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert server.asked == [("/a.gz", "bytes=1000-")]


def test_a_range_that_was_not_asked_for_is_refused(serve, tmp_path):
    (tmp_path / "a.gz.part").write_bytes(PACKED[:1000])
    with pytest.raises(DataError, match="'bytes 900-.*, not from 1000 on"):
        fetch(NAMES, [serve("wrong range").url], tmp_path)
    assert not (tmp_path / "a.gz").exists()


@pytest.mark.parametrize(
    "part",
    [b"x" * 1000, PACKED[:-100] + b"x" * 50, PACKED + b"more", b"x" * len(PACKED)],
    ids=["other", "damaged", "longer", "as long"],
)
def test_a_part_that_is_wrong_is_thrown_away(serve, tmp_path, part):
    (tmp_path / "a.gz.part").write_bytes(part)
    server = serve()
    fetch(NAMES, [server.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert server.asked[-1] == ("/a.gz", None)
    assert names_in(tmp_path) == ["a.gz"]


def test_a_part_that_is_complete_is_used(serve, tmp_path):
    (tmp_path / "a.gz.part").write_bytes(PACKED)
    server = serve()
    fetch(NAMES, [server.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body, message",
    [
        (gzip.compress(CONTENT[:-1] + b"!"), "SHA-256 .*, expected"),
        (gzip.compress(CONTENT[:-1]), "content has 299999 bytes, expected 300000"),
        (gzip.compress(CONTENT + b"!"), "more than 300000 bytes"),
        (PACKED[:-9], "damaged gzip"),
        (PACKED[:5000] + b"\0" * 50 + PACKED[5050:], "damaged gzip|SHA-256"),
        (b"<html>log in to this network</html>", "content has 35 bytes"),
        (b"", "content has 0 bytes"),
    ],
)
def test_wrong_content_never_becomes_a_file(serve, tmp_path, body, message):
    server = serve(a=body)
    with pytest.raises(DataError, match=message):
        fetch(NAMES, [server.url], tmp_path)
    assert names_in(tmp_path) == []
    # and a better mirror is asked for the whole of it
    good = serve()
    fetch(NAMES, [server.url, good.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert good.asked == [("/a.gz", None)]


def test_a_gzip_bomb_is_not_unpacked(serve, tmp_path):
    bomb = gzip.compress(bytes(200 << 20))
    began = time.monotonic()
    with pytest.raises(DataError, match="more than 300000 bytes"):
        fetch(NAMES, [serve(a=bomb).url], tmp_path)
    assert time.monotonic() - began < 5


def test_a_server_that_never_ends(serve, tmp_path):
    with pytest.raises(DataError, match="sends more than"):
        fetch(NAMES, [serve("endless").url], tmp_path)
    assert names_in(tmp_path) == []


def test_a_file_that_is_announced_too_large(serve, tmp_path):
    server = serve(a=bytes(5 << 20))
    with pytest.raises(DataError, match="has 5242880 bytes, expected at most"):
        fetch(NAMES, [server.url], tmp_path)


@pytest.mark.parametrize("manner, have", [("mute", 0), ("stalls", len(PACKED) // 2)])
def test_slow_servers_are_given_up(serve, tmp_path, monkeypatch, manner, have):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    slow, good = serve(manner), serve()
    began = time.monotonic()
    with pytest.raises(DataError, match="no answer within 0.3 s|timed out"):
        fetch(NAMES, [slow.url], tmp_path)
    assert time.monotonic() - began < 3
    part = tmp_path / "a.gz.part"
    assert (part.stat().st_size if part.exists() else 0) == have
    fetch(NAMES, [slow.url, good.url], tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == PACKED


def test_every_mirror_s_failure_is_told(serve, tmp_path):
    damaged, without = serve(a=b"nonsense"), serve()
    del without.files["/a.gz"]
    closed = "http://127.0.0.1:9/"
    with pytest.raises(DataError) as caught:
        fetch(NAMES, [damaged.url, without.url, closed], tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{damaged.url}a.gz: content has 8 bytes" in lines[0]
    assert f"{without.url}a.gz: HTTP 404" in lines[1]
    assert f"{closed}a.gz: " in lines[2] and "refused" in lines[2]


def test_a_mirror_that_failed_is_asked_last(serve, tmp_path):
    bad, good = serve("breaks off"), serve(b=PACKED)
    fetch({**NAMES, "b.gz": NAMES["a.gz"]}, [bad.url, good.url], tmp_path)
    assert names_in(tmp_path) == ["a.gz", "b.gz"]
    assert [path for path, _ in bad.asked] == ["/a.gz"]


def test_a_folder_that_cannot_be_written(serve, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        fetch(NAMES, [serve().url], tmp_path / "file" / "mnist")


def test_two_at_once_both_succeed(serve, tmp_path):
    server, failures = serve(), []

    def run():
        try:
            fetch(NAMES, [server.url], tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "a.gz").read_bytes() == PACKED
    assert names_in(tmp_path) == ["a.gz"]


def test_interrupted_it_keeps_the_part(serve, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAMES, [serve().url], tmp_path)
    assert (tmp_path / "a.gz.part").read_bytes() == PACKED


@pytest.mark.parametrize(
    "manner, enough", [("drips", 50_000), ("stalls", len(PACKED) // 2), ("mute", 0)]
)
def test_a_real_ctrl_c_keeps_what_is_there(serve, tmp_path, manner, enough):
    server, folder = serve(manner), tmp_path / "mnist"
    part = folder / "a.gz.part"
    code = f"""if True:
        from pathlib import Path
        from cycnn.data.download import fetch
        fetch({NAMES!r}, [{server.url!r}], Path({str(folder)!r}))
    """
    root = Path(cycnn.__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not server.asked or not part.exists() or part.stat().st_size < enough:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=5)  # not only after TIMEOUT
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert names_in(folder) == (["a.gz.part"] if enough else [])
    have = part.stat().st_size if enough else 0
    assert enough <= have < len(PACKED)
    if enough:
        assert part.read_bytes() == PACKED[:have]
    server.manner = "good"
    fetch(NAMES, [server.url], folder)
    assert server.asked[1:] == [("/a.gz", f"bytes={have}-" if have else None)]
    assert (folder / "a.gz").read_bytes() == PACKED
    assert names_in(folder) == ["a.gz"]


# the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_bar_where_nobody_watches(serve, tmp_path, capsys):
    fetch(NAMES, [serve().url], tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_bar_on_a_terminal(serve, tmp_path, monkeypatch, with_tqdm):
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(NAMES, [serve().url], tmp_path)
    shown = terminal.getvalue()
    assert "a.gz" in shown and ("100%" if with_tqdm else "0.3 of 0.3 MB") in shown


# all of it together


def test_mnist_downloads_into_the_cache(serve, tmp_path, monkeypatch):
    import struct

    module = sys.modules["cycnn.data.mnist"]
    server, files = serve(), {}
    for name, count in (("train", 7), ("t10k", 5)):
        images = struct.pack(">4I", 0x803, count, 4, 3) + bytes(12 * count)
        labels = struct.pack(">2I", 0x801, count) + bytes(range(count))
        for content, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            file = f"{name}-{kind}-ubyte.gz"
            files[file] = (len(content), hashlib.sha256(content).hexdigest())
            server.files["/" + file] = gzip.compress(content)
    monkeypatch.setattr(module, "FILES", files)
    monkeypatch.setattr(module, "MIRRORS", ("http://127.0.0.1:9/", server.url))
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CYCNN_DATA", raising=False)
    train, test = mnist(tmp_path / "elsewhere")
    assert (len(train), len(test)) == (7, 5)
    assert names_in(tmp_path / "cache" / "mnist") == sorted(files)
    assert (tmp_path / "cache" / "mnist").stat().st_mode & 0o777 == 0o700
    mnist()
    assert len(server.asked) == 4


def test_mnist_offline_says_so(tmp_path, monkeypatch):
    module = sys.modules["cycnn.data.mnist"]
    monkeypatch.setattr(module, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CYCNN_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        mnist()
    message = str(caught.value)
    assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz: " in message
    assert "refused" in message and "t10k-labels-idx1-ubyte.gz" in message
