"""Runs that are killed with SIGKILL, over and over, and what they leave behind."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from killed_run import EPOCHS, STEPS
from training import make_trainer

import cycnn
from cycnn import Trainer, optim
from cycnn.nn import weights

SCRIPT = Path(__file__).with_name("killed_run.py")
# the cycnn that these tests import, wherever it lies
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(cycnn.__file__).resolve().parent.parent),
}
# at random moments; and about one for every line of a save
KILLS = int(os.environ.get("CYCNN_TEST_KILLS", 32))
INTERVAL = 2  # steps from save to save
TEMPORARY = re.compile(r"run\.[0-9a-f]{8}\.tmp")


class Run:
    """One process of the training, up to the moment that it trains."""

    def __init__(self, path, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, path, *map(str, arguments)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # or readline would take more than a line, which communicate then misses
            bufsize=0,
        )
        assert self.process.stdout.readline() == b"ready\n", self.process.stderr.read()
        self.ready = time.monotonic()

    def kill_after(self, seconds):
        # it may end by itself before
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.end()

    def end(self):
        """Exit status, and the last number or word of each kind that it said."""
        output, errors = self.process.communicate(timeout=60)
        self.seconds = time.monotonic() - self.ready
        status = self.process.returncode
        assert status in (0, -signal.SIGKILL), errors
        return status, dict(line.split() for line in output.decode().splitlines())


def steps_in(path):
    """Loads a checkpoint; how many steps of the run it holds."""
    trainer = make_trainer(momentum=0.5)
    trainer = Trainer.resume(
        path, trainer.model, trainer.loss, trainer.optimizer, optim.schedules.linear()
    )
    return trainer.epoch * STEPS + trainer.step


def check_folder(path):
    """What a killed process left: a whole checkpoint and at most one temporary file."""
    others = [other.name for other in path.parent.iterdir() if other != path]
    assert len(others) <= 1 and all(map(TEMPORARY.fullmatch, others)), others
    return len(others)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run says that nobody interrupts, and how long it trains."""
    run = Run(tmp_path_factory.mktemp("whole") / "run")
    status, said = run.end()
    assert status == 0 and int(said["saved"]) == EPOCHS * STEPS
    return said, run.seconds


def in_parallel(function, folder, parts):
    """Call ``function(path, part)`` for all parts at once, each with its own file."""
    for number in range(len(parts)):
        (folder / str(number)).mkdir()
    paths = [folder / str(number) / "run" for number in range(len(parts))]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(function, paths, parts))


def test_kills_at_random_moments(tmp_path, whole):
    said_by_whole, seconds = whole
    deadline = time.monotonic() + 10 * KILLS

    def survive(path, seed):
        rng = random.Random(seed)
        kills = loaded = finished = 0
        newest = 0  # steps that a save has reported
        while kills < KILLS // 2 or not finished:
            assert time.monotonic() < deadline, f"{kills} kills, {finished} finished"
            # so short that a run takes several processes; the last one is left alone
            patience = rng.uniform(0, seconds / 3) if kills < KILLS // 2 else 60
            status, said = Run(path).kill_after(patience)
            newest = max(newest, int(said.get("saved", 0)))
            check_folder(path)
            if status == 0:
                finished += 1
                assert said["done"] == said_by_whole["done"]
                path.unlink()
                newest = 0
                continue
            kills += 1
            if path.exists():
                # the kill may have come between a save and its report
                assert newest <= steps_in(path) <= newest + INTERVAL
                newest = steps_in(path)
                loaded += 1
            else:
                assert newest == 0
        return kills, loaded

    for kills, loaded in in_parallel(survive, tmp_path, [0, 1]):
        assert kills == KILLS // 2
        assert loaded > 0


def test_kills_at_every_line_of_a_save(tmp_path, whole):
    said_by_whole, _ = whole
    count = int(said_by_whole["lines"])
    assert count > 20

    def survive(path, lines):
        killed = left = 0
        for line in lines:
            before = steps_in(path) if path.exists() else 0
            # in the first save of the process, or in the second, which replaces a file
            # that the same process wrote
            status, said = Run(path, 1 + killed % 2, line).end()
            if status == 0:  # the run was through before that line
                assert said["done"] == said_by_whole["done"]
                path.unlink()
                continue
            killed += 1
            left += check_folder(path)
            reported = int(said.get("saved", before))
            if path.exists():
                assert reported <= steps_in(path) <= reported + INTERVAL
            else:
                assert reported == 0
        status, said = Run(path).end()
        assert status == 0 and said["done"] == said_by_whole["done"]
        assert check_folder(path) == 0
        return killed, left

    lines = range(1, count + 1)
    done = in_parallel(survive, tmp_path, [lines[::2], lines[1::2]])
    assert sum(killed for killed, _ in done) > 0.8 * count
    # kills between the first byte and the new name
    assert sum(left for _, left in done) > 5


# temporary files


def test_a_save_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    path = tmp_path / "run"
    kept = ["run.tmp", "run.0123456789.tmp", "run2.01234567.tmp", "run.0123456X.tmp"]
    abandoned = ["run.01234567.tmp", "run.89abcdef.tmp"]
    for name in kept + abandoned:
        (tmp_path / name).write_bytes(b"")
    weights.replace_file(path, b"content")
    assert sorted(os.listdir(tmp_path)) == sorted(["run", *kept])
    assert path.read_bytes() == b"content"


def test_a_file_that_another_process_writes_is_left_alone(tmp_path):
    code = """if True:
        import os, sys, time
        from cycnn.nn import weights
        sync = os.fsync
        def slow(descriptor):
            print("writing", flush=True)
            sys.stdin.read()
            sync(descriptor)
        os.fsync = slow
        weights.replace_file(sys.argv[1], b"theirs")
    """
    path = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path],
        cwd=tmp_path,  # not the checkout, which would hide the installed package
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"writing\n"
        weights.replace_file(path, b"ours")
        assert path.read_bytes() == b"ours"
        assert check_folder(path) == 1
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert path.read_bytes() == b"theirs"
    assert check_folder(path) == 0


def test_two_that_save_to_one_file(tmp_path):
    code = """if True:
        import sys
        from cycnn.nn import weights
        for i in range(150):
            weights.replace_file(sys.argv[1], sys.argv[2].encode() * 1000)
    """
    path = tmp_path / "run"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, path, letter], cwd=tmp_path, env=ENVIRONMENT
        )
        for letter in "ab"
    ]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert content in (b"a" * 1000, b"b" * 1000)
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["run"]


def test_a_full_disk(tmp_path):
    """A real one: the system takes some of the bytes and refuses the rest."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "run"
    trainer = make_trainer()
    trainer.save(path)
    content = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so that the write fails with an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        with pytest.raises(OSError):
            trainer.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["run"]
    trainer.save(path)
