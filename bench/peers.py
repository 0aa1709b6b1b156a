#!/usr/bin/env python3
"""Time an epoch of the reference network on MNIST: cycnn, PyTorch and, on a GPU, JAX.

    python bench/peers.py --device cuda --json results.json
    python bench/peers.py --device cpu --threads 2

Everybody trains the same network with the same hyper-parameters on the same images:
60,000 of them in a new order each epoch, 468 batches of 128 and one of 96, RMSProp
with lr 0.003, alpha 0.99, L2 1e-4, the accumulator starting at 1e-3. The images lie on
the device before the clock starts, for the peers already as normalised float32. Each
contestant runs in a process of its own; warm-up epochs (imports, compiling, choosing
algorithms, capturing) are not timed; the figure is the median of the timed epochs. The
loss is summed on the device and read once an epoch; cycnn's Trainer counts hits, too.
Who has not learned (test accuracy over 97%) at the end has not run.

A peer that is not installed is left out, and the table says so.
"""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Last, for a checkout in which cycnn was built in place and not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

LR, ALPHA, EPS, DECAY, ACCUMULATOR = 0.003, 0.99, 1e-10, 1e-4, 1e-3
BATCH = 128
LEARNED = 0.97
PRECISIONS = ("fp32", "tf32", "bf16")
_RESULT = "RESULT "


def contestants(device, compile_too):
    if device == "cpu":
        # no JAX: its jitted scan takes minutes an epoch on a CPU
        return ["cycnn-fp32", "torch-eager-fp32"]
    kinds = ["cycnn", "cycnn-eager", "torch-eager", "torch-graph"]
    kinds += ["torch-compile"] if compile_too else []
    return [f"{kind}-{mode}" for kind in [*kinds, "jax-scan"] for mode in PRECISIONS]


# ---------------------------------------------------------------------------------
# cycnn


def run_cycnn(kind, mode, options, arrays):
    import cycnn
    from cycnn import data, nn, optim

    cycnn.manual_seed(0)
    cycnn.set_precision(mode)
    # the same pixels as for the peers, in the form in which data sets come
    train, test = (
        data.ArrayDataset(
            arrays[f"{part}_images"], arrays[f"{part}_labels"], 1 / 255, -0.5
        )
        for part in ("train", "test")
    )
    model = nn.reference_network().to(options.device)
    optimizer = optim.RMSprop(
        model.parameters(), lr=LR, alpha=ALPHA, eps=EPS, weight_decay=DECAY,
        initial_accumulator=ACCUMULATOR,
    )
    # cycnn: what a user gets, on a GPU each step one graph; cycnn-eager: no graph
    capture = False if kind == "cycnn-eager" else None
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture)
    history = trainer.fit(train, options.warmup + options.epochs, BATCH, seed=0)
    return {
        "version": cycnn.__version__,
        "settings": f"Trainer.fit, uint8 images, capture={capture}",
        "seconds": history["seconds"][options.warmup :],
        "accuracy": trainer.evaluate(test)["accuracy"],
    }


# ---------------------------------------------------------------------------------
# PyTorch


class TorchRun:
    """One model in training: eager, or each step replayed as one CUDA graph."""

    def __init__(self, kind, mode, device, images, labels, memory_format):
        import torch
        from torch import nn

        self.torch, self.mode, self.device = torch, mode, device
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = labels
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(1),
        ).to(device, memory_format=memory_format)
        captured = kind != "torch-eager"
        self.optimizer = torch.optim.RMSprop(
            self.model.parameters(), lr=LR, alpha=ALPHA, eps=EPS, weight_decay=DECAY,
            foreach=True, capturable=captured,
        )
        for parameter in self.model.parameters():
            # as its first step would, but for the accumulator's start
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device if captured else "cpu"),
                "square_avg": torch.full_like(parameter, ACCUMULATOR),
            }
        self.forward = self.model
        if kind == "torch-compile":
            self.forward = torch.compile(
                self.model, mode="max-autotune-no-cudagraphs", dynamic=False
            )
        self.total = torch.zeros((), device=device)
        self.graphs = {}
        if captured:
            for size in {BATCH, len(labels) % BATCH} - {0}:
                self.graphs[size] = self.capture(size)

    def scores(self, x):
        autocast = self.torch.autocast(
            self.device, self.torch.bfloat16, enabled=self.mode == "bf16"
        )
        with autocast:
            return self.forward(x)

    def step(self, index):
        torch = self.torch
        x = self.images.index_select(0, index)
        target = self.labels.index_select(0, index)
        loss = torch.nn.functional.nll_loss(self.scores(x).float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def capture(self, size):
        torch = self.torch
        index = torch.arange(size, device=self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(index)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.step(index)
        return graph, index

    def epoch(self):
        """Train one epoch; returns its seconds."""
        torch = self.torch
        self.synchronize()
        start = time.perf_counter()
        self.total.zero_()
        order = torch.randperm(len(self.labels), device=self.device)
        for index in order.split(BATCH):
            if self.graphs:
                graph, static_index = self.graphs[len(index)]
                static_index.copy_(index)
                graph.replay()
            else:
                self.step(index)
        self.total.item()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def accuracy(self, images, labels):
        with self.torch.no_grad():
            hits = [
                (self.model(x).argmax(1) == y).sum().item()
                for x, y in zip(images.split(1000), labels.split(1000))
            ]
        return sum(hits) / len(labels)


def run_torch(kind, mode, options, arrays):
    import torch

    device = options.device
    if device == "cpu":
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = mode != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = mode != "fp32"
    train, labels, test, test_labels = (
        torch.from_numpy(array).to(device) for array in float_arrays(arrays)
    )
    labels, test_labels = labels.long(), test_labels.long()

    # Which memory layout is faster depends on precision and version: the quicker one
    # of both competes.
    runs = {}
    for name in ("contiguous_format", "channels_last"):
        run = TorchRun(kind, mode, device, train, labels, getattr(torch, name))
        warm = [run.epoch() for _ in range(options.warmup + (device == "cuda"))]
        runs[name] = (warm[-1], run)
    layout = min(runs, key=lambda name: runs[name][0])
    run = runs.pop(layout)[1]
    runs.clear()
    settings = [layout, "foreach RMSprop", "cudnn.benchmark" * (device == "cuda")]
    settings += ["TF32 on"] * (mode != "fp32") + ["autocast"] * (mode == "bf16")
    settings += ["capturable"] * bool(run.graphs)
    return {
        "version": torch.__version__,
        "settings": ", ".join(filter(None, settings)),
        "seconds": [run.epoch() for _ in range(options.epochs)],
        "accuracy": run.accuracy(test, test_labels),
    }


# ---------------------------------------------------------------------------------
# JAX


def run_jax(kind, mode, options, arrays):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_PLATFORMS"] = options.device
    import jax
    import jax.numpy as jnp
    from jax import lax

    multiply = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "bfloat16"}[mode]
    jax.config.update("jax_default_matmul_precision", multiply)
    compute = jnp.bfloat16 if mode == "bf16" else jnp.float32
    train, labels, test, test_labels = (
        jnp.asarray(array) for array in float_arrays(arrays, channels_last=True)
    )

    shapes = [(5, 5, 1, 32), (5, 5, 32, 64), (3, 3, 64, 128), (512, 128), (128, 10)]
    parameters = []
    for key, shape in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes):
        bound = (shape[-1] / float(jnp.prod(jnp.array(shape)))) ** 0.5
        w_key, b_key = jax.random.split(key)
        parameters.append((
            jax.random.uniform(w_key, shape, minval=-bound, maxval=bound),
            jax.random.uniform(b_key, shape[-1:], minval=-bound, maxval=bound),
        ))

    def log_probs(parameters, x):
        x = x.astype(compute)
        for layer, (w, b) in enumerate(parameters):
            w, b = w.astype(compute), b.astype(compute)
            if w.ndim == 4:
                x = lax.conv_general_dilated(
                    x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jax.nn.relu(x + b)
                if layer < 2:
                    x = lax.reduce_window(
                        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                    )
            else:
                x = x.reshape(len(x), -1) @ w + b
                x = jax.nn.relu(x) if layer < len(parameters) - 1 else x
        return jax.nn.log_softmax(x.astype(jnp.float32))

    def loss(parameters, x, y):
        return -jnp.take_along_axis(log_probs(parameters, x), y[:, None], 1).mean()

    def step(state, index, images, targets):
        parameters, squares = state
        value, gradients = jax.value_and_grad(loss)(
            parameters, images[index], targets[index]
        )
        gradients = jax.tree.map(lambda g, p: g + DECAY * p, gradients, parameters)
        squares = jax.tree.map(
            lambda v, g: ALPHA * v + (1 - ALPHA) * g * g, squares, gradients
        )
        parameters = jax.tree.map(
            lambda p, g, v: p - LR * g / (jnp.sqrt(v) + EPS),
            parameters, gradients, squares,
        )
        return (parameters, squares), value

    def epoch(state, key, images, targets):
        count = len(targets)
        full = count // BATCH
        order = jax.random.permutation(key, count)

        def body(state, index):
            return step(state, index, images, targets)

        batches = order[: full * BATCH].reshape(full, BATCH)
        state, values = lax.scan(body, state, batches)
        total = values.sum()
        if count % BATCH:
            state, value = step(state, order[full * BATCH :], images, targets)
            total += value
        return state, total

    train_epoch = jax.jit(epoch, donate_argnums=0)
    squares = jax.tree.map(lambda p: jnp.full_like(p, ACCUMULATOR), parameters)
    state, seconds = (parameters, squares), []
    for number in range(options.warmup + options.epochs):
        key = jax.block_until_ready(jax.random.key(number))
        start = time.perf_counter()
        state, total = train_epoch(state, key, train, labels)
        jax.block_until_ready((state, total))
        seconds.append(time.perf_counter() - start)
    scores, parts = jax.jit(log_probs), list(range(1000, len(test_labels), 1000))
    hits = sum(
        int((scores(state[0], x).argmax(1) == y).sum())
        for x, y in zip(jnp.split(test, parts), jnp.split(test_labels, parts))
    )
    return {
        "version": jax.__version__,
        "settings": f"jit of a scan over the epoch, NHWC, {multiply} products",
        "seconds": seconds[options.warmup :],
        "accuracy": hits / len(test_labels),
    }


# ---------------------------------------------------------------------------------
# A contestant's process, and the process that starts them


def float_arrays(arrays, channels_last=False):
    """Normalised images and int32 labels for a peer: train, test."""
    for part in ("train", "test"):
        images = arrays[f"{part}_images"].astype("float32") / 255 - 0.5
        yield images.transpose(0, 2, 3, 1).copy() if channels_last else images
        yield arrays[f"{part}_labels"]


def work(options):
    """Run the one contestant ``options.only`` and print its result."""
    if options.device == "cpu":
        # the same cores for everybody, whatever thread pools a library makes
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: options.threads])
    import numpy as np

    with np.load(options.arrays) as file:
        arrays = dict(file)
    kind, mode = options.only.rsplit("-", 1)
    library = {"cycnn": run_cycnn, "torch": run_torch, "jax": run_jax}
    result = library[kind.split("-")[0]](kind, mode, options, arrays)
    print(_RESULT + json.dumps(result))


def compete(name, options, arrays_file):
    """The result of one contestant, or a dict with "error"."""
    library = name.split("-")[0]
    python = sys.executable if library == "cycnn" else options.peer_python
    if subprocess.run(
        [python, "-c", f"import importlib.util as u, sys; "
         f"sys.exit(u.find_spec({library!r}) is None)"],
        cwd=Path(__file__).resolve().parent.parent,
    ).returncode:
        return {"error": f"{library} is not installed"}
    command = [python, __file__, "--only", name, "--arrays", arrays_file]
    for option in ("device", "epochs", "warmup", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    environment = dict(os.environ)
    if options.device == "cpu":
        for variable in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{variable}_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [x for x in done.stdout.splitlines() if x.startswith(_RESULT)]
    if done.returncode or not results:
        return {"error": f"exit status {done.returncode}\n{done.stderr[-2000:]}"}
    result = json.loads(results[-1][len(_RESULT) :])
    result["median"] = statistics.median(result["seconds"])
    result["learned"] = result["accuracy"] > LEARNED
    return result


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


def table(about, results):
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    own = {mode: results.get(f"cycnn-{mode}", {}) for mode in PRECISIONS}
    lines.append(
        f"{'contestant':<20} {'ms an epoch':>11} {'spread':>15} {'x cycnn':>8} "
        f"{'accuracy':>9}  version, settings"
    )
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<20} {result['error'].splitlines()[0]}")
            continue
        times = [1000 * seconds for seconds in result["seconds"]]
        base = own[name.rsplit("-", 1)[1]].get("median")
        ratio = f"{result['median'] / base:.2f}" if base else "-"
        accuracy = f"{result['accuracy']:.2%}" + "!" * (not result["learned"])
        lines.append(
            f"{name:<20} {1000 * result['median']:>11.1f} "
            f"{f'{min(times):.1f}..{max(times):.1f}':>15} {ratio:>8} {accuracy:>9}  "
            f"{result['version']}, {result['settings']}"
        )
    lines += ["", "x cycnn: time divided by cycnn's in the same precision"]
    if any(result.get("learned") is False for result in results.values()):
        lines.append(f"!: has not learned (at most {LEARNED:.0%})")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--epochs", type=int, help="timed epochs (default 9, on the CPU 3)")
    add("--warmup", type=int, default=1, help="epochs before them")
    add("--threads", type=int, default=2, help="cores to use with --device cpu")
    add("--contestants", default="*", metavar="PATTERNS",
        help="some only, for instance 'cycnn-*,torch-graph-tf32'")
    add("--compile", action="store_true",
        help="also PyTorch with torch.compile, which takes minutes to warm up")
    add("--data", metavar="DIR", help="folder of the MNIST files")
    add("--peer-python", default=sys.executable, metavar="PATH",
        help="interpreter that has the peers installed, if it is another one")
    add("--json", metavar="FILE", help="write the results there, too")
    add("--only", help=argparse.SUPPRESS)
    add("--arrays", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.epochs = options.epochs or (9 if options.device == "cuda" else 3)
    if options.only:
        work(options)
        return 0

    import numpy as np
    from cycnn import data

    patterns = options.contestants.split(",")
    names = [
        name
        for name in contestants(options.device, options.compile)
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    if not names:
        known = ", ".join(contestants(options.device, True))
        parser.error(f"--contestants matches none of: {known}")
    about, results = machine(options), {}
    with tempfile.TemporaryDirectory() as folder:
        arrays_file = os.path.join(folder, "mnist.npz")
        train, test = data.mnist(options.data)
        np.savez(
            arrays_file,
            train_images=train.images, train_labels=train.labels,
            test_images=test.images, test_labels=test.labels,
        )
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = compete(name, options, arrays_file)
            if "exit status" in results[name].get("error", ""):
                print(results[name]["error"], file=sys.stderr)
    print(table(about, results))
    if options.json:
        content = {**about, "batch_size": BATCH, "results": results}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    ran = [result for result in results.values() if "error" not in result]
    return 0 if ran and all(result["learned"] for result in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
