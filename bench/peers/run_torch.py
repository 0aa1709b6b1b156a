"""PyTorch: eager, each step one CUDA graph, and that with torch.compile."""

import dataclasses
import itertools
import time

import networks
import torch
from torch import nn
from torch.nn import functional

_LAYOUTS = ("contiguous_format", "channels_last")


class Contestant:
    """One way of running PyTorch, with what made it fastest.

    Of two memory layouts, and for inference of two sizes of pieces, the quicker one in
    a short trial competes: which that is depends on network, precision and version.

    Parameters
    ----------
    kind : {"torch-eager", "torch-graph", "torch-compile"}
    precision : str
    options : argparse.Namespace
    """

    version = torch.__version__

    def __init__(self, kind, precision, options):
        self.kind, self.precision, self.device = kind, precision, options.device
        if self.device == "cpu":
            torch.set_num_threads(options.threads)
        self.quickest = {}

    def set_up(self, benchmark=True):
        """What is not a model's but the library's."""
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = self.precision != "fp32"

    def prepare(self, pool, setting, parts, epochs):
        """Nothing: a training compiles what it needs before its first epoch."""

    def train(self, setting, parts, epochs, mark=None, in_a_hurry=False):
        """As :meth:`run_cycnn.Contestant.train`.

        ``in_a_hurry``: no trials, and cuDNN's first choice of algorithms.
        """
        self.set_up(benchmark=not in_a_hurry)
        network = networks.NETWORKS[setting.network]
        arrays = [
            (torch.from_numpy(part.floats()), torch.from_numpy(part.labels).long())
            for part in parts
        ]
        (images, labels), test = (
            [tensor.to(self.device) for tensor in pair] for pair in arrays
        )

        def training(layout):
            return Training(
                self, network, setting.batch, epochs, images, labels, layout
            )

        layouts = _LAYOUTS
        if self.kind == "torch-compile":
            layouts = _LAYOUTS[:1]  # the compiler chooses by itself
        elif in_a_hurry:
            layouts = _LAYOUTS[self.precision != "fp32" :][:1]
        if len(layouts) > 1:
            trials = {layout: training(layout).trial() for layout in layouts}
            layouts = [min(trials, key=trials.get)]
        run = training(layouts[0])
        if mark:
            mark("model")
        seconds = []
        for number in range(epochs):
            seconds.append(run.epoch())
            if mark:
                mark(f"epoch {number + 1}")
        self.weights = [weight.detach() for weight in run.model.parameters()]
        settings = [layouts[0], *self.settings(), *run.settings()]
        return seconds, run.accuracy(*test), ", ".join(settings)

    def settings(self):
        found = ["cudnn.benchmark"] if torch.backends.cudnn.benchmark else []
        return found * (self.device == "cuda") + ["TF32"] * (self.precision != "fp32")

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def predictor(self, setting, weights, images):
        """As :meth:`run_cycnn.Contestant.predictor`."""
        self.set_up()
        if setting.batch not in self.quickest:
            layouts = _LAYOUTS[:1] if self.kind == "torch-compile" else _LAYOUTS
            pieces = {setting.batch, min(setting.batch, 1000)}
            alike = dataclasses.replace(setting, resident=True)
            self.quickest[setting.batch] = min(
                itertools.product(layouts, pieces),
                key=lambda way: Inference(self, alike, weights, images, *way).trial(),
            )
        layout, piece = self.quickest[setting.batch]
        run = Inference(self, setting, weights, images, layout, piece)
        settings = [layout, f"{piece} at a time", *self.settings(), *run.settings()]
        return run.scores, ", ".join(settings)

    def array(self, scores):
        """As :attr:`run_cycnn.Contestant.array`."""
        return torch.as_tensor(scores).cpu().numpy()


class Training:
    """One model in training."""

    def __init__(self, contestant, network, batch, epochs, images, labels, layout):
        self.contestant, self.network, self.batch = contestant, network, batch
        self.device, self.autocast = contestant.device, contestant.precision == "bf16"
        self.synchronize = contestant.synchronize
        layout = getattr(torch, layout)
        self.images, self.labels = images.contiguous(memory_format=layout), labels
        self.model = build(network).to(self.device, memory_format=layout)
        self.start = [value.detach().clone() for value in self.values()]
        self.captured = contestant.kind != "torch-eager"
        self.forward = self.model
        if contestant.kind == "torch-compile":
            self.forward = torch.compile(self.model, dynamic=False)
        self.rate = network.rate
        self.fall = self.rate / (epochs * -(-len(labels) // batch))
        self.optimizer = self.make_optimizer()
        self.total = torch.zeros((), device=self.device)
        self.graphs = {}
        self.reset()
        if self.captured:
            for size in {min(batch, len(labels)), len(labels) % batch} - {0}:
                self.graphs[size] = self.capture(size)
            self.reset()

    def make_optimizer(self):
        # a graph keeps its numbers, so there the learning rate lies on the device
        rate = self.rate
        if self.captured:
            rate = torch.tensor(rate, device=self.device)
        common = {"lr": rate, "weight_decay": networks.DECAY}
        weights = self.model.parameters()
        if self.network.optimizer == "sgd":
            return torch.optim.SGD(
                weights, momentum=networks.MOMENTUM, fused=True, **common
            )
        return torch.optim.RMSprop(
            weights, alpha=networks.ALPHA, eps=networks.EPS, foreach=True,
            capturable=self.captured, **common,
        )

    def settings(self):
        found = ["fused SGD" if self.network.optimizer == "sgd" else "foreach RMSprop"]
        found += ["autocast"] * self.autocast
        if self.captured:
            found += ["capturable"] * (self.network.optimizer == "rmsprop")
            found += ["step in a graph"]
        return found + ["torch.compile"] * (self.forward is not self.model)

    def values(self):
        """The weights and the running statistics."""
        return itertools.chain(self.model.parameters(), self.model.buffers())

    def reset(self):
        """Back to the start, in place, since graphs know the places."""
        state = self.optimizer.state
        with torch.no_grad():
            for value, start in zip(self.values(), self.start):
                value.copy_(start)
            for weight in self.model.parameters():
                if weight not in state:
                    state[weight] = self.empty_state(weight)
                for name, start in (
                    ("square_avg", networks.ACCUMULATOR), ("momentum_buffer", 0)
                ):
                    if name in state[weight]:
                        state[weight][name].fill_(start)
        self.set_rate(self.rate)

    def empty_state(self, weight):
        if self.network.optimizer == "sgd":
            return {"momentum_buffer": torch.zeros_like(weight)}
        # as the first step would make it, but for the accumulator's start
        step = torch.zeros((), device=self.device if self.captured else "cpu")
        return {"step": step, "square_avg": torch.zeros_like(weight)}

    def set_rate(self, rate):
        (group,) = self.optimizer.param_groups
        if self.captured:
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def step(self, index):
        x = self.images.index_select(0, index)
        target = self.labels.index_select(0, index)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            scores = self.forward(x)
        loss = functional.nll_loss(scores.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()
        (group,) = self.optimizer.param_groups
        group["lr"] -= self.fall

    def capture(self, size):
        index = torch.arange(size, device=self.device)
        graph = captured(lambda: self.step(index), self.optimizer.zero_grad)
        return graph, index

    def run(self, order):
        for index in order.split(self.batch):
            if self.graphs:
                graph, static_index = self.graphs[len(index)]
                static_index.copy_(index)
                graph.replay()
            else:
                self.step(index)

    def epoch(self):
        """Train one epoch; returns its seconds."""
        self.synchronize()
        start = time.perf_counter()
        self.total.zero_()
        self.run(torch.randperm(len(self.labels), device=self.device))
        self.total.item()
        return time.perf_counter() - start

    def trial(self):
        """Seconds of a few steps."""
        warm, timed = (10, 30) if self.device == "cuda" else (1, 2)
        order = torch.arange(len(self.labels), device=self.device)
        full = order[: max(1, len(order) // self.batch) * self.batch]
        full = full.repeat(-(-(warm + timed) * self.batch // len(full)))
        self.run(full[: warm * self.batch])
        self.synchronize()
        start = time.perf_counter()
        self.run(full[warm * self.batch : (warm + timed) * self.batch])
        self.synchronize()
        return time.perf_counter() - start

    def accuracy(self, images, labels):
        self.model.eval()
        with torch.no_grad():
            hits = [
                (self.model(x).argmax(1) == y).sum().item()
                for x, y in zip(images.split(1000), labels.split(1000))
            ]
        return sum(hits) / len(labels)


class Inference:
    """The scores of images, in pieces of one size."""

    def __init__(self, contestant, setting, weights, images, layout, piece):
        device, self.resident = contestant.device, setting.resident
        self.synchronize = contestant.synchronize
        self.count, self.half = setting.batch, contestant.precision == "bf16"
        dtype = torch.bfloat16 if self.half else torch.float32
        layout = getattr(torch, layout)
        network = networks.NETWORKS[setting.network]
        self.model = build(network, weights).eval()
        self.model.to(device, dtype, memory_format=layout)
        self.images = torch.from_numpy(images)
        if self.resident:
            self.images = self.images.to(device, dtype, memory_format=layout)
        # where a graph finds its images
        self.x = torch.zeros(
            (piece, *images.shape[1:]), dtype=dtype, device=device
        ).contiguous(memory_format=layout)
        self.graph, self.forward = None, self.model
        if contestant.kind == "torch-compile":
            self.forward = torch.compile(self.model, dynamic=False)
        if contestant.kind != "torch-eager":
            self.graph = captured(self.replayed)

    @torch.inference_mode()
    def replayed(self):
        self.y = self.forward(self.x).float()

    @torch.inference_mode()
    def scores(self, part):
        found, pieces = [], self.images[part].split(len(self.x))
        for x in pieces:
            if self.graph is None:
                x = x.to(self.x.device, self.x.dtype)
                found.append(self.model(x).float())
            else:
                self.x.copy_(x, non_blocking=True)
                self.graph.replay()
                # the next replay overwrites it
                found.append(self.y.clone() if len(pieces) > 1 else self.y)
        found = found[0] if len(found) == 1 else torch.cat(found)
        if not self.resident:
            return found.cpu().numpy()
        self.synchronize()
        return found

    def trial(self):
        """Seconds of a call."""
        took = []
        for _ in range(6):
            start = time.perf_counter()
            self.scores(slice(0, self.count))
            took.append(time.perf_counter() - start)
        return min(took[3:])

    def settings(self):
        found = ["inference_mode", *["bfloat16 weights"] * self.half]
        found += ["one graph"] * (self.graph is not None)
        return found + ["torch.compile"] * (self.forward is not self.model)


def captured(function, before=None):
    """``function`` as a CUDA graph, after a few calls; ``before`` comes in between."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if before:
        before()
    with torch.cuda.graph(graph):
        function()
    return graph


class Residual(nn.Module):
    """What ``body`` gives, added to what ``shortcut`` gives, or to the input."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def build(network, weights=None):
    model = networks.build(network, nn, Residual)
    weights = weights or networks.starting_weights(network)
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(array))
    return model
