"""JAX: the whole epoch one jitted scan."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import networks

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NORM_EPS, _NORM_MOMENTUM = 1e-5, 0.1  # PyTorch's and cycnn's defaults
_MULTIPLY = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "bfloat16"}
_POOLINGS = ("reshape", "reduce_window")


class Contestant:
    """JAX in one precision; its settings are what made it fastest.

    Of two ways to pool, the quicker one in a short trial competes: which that is
    depends on precision and version.

    Parameters
    ----------
    kind : {"jax-scan"}
    precision : str
    options : argparse.Namespace
    """

    version = jax.__version__

    def __init__(self, kind, precision, options):
        jax.config.update("jax_platforms", options.device)
        self.multiply = _MULTIPLY[precision]
        self.precision, self.folder = precision, options.folder
        self.compute = jnp.bfloat16 if precision == "bf16" else jnp.float32
        self.prepared, self.scorers = {}, {}

    def prepare(self, pool, setting, parts, epochs, in_a_hurry=False):
        """Begin to compile a training: side by side, since each takes 10 s or so."""
        given = pool.submit(self.given, setting, parts)
        self.prepared[setting] = given, {
            pooling: pool.submit(self.compiled, setting, epochs, pooling, given)
            for pooling in poolings(setting)[: 1 if in_a_hurry else None]
        }

    def train(self, setting, parts, epochs, mark=None, in_a_hurry=False):
        """As :meth:`run_cycnn.Contestant.train`; ``weights`` are as in :func:`to_jax`.

        ``in_a_hurry``: no trial, and what was compiled is kept for the next process.
        """
        if in_a_hurry:
            cache = os.path.join(self.folder, f"jax-{self.precision}")
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if setting not in self.prepared:
            with ThreadPoolExecutor() as pool:
                self.prepare(pool, setting, parts, epochs, in_a_hurry)
        given, futures = self.prepared.pop(setting)
        state, *data = given.result()
        ways = {pooling: future.result() for pooling, future in futures.items()}
        pooling = quickest(ways, lambda way: second_epoch(way, state, data))
        train_epoch = ways[pooling]
        seconds = []
        if mark:
            mark("model")
        for number in range(epochs):
            state, took = timed(train_epoch, state, number, data)
            seconds.append(took)
            if mark:
                mark(f"epoch {number + 1}")
        scores = self.scores(networks.NETWORKS[setting.network], pooling)
        test, count = nhwc(parts[1].floats()), len(parts[1].labels)
        parameters, _, statistics, _ = state
        self.weights = parameters
        found = [
            scores(parameters, statistics, test[i : i + 1000])
            for i in range(0, count, 1000)
        ]
        accuracy = (np.concatenate(found).argmax(1) == parts[1].labels).mean()
        settings = f"{self.settings(pooling)}, scan over the epoch, donated"
        return seconds, float(accuracy), settings

    def given(self, setting, parts):
        """(state to start from, images, labels)."""
        network = networks.NETWORKS[setting.network]
        images, labels = nhwc(parts[0].floats()), parts[0].labels
        images, labels = jnp.asarray(images), jnp.asarray(labels)
        parameters = to_jax(network, networks.starting_weights(network))
        start = networks.ACCUMULATOR if network.optimizer == "rmsprop" else 0.0
        memory = jax.tree.map(lambda p: jnp.full_like(p, start), parameters)
        rate = jnp.float32(network.rate)
        return (parameters, memory, starting_statistics(network), rate), images, labels

    def compiled(self, setting, epochs, pooling, given):
        """The function that trains an epoch on what the future ``given`` brings."""
        network = networks.NETWORKS[setting.network]
        state, images, labels = given.result()
        steps = epochs * -(-len(labels) // setting.batch)
        epoch = self.epoch(network, pooling, setting.batch, steps)
        epoch = jax.jit(epoch, donate_argnums=0)
        return epoch.lower(state, jax.random.key(0), images, labels).compile()

    def settings(self, pooling):
        found = f"jit, NHWC, {self.multiply} products"
        return f"{found}, pooling by {pooling}" if pooling else found

    def predictor(self, setting, weights, images):
        """As :meth:`run_cycnn.Contestant.predictor`."""
        network = networks.NETWORKS[setting.network]
        parameters = jax.device_put([
            tuple(array.astype(self.compute) for array in arrays)
            for arrays in to_jax(network, weights)
        ])
        statistics = starting_statistics(network)
        images = nhwc(images)
        if setting.resident:
            images = jax.block_until_ready(jnp.asarray(images, self.compute))

        def scorer(pooling):
            scores = self.scores(network, pooling)
            if setting.resident:  # all of them: a slice would be another launch
                return lambda part: jax.block_until_ready(
                    scores(parameters, statistics, images)
                )
            return lambda part: np.asarray(scores(parameters, statistics, images[part]))

        def seconds(score):
            took = []
            for _ in range(6):
                start = time.perf_counter()
                score(slice(0, setting.batch))
                took.append(time.perf_counter() - start)
            return min(took[3:])

        ways = {pooling: scorer(pooling) for pooling in poolings(setting)}
        pooling = quickest(ways, seconds)
        return ways[pooling], self.settings(pooling)

    # as in run_cycnn
    array = staticmethod(np.asarray)

    # what is compiled

    def log_probs(self, network, pooling, parameters, statistics, x, training=False):
        """The scores, and what the running statistics are afterwards."""
        parameters, statistics, after = iter(parameters), iter(statistics), []

        def convolved(layer, x):
            w, *more = next(parameters)
            x = lax.conv_general_dilated(
                x, w.astype(self.compute), (layer.stride,) * 2,
                [(layer.padding, layer.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=layer.groups, precision=self.multiply,
            )
            if not layer.norm:
                return x + more[0].astype(self.compute)
            x, running = batch_norm(x, *more, *next(statistics), training)
            after.append(running)
            return x

        def run(layers, x):
            for layer in layers:
                if isinstance(layer, networks.Residual):
                    x = run(layer.body, x) + run(layer.shortcut, x)
                elif isinstance(layer, networks.Conv):
                    x = convolved(layer, x)
                else:
                    w, b = (p.astype(self.compute) for p in next(parameters))
                    x = x.mean((1, 2)) if layer.mean else x.reshape(len(x), -1)
                    x = jnp.matmul(x, w, precision=self.multiply) + b
                x = jax.nn.relu(x) if layer is not layers[-1] else x
                x = max_pool(x, pooling) if getattr(layer, "pool", False) else x
            return x

        x = run(network.layers, x.astype(self.compute))
        return jax.nn.log_softmax(x.astype(jnp.float32)), after

    def scores(self, network, pooling):
        key = network, pooling
        if key not in self.scorers:
            self.scorers[key] = jax.jit(lambda *given: self.log_probs(*key, *given)[0])
        return self.scorers[key]

    def epoch(self, network, pooling, batch, steps):
        """The function that trains an epoch in a run of so many steps."""
        rmsprop = network.optimizer == "rmsprop"
        fall = network.rate / steps

        def loss(parameters, statistics, x, y):
            scores, after = self.log_probs(
                network, pooling, parameters, statistics, x, True
            )
            return -jnp.take_along_axis(scores, y[:, None], 1).mean(), after

        def step(state, index, images, targets):
            parameters, memory, statistics, rate = state
            (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(
                parameters, statistics, images[index], targets[index]
            )
            gradients = jax.tree.map(
                lambda g, p: g + networks.DECAY * p, gradients, parameters
            )
            if rmsprop:
                memory = jax.tree.map(
                    lambda v, g: networks.ALPHA * v + (1 - networks.ALPHA) * g * g,
                    memory, gradients,
                )
                updates = jax.tree.map(
                    lambda g, v: g / (jnp.sqrt(v) + networks.EPS), gradients, memory
                )
            else:
                memory = jax.tree.map(
                    lambda b, g: networks.MOMENTUM * b + g, memory, gradients
                )
                updates = memory
            parameters = jax.tree.map(
                lambda p, u: p - rate * u, parameters, updates
            )
            return (parameters, memory, statistics, rate - fall), value

        def epoch(state, key, images, targets):
            count = len(targets)
            full = count // batch
            order = jax.random.permutation(key, count)

            def body(state, index):
                return step(state, index, images, targets)

            batches = order[: full * batch].reshape(full, batch)
            state, values = lax.scan(body, state, batches)
            total = values.sum()
            if count % batch:
                state, value = step(state, order[full * batch :], images, targets)
                total += value
            return state, total

        return epoch


def poolings(setting):
    """The ways to pool in its network; None if it has nothing to pool."""
    layers = networks.weighted(networks.NETWORKS[setting.network].layers)
    pools = any(getattr(layer, "pool", False) for layer in layers)
    return _POOLINGS if pools else (None,)


def quickest(ways, seconds):
    """The name of the way that takes least; one alone needs no trial."""
    if len(ways) == 1:
        return next(iter(ways))
    return min(ways, key=lambda name: seconds(ways[name]))


def second_epoch(train_epoch, state, data):
    """Its seconds, from a copy of the state, since that is donated."""
    state = jax.tree.map(jnp.copy, state)
    state, _ = timed(train_epoch, state, 0, data)
    return timed(train_epoch, state, 1, data)[1]


def timed(train_epoch, state, number, data):
    """Train the epoch of that number: (state, seconds)."""
    key = jax.block_until_ready(jax.random.key(number))
    begin = time.perf_counter()
    state, total = train_epoch(state, key, *data)
    jax.block_until_ready((state, total))
    return state, time.perf_counter() - begin


def max_pool(x, pooling):
    """2 x 2."""
    if pooling == "reduce_window":
        window = 1, 2, 2, 1
        return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def batch_norm(x, weight, bias, mean, variance, training):
    """Normalised x, and the running statistics afterwards; those of float32."""
    running, wide = (mean, variance), x.astype(jnp.float32)
    if training:
        axes = 0, 1, 2
        mean = wide.mean(axes)
        # in one pass over x
        variance = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0)
        count = wide.size // mean.size
        running = tuple(
            old + _NORM_MOMENTUM * (new - old)
            for old, new in zip(running, (mean, variance * (count / (count - 1))))
        )
    scale = weight * lax.rsqrt(variance + _NORM_EPS)
    return ((wide - mean) * scale + bias).astype(x.dtype), running


def starting_statistics(network):
    """[(mean, variance)] of each BatchNorm."""
    return [
        (jnp.zeros(layer.outputs), jnp.ones(layer.outputs))
        for layer in networks.weighted(network.layers)
        if getattr(layer, "norm", False)
    ]


def nhwc(images):
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def to_jax(network, weights):
    """The arrays of each layer in JAX's layouts, from PyTorch's."""
    made, channels, weights = [], None, iter(weights)
    for layer in networks.weighted(network.layers):
        w, *more = (next(weights) for _ in range(2 + getattr(layer, "norm", False)))
        if isinstance(layer, networks.Conv):
            w, channels = w.transpose(2, 3, 1, 0), layer.outputs
        elif channels and not layer.mean:
            # what it reads was flattened from NCHW, and here from NHWC
            side = round((layer.inputs // channels) ** 0.5)
            w = w.reshape(-1, channels, side, side).transpose(2, 3, 1, 0)
            w, channels = w.reshape(layer.inputs, -1), None
        else:
            w = w.T
        made.append(tuple(map(jnp.asarray, (np.ascontiguousarray(w), *more))))
    return made
