#!/usr/bin/env python3
"""Time cycnn, PyTorch and JAX at the same work: training, inference, start.

    python bench/peers --json results.json --chart results.png
    python bench/peers --networks 'reference-*' --contestants 'cycnn-*,torch-graph-tf32'
    python bench/peers --device cpu --threads 2
    python bench/peers --read one.json another.json --chart results.png

Everybody trains the same network from the same weights with the same recipe (RMSprop
or SGD, learning rate falling linearly to 0) on the same images in a new order each
epoch, the smaller last batch included. The images lie on the device before the clock
starts, for the peers already as normalised float32. Warm-up epochs (compiling,
choosing algorithms, capturing) are not timed; the figure is the median of the timed
ones. The loss is summed on the device and read once an epoch; cycnn's Trainer counts
hits, too. For inference everybody gets the same trained weights. Whoever is not
accurate enough in the end has not run, and the exit status is 1.

Each kind of contestant runs in a process of its own. One that is not installed, fails
or takes too long is reported, and the rest goes on in a new process.
"""

import argparse
import datetime
import fnmatch
import itertools
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import networks
import numpy as np
import report
from networks import CONTESTANTS, KINDS, NETWORKS, SETTINGS

_HERE = Path(__file__).resolve().parent
# Last, for a checkout in which cycnn was built in place and not installed.
sys.path.append(str(_HERE.parent.parent))

_RESULT = "RESULT "
_WARMUP = 1  # epochs
_FAILURES = 3  # in a row, after which a kind of contestant is given up
_LIBRARIES = {"cycnn": "cycnn", "torch": "PyTorch", "jax": "JAX"}


def contestants(device):
    if device == "cpu":
        return ["cycnn-fp32", "torch-eager-fp32", "jax-scan-fp32"]
    return CONTESTANTS


# ---------------------------------------------------------------------------------
# A contestant's process


class Job(NamedTuple):
    """One figure of one kind of contestant."""

    setting: str
    precision: str


class Clock:
    """How long the phases of a process took, from before it was started."""

    def __init__(self, started):
        self.last = started
        self.phases = {}

    def mark(self, phase):
        now = time.monotonic()
        self.phases[phase] = now - self.last
        self.last = now


def work(options):
    """Run what ``options.jobs`` says, as ``options.only``, and print the results."""
    clock = Clock(options.started)
    if options.device == "cpu":
        # the same cores for everybody, whatever thread pools a library makes
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: options.threads])
    kind = options.only
    module = __import__(f"run_{kind.split('-')[0]}")
    contestants, data = {}, Data(options)
    jobs = [Job(*job.split("/")) for job in options.jobs.split(",")]
    for job in jobs:
        if job.precision not in contestants:
            contestants[job.precision] = module.Contestant(kind, job.precision, options)
    clock.mark("imports")
    tasks = {"train": train, "predict": predict, "start": start, "weights": weights}
    # network by network, so that the first results come early; what compiles does so
    # before anything is timed, since choosing algorithms takes the device's time
    for _, group in itertools.groupby(jobs, network_of):
        group = list(group)
        with ThreadPoolExecutor() as pool:
            for name, precision in group:
                setting = SETTINGS.get(name)
                if setting and setting.task == "train":
                    contestants[precision].prepare(
                        pool, setting, data.of(setting), epochs(setting, options)
                    )
        for name, precision in group:
            setting = SETTINGS.get(name)
            contestant = contestants[precision]
            result = tasks[setting.task if setting else name](
                contestant, setting, options, data, clock
            )
            result["version"] = contestant.version
            print(_RESULT + json.dumps(result), flush=True)


def network_of(job):
    return SETTINGS[job.setting].network if job.setting in SETTINGS else None


class Data:
    """Loads each set once."""

    def __init__(self, options):
        self.folder, self.images = options.folder, options.images
        self.loaded = {}

    def of(self, setting):
        network = NETWORKS[setting.network]
        if network.data not in self.loaded:
            self.loaded[network.data] = networks.load(network, self.folder, self.images)
        return self.loaded[network.data]


def epochs(setting, options):
    """Epochs of a training, those that warm up included."""
    return _WARMUP + (options.epochs or setting.epochs)


def train(contestant, setting, options, data, clock):
    seconds, accuracy, settings = contestant.train(
        setting, data.of(setting), epochs(setting, options)
    )
    return {"seconds": seconds[_WARMUP:], "accuracy": accuracy, "settings": settings}


def start(contestant, setting, options, data, clock):
    """Train at once; the time counts from the start of the process."""
    parts = data.of(setting)
    clock.mark("data")
    _, accuracy, settings = contestant.train(
        setting, parts, setting.epochs, clock.mark, in_a_hurry=True
    )
    clock.mark("test")
    return {
        "seconds": [sum(clock.phases.values())], "accuracy": accuracy,
        "settings": settings, "phases": clock.phases,
    }


def weights(contestant, setting, options, data, clock):
    """Train the reference network, for all contestants in inference."""
    setting = SETTINGS["reference-128"]
    seconds, accuracy, settings = contestant.train(setting, data.of(setting), 2)
    np.savez(weights_file(options.folder), *contestant.weights)
    return {"seconds": seconds, "accuracy": accuracy, "settings": settings}


def weights_file(folder):
    return Path(folder) / "weights.npz"


def predict(contestant, setting, options, data, clock):
    _, test = data.of(setting)
    with np.load(weights_file(options.folder)) as file:
        trained = list(file.values())
    images, batch = test.floats(), min(setting.batch, len(test.labels))
    score, settings = contestant.predictor(setting, trained, images)
    # medians of groups of calls, so that one image a call leaves few figures, too
    groups, calls = (3, 3) if options.quick else (9, 5)
    calls *= 10 if batch == 1 else 1
    parts = [slice(i, i + batch) for i in range(0, len(images) - batch + 1, batch)]
    parts = parts[: groups * calls]
    for _ in range(4):
        score(parts[0])  # compiles, captures
    found = np.concatenate([contestant.array(score(part)) for part in parts])
    accuracy = float((found.argmax(1) == test.labels[: len(found)]).mean())
    seconds, number = [], 0
    for _ in range(groups):
        group = []
        for _ in range(calls):
            part = parts[number % len(parts)]
            number += 1
            begin = time.perf_counter()
            score(part)
            group.append(time.perf_counter() - begin)
        seconds.append(statistics.median(group))
    return {"seconds": seconds, "accuracy": accuracy, "settings": settings}


# ---------------------------------------------------------------------------------
# The process that starts them


def results(kind, jobs, options, python):
    """Yield the result of each job; after one with "error" come no more."""
    command = [python, str(_HERE), "--only", kind]
    command += ["--jobs", ",".join("/".join(job) for job in jobs)]
    for option in ("device", "epochs", "threads", "images", "folder"):
        if getattr(options, option) is not None:
            command += [f"--{option}", str(getattr(options, option))]
    command += ["--quick"] * options.quick
    environment = dict(os.environ)
    if options.device == "cpu":
        for variable in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{variable}_NUM_THREADS"] = str(options.threads)
    lines = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--started", repr(time.monotonic())], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            for _ in jobs:
                result = lines.get(timeout=options.limit)
                if result is None:
                    status = process.wait()
                    errors.seek(0)
                    result = {"error": f"exit status {status}\n{errors.read()[-2000:]}"}
                yield result
                if "error" in result:
                    return
        except queue.Empty:
            yield {"error": f"not done after {options.limit:g} s"}
        finally:
            try:
                # with all that it started: compilers, for instance
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _read(process, lines):
    for line in process.stdout:
        if line.startswith(_RESULT):
            lines.put(json.loads(line[len(_RESULT) :]))
    lines.put(None)


def compete(kind, jobs, options):
    """Yield (job, result) of one kind of contestant, each result perhaps an "error"."""
    library = kind.split("-")[0]
    python = sys.executable if library == "cycnn" else options.peer_python
    search = f"import importlib.util as u, sys; sys.exit(not u.find_spec({library!r}))"
    done = subprocess.run([python, "-c", search], cwd=_HERE.parent.parent, check=False)
    if done.returncode:
        for job in jobs:
            yield job, {"error": f"{_LIBRARIES[library]} is not installed"}
        return
    left, failures = list(jobs), 0
    while left and failures < _FAILURES:
        together = [job for job in left if job.setting != "start"]
        # starting is what that is about, so each gets a process of its own
        together = together or left[:1]
        for job, result in zip(together, results(kind, together, options, python)):
            left.remove(job)
            yield job, result
            failures = failures + 1 if "error" in result else 0
    for job in left:
        yield job, {"error": f"left out: {failures} failures in a row before"}


def measure(kind, jobs, options):
    """As :func:`compete`, with median and verdict; starts are repeated."""
    for job, result in compete(kind, jobs, options):
        if job.setting == "start" and "error" not in result:
            # that one filled the caches; those that take long run once more only
            repeats = 1 if options.quick or result["seconds"][0] > 5 else 3
            result["seconds"] = []
            for _ in range(repeats):
                ((_, again),) = compete(kind, [job], options)
                if "error" in again:
                    result = again
                    break
                again["seconds"] = result["seconds"] + again["seconds"]
                result = again
        if "error" not in result:
            setting = SETTINGS.get(job.setting)
            result["median"] = statistics.median(result["seconds"])
            result["learned"] = not setting or result["accuracy"] >= setting.learned
        yield job, result


def machine(options):
    """What the figures were taken on."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "python": platform.python_version(),
    }
    if options.device == "cuda":
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        found["device"], found["driver"] = answer.stdout.splitlines()[0].split(", ")
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1] for line in lines if "model name" in line]
        found["device"] = names[0].strip() if names else platform.machine()
        found["threads"] = options.threads
    return found


def plan(options):
    """{kind: its jobs}, by what was asked for and what makes sense."""

    def chosen(names, patterns):
        return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]

    names = contestants(options.device)
    if options.contestants:
        names = chosen(names, options.contestants.split(","))
    elif options.device == "cpu":
        # JAX's jitted scan takes minutes an epoch on a CPU
        names = chosen(names, ["cycnn-*", "torch-*"])
    if options.quick and options.device == "cuda":
        names = chosen(names, ["*-tf32"])
    everything = "reference-128" if options.device == "cpu" else "*"
    planned = {}
    for setting in chosen(SETTINGS, (options.networks or everything).split(",")):
        everybody = options.contestants or options.device == "cpu"
        usual = ("*",) if everybody else SETTINGS[setting].contestants
        for name in chosen(names, usual):
            kind, precision = name.rsplit("-", 1)
            planned.setdefault(kind, []).append(Job(setting, precision))
    return {kind: planned[kind] for kind in KINDS if kind in planned}


def run(options, content):
    """Run all contestants; fills ``content``, and --json with each result."""
    from cycnn import data

    content["about"] = machine(options)
    planned = plan(options)
    wanted = {job.setting for jobs in planned.values() for job in jobs}
    results = content["results"] = {name: {} for name in SETTINGS if name in wanted}
    with tempfile.TemporaryDirectory() as options.folder:
        for part, paths in zip(
            data.mnist(options.data), networks.mnist_files(Path(options.folder))
        ):
            data.write_idx(paths[0], part.images[:, 0])
            data.write_idx(paths[1], part.labels.astype(np.uint8))
        if any(SETTINGS[setting].task == "predict" for setting in wanted):
            ((_, trained),) = measure("cycnn", [Job("weights", "fp32")], options)
            say("weights for inference", trained)
        for kind, jobs in planned.items():
            for (setting, precision), result in measure(kind, jobs, options):
                name = f"{kind}-{precision}"
                results[setting][name] = result
                say(f"{name} {setting}", result)
                if options.json:
                    Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


_BEGIN = time.monotonic()


def say(what, result):
    outcome = result.get("error")
    if outcome is None:
        outcome = f"{result['median']:.6f} s, {result['accuracy']:.2%}"
    passed = time.monotonic() - _BEGIN
    print(f"{passed:6.1f} s  {what}: {outcome}", file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--networks", metavar="PATTERNS",
        help=f"some only, for instance 'vgg-*,predict-1': {', '.join(SETTINGS)} "
        f"(default: all; on the CPU reference-128)")
    add("--contestants", metavar="PATTERNS",
        help="some only, for instance 'cycnn-*,torch-graph-tf32', on all networks "
        "(default: all, those that start or compile slowly only on some)")
    add("--epochs", type=int, help="timed epochs of each training")
    add("--quick", action="store_true",
        help="one timed epoch, one precision: to see that everything works")
    add("--images", type=int, metavar="N", help="take N images of each set only")
    add("--limit", type=float, default=300, metavar="SECONDS",
        help="that a contestant may take for a network (default %(default)g)")
    add("--threads", type=int, default=2, help="cores to use with --device cpu")
    add("--data", metavar="DIR", help="folder of the MNIST files")
    add("--peer-python", default=sys.executable, metavar="PATH",
        help="interpreter that has the peers installed, if it is another one")
    add("--json", metavar="FILE", help="write the results there, too")
    add("--chart", metavar="FILE", help="draw them there (PNG; needs matplotlib)")
    add("--read", metavar="FILE", nargs="+",
        help="run nothing: one table and chart of results that --json wrote; where two "
        "files have the same figure, the later one counts")
    for hidden in ("--only", "--jobs", "--folder"):
        add(hidden, help=argparse.SUPPRESS)
    add("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.epochs = options.epochs or 1
    if options.only or options.read:
        return options
    if not plan(options):
        parser.error(
            f"--contestants and --networks leave nothing of these contestants: "
            f"{', '.join(contestants(options.device))}; and of these networks: "
            f"{', '.join(SETTINGS)}"
        )
    return options


def main():
    options = arguments()
    if options.only:
        work(options)
        return 0
    if options.chart:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            sys.exit("--chart needs matplotlib: pip install matplotlib")
    content, interrupted = {}, False
    if options.read:
        content = report.merged(
            [json.loads(Path(path).read_text()) for path in options.read]
        )
    else:
        # so that nothing is left running, and what was measured is not lost
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run(options, content)
        except KeyboardInterrupt:
            interrupted = True
    print(report.table(content))
    if options.chart:
        report.chart(content, options.chart)
    if interrupted:
        return 130
    ran = [
        result
        for results in content["results"].values()
        for result in results.values()
        if "error" not in result
    ]
    return 0 if ran and all(result["learned"] for result in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
