#!/usr/bin/env python3
"""Feed damaged and hostile files to the readers of cycnn.

    python tools/fuzz.py --target idx --inputs 1000000 --seed 0
    python tools/fuzz.py --target checkpoint --inputs 100000

Valid files are damaged at random: bits flipped, bytes overwritten, cut out, put in,
doubled, the end cut off, sizes replaced by extreme ones. Files of the second target are
also taken apart, changed in their header or JSON, and put together again with a correct
digest, as somebody would who means harm.

idx          data.read_idx, plain and gzip: an array, or DataError
checkpoint   Trainer.resume: a trainer, or DataError; Layer.load of the same file:
             loaded, or DataError, ValueError or TypeError. Model and optimizer keep
             every bit where the file is refused.

Anything else is a finding: another exception, a crash, more than --timeout seconds for
an input, more than --memory MiB above what the start took. The input is kept in --keep,
and the exit status is 1. (A crash or an endless loop ends the process; the first line
that was printed tells where its input lies.) The same seed gives the same inputs.
"""

import argparse
import faulthandler
import gzip
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

# Last, for a checkout in which cycnn was built in place and not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np

import cycnn
from cycnn import DataError, data, nn, optim

try:
    import resource
except ImportError:  # not a Unix: no limit of memory
    resource = None

EXTREME = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
HUGE = (2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**25, 10**400)
VALUES = (
    None, True, False, -1, 0, 1, 3, 0.5, -0.5, 1e308, float("inf"), float("nan"),
    "", "x", "RMSprop", [], {}, [[]], [None], {"": 0}, *EXTREME, *HUGE,
)


def damaged(content, rng):
    """Bytes with one to four random changes, more of them near the beginning."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        size = len(content)
        if not size:
            break
        # headers are where a reader decides
        reach = size if rng.random() < 0.5 else min(size, 64)
        at = int(rng.random() * reach)
        kind = int(rng.random() * 8)
        if kind == 0:
            content[at] ^= 1 << int(rng.random() * 8)
        elif kind == 1:
            content[at] = int(rng.random() * 256)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + 1 + int(rng.random() * 16)]
        elif kind == 4:
            content[at:at] = rng.randbytes(1 + int(rng.random() * 16))
        elif kind == 5:
            content[at:at] = content[at : at + 1 + int(rng.random() * 64)]
        elif kind == 6:
            width, order = rng.choice(((1, "big"), (4, "big"), (8, "little")))
            number = rng.choice(EXTREME) & (256**width - 1)
            content[at : at + width] = number.to_bytes(width, order)
        else:
            content += rng.randbytes(1 + int(rng.random() * 16))
    return bytes(content)


def changed(value, rng):
    """A copy of something made of dicts, lists and scalars, with one change inside."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy if isinstance(copy, dict) else range(len(copy))))
        how = rng.random()
        if how < 0.75:
            copy[key] = changed(copy[key], rng)
        elif how < 0.85:
            del copy[key]
        elif isinstance(copy, list):
            copy.append(copy[key])
        else:
            other = rng.choice(list(copy) + ["", "x", key + ".", key + "0"])
            copy[other] = copy.pop(key)
        return copy
    if isinstance(value, str) and value and rng.random() < 0.5:
        return damaged(value.encode(), rng).decode(errors="replace")
    return rng.choice(VALUES)


class Idx:
    """IDX files for data.read_idx."""

    def __init__(self, folder):
        self.path = str(folder / "input")
        rng = np.random.default_rng(0)
        self.files = []
        for dtype, shape in (
            ("uint8", (2, 5, 7)), ("uint8", (9,)), ("int8", (0, 4)), ("int16", (3, 3)),
            ("int32", (2, 2, 1, 2)), ("float32", (4, 3)), ("float64", (1, 1, 5)),
        ):
            path = folder / "valid"
            data.write_idx(path, rng.integers(0, 99, shape).astype(dtype))
            content = path.read_bytes()
            self.files += [(content, False), (content, False), (content, True)]
        self.packed = [gzip.compress(content, mtime=0) for content, _ in self.files]

    def make(self, rng):
        number = int(rng.random() * len(self.files))
        content, pack = self.files[number]
        if not pack:
            return damaged(content, rng)
        if rng.random() < 0.5:
            return damaged(self.packed[number], rng)
        # sound gzip around a damaged file, some of it of several members
        content = damaged(content, rng)
        if rng.random() < 0.9:
            return repacked(content)
        cut = int(rng.random() * len(content)) if content else 0
        return repacked(content[:cut]) + repacked(content[cut:])

    def run(self):
        """Whether the reader took the file."""
        try:
            array = data.read_idx(self.path)
        except DataError:
            return False
        if array.nbytes > 1 << 20:
            raise AssertionError(f"{array.nbytes} bytes out of a small file")
        return True


def repacked(content):
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    tail = struct.pack("<2I", zlib.crc32(content), len(content))
    return head + packer.compress(content) + packer.flush() + tail


class Checkpoint:
    """Files of Trainer.save and Layer.save for Trainer.resume and Layer.load."""

    def __init__(self, folder):
        self.path = str(folder / "input")
        cycnn.manual_seed(0)
        plain = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3),
            nn.LogSoftmax(),
        ).to("cpu")
        rmsprop = optim.RMSprop(plain.parameters(), lr=0.01, momentum=0.5)
        # the second has all else that a file can hold: statistics, the state of random
        # numbers, groups of parameters, a count of steps, averages
        full = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(8, 3), nn.LogSoftmax(),
        ).to("cpu")
        groups = [
            {"params": full[0].parameters(), "lr": 0.02, "weight_decay": 0.1},
            {"params": full[1].parameters() + full[5].parameters()},
        ]
        adam = optim.Adam(groups, lr=0.01)
        average = optim.EMA(full.parameters(), 0.9)
        self.runs = [
            Run(folder / "valid", plain, rmsprop),
            Run(folder / "valid", full, adam, average),
        ]
        self.files = [(content, run) for run in self.runs for content in run.files]
        self.damaged = None  # the run of the last file that was made

    def make(self, rng):
        content, self.damaged = self.files[int(rng.random() * len(self.files))]
        if rng.random() < 0.4:
            return damaged(content, rng)
        size = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
        metadata = header.pop("__metadata__", {})
        text = metadata.get("cycnn")
        if text is None or rng.random() < 0.3:
            for _ in range(rng.choice((1, 1, 2))):
                header = changed(header, rng)
                if not isinstance(header, dict):
                    header = {"x": header}
        elif rng.random() < 0.15:
            text = damaged(text.encode(), rng).decode(errors="replace")
        else:
            run = json.loads(text)
            for _ in range(rng.choice((1, 1, 2))):
                run = changed(run, rng)
            text = json.dumps(run)
        if text is not None:
            metadata = {"cycnn": text, "sha256": signature(header, body, text)}
        if metadata:
            header["__metadata__"] = metadata
        if rng.random() < 0.05:
            header = changed(header, rng)
        head = json.dumps(header).encode()
        return len(head).to_bytes(8, "little") + head + body

    def run(self):
        return self.damaged.read(self.path)


class Run:
    """A model and what trains it, their files, and what a refused file leaves alone."""

    def __init__(self, path, model, optimizer, average=None):
        self.model, self.optimizer, self.average = model, optimizer, average
        self.schedule = optim.schedules.linear()
        self.parts = model, nn.NLLLoss(), optimizer, self.schedule
        trainer = cycnn.Trainer(*self.parts, average=average)
        rng = np.random.default_rng(0)
        train = data.ArrayDataset(
            rng.integers(0, 256, (20, 1, 3, 3)).astype(np.uint8),
            rng.integers(0, 3, 20).astype(np.int32), 1 / 255,
        )
        self.files = []

        def keep(saved):
            saved.save(path)
            self.files.append(path.read_bytes())

        trainer.fit(train, 2, 8, seed=1, callbacks=[_AfterSteps(4, keep)])
        keep(trainer)
        keep(model)
        self.state = self._snapshot()
        self.parameters = model.state_dict()
        self.buffers = {name: b.data.numpy() for name, b in model.named_buffers()}
        self.settings = optimizer.state_dict()
        self.averages = None if average is None else average.state_dict()

    def read(self, path):
        """Whether Trainer.resume or Layer.load took the file."""
        taken = False
        try:
            cycnn.Trainer.resume(path, *self.parts, average=self.average)
            taken = True
        except DataError:
            pass
        self._check(taken)
        loaded = False
        try:
            self.model.load(path)
            loaded = True
        except (ValueError, TypeError) as error:
            if path not in str(error):
                raise AssertionError("the message does not name the file") from error
        self._check(loaded)
        return taken or loaded

    def _check(self, taken):
        if taken:
            self.model.load_state_dict(self.parameters)
            for name, buffer in self.model.named_buffers():
                buffer.data.copy_(self.buffers[name])
            self.optimizer.load_state_dict(self.settings)
            if self.average is not None:
                self.average.load_state_dict(self.averages)
        elif self._snapshot() != self.state:
            raise AssertionError("a refused file changed the model or the optimizer")

    def _snapshot(self):
        # slabs: every parameter and every element of the optimizer's state at once
        tensors = [b.data for _, b in self.model.named_buffers()]
        for run in self.optimizer.runs:
            tensors += [run.data, *run.state.values()]
        if self.optimizer._counter is not None:
            tensors.append(self.optimizer._counter)
        parts = [*self.optimizer.lrs, str(self.optimizer)]
        parts += [tensor.array.tobytes() for tensor in tensors]
        if self.average is not None:
            averages = self.average.state_dict()
            parts += [averages.pop("decay"), *(a.tobytes() for a in averages.values())]
        return parts


def signature(header, body, text):
    """The digest that Trainer.save would have written, as far as there is one."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(header):
        digest.update(name.encode())
        try:
            begin, end = header[name]["data_offsets"]
            digest.update(body[begin:end])
        except (KeyError, TypeError, ValueError):
            pass
    return digest.hexdigest()


class _AfterSteps:
    def __init__(self, steps, action):
        self.left, self.action = steps, action

    def on_step_end(self, trainer):
        self.left -= 1
        if not self.left:
            self.action(trainer)


TARGETS = {"idx": Idx, "checkpoint": Checkpoint}


def limit_memory(mebibytes):
    """Let the process take so much more address space than it has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def fuzz(target, inputs, seed, timeout, keep):
    """Try so many inputs.

    Returns
    -------
    counts : dict
        Inputs tried, those that were taken as valid, seconds of the slowest.
    findings : list of str
        Tracebacks; the search ends at the tenth.
    """
    rng = random.Random(seed)
    tried = taken = 0
    slowest = rearm = 0.0
    findings = []
    file = os.open(target.path, os.O_RDWR | os.O_CREAT)
    try:
        while tried < inputs and len(findings) < 10:
            if time.perf_counter() > rearm:
                # ends the process where even Ctrl-C would not
                faulthandler.dump_traceback_later(
                    timeout + 2, exit=True, file=sys.__stderr__
                )
                rearm = time.perf_counter() + 1
            content = target.make(rng)
            os.ftruncate(file, 0)
            os.pwrite(file, content, 0)
            known = len(findings)
            begin = time.perf_counter()
            try:
                taken += target.run()
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of compiled code is no Exception
                findings.append(traceback.format_exc())
            seconds = time.perf_counter() - begin
            if seconds > timeout:
                findings.append(f"{seconds:.1f} s for one input")
            slowest = max(slowest, seconds)
            if len(findings) > known:
                keep.mkdir(parents=True, exist_ok=True)
                path = keep / f"seed-{seed}-input-{tried}"
                path.write_bytes(content)
                findings[-1] += f"input: {path}"
            tried += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(file)
    return {"inputs": tried, "taken": taken, "slowest": slowest}, findings


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", choices=TARGETS, required=True)
    add("--inputs", type=int, default=100_000, metavar="N")
    add("--seed", type=int, default=0, metavar="S")
    add("--timeout", type=float, default=10, metavar="SECONDS")
    add("--memory", type=int, default=256, metavar="MIB")
    add("--keep", type=Path, default=Path("fuzz-findings"), metavar="DIR")
    options = parser.parse_args(argv)

    # in memory where there is such a folder: a disk would be what is measured
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="cycnn-fuzz-") as folder:
        target = TARGETS[options.target](Path(folder))
        print(f"{options.target}: if this process dies, it was of {target.path}")
        sys.stdout.flush()
        if resource is not None:
            limit_memory(options.memory)
        begin = time.perf_counter()
        # numbers out of float32's range become infinite, with a warning
        with np.errstate(all="ignore"):
            counts, findings = fuzz(
                target, options.inputs, options.seed, options.timeout, options.keep
            )
        seconds = time.perf_counter() - begin
    for finding in findings:
        print(finding, file=sys.stderr)
    print(
        f"{options.target}: {counts['inputs']:,} inputs (seed {options.seed}), "
        f"{counts['taken']:,} of them taken as valid, {len(findings)} findings; "
        f"{seconds:.1f} s, {counts['inputs'] / seconds:,.0f} inputs/s, "
        f"slowest {1000 * counts['slowest']:.1f} ms{peak_memory()}"
    )
    return 1 if findings else 0


def peak_memory():
    if resource is None:
        return ""
    return f", peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"


if __name__ == "__main__":
    sys.exit(main())
