"""How the steps of an epoch run: operation by operation, or replayed as a graph.

A training step of a small network is dozens of short kernels, and launching each from
Python takes longer than running it. On a GPU the step is therefore recorded once, as a
CUDA graph, and replayed. What differs from step to step lies on the device then: which
images are next, the learning rate, and the sums of loss and hits.
"""

from __future__ import annotations

import numpy as np

from ..data.loader import gather_targets
from ..data.window import Window
from ..nn import Objective
from ..ops import Feed, for_device, fused
from ..precision import get_precision
from ..tensor import Tensor, empty


class Steps:
    """The steps of one epoch after the other.

    Parameters
    ----------
    trainer : Trainer
    loader : data.DataLoader
        Its batches are what the steps train on.
    """

    def __init__(self, trainer, loader):
        self.trainer = trainer
        self.loader = loader
        self.fused = trainer.fuse
        if self.fused is None:
            self.fused = loader.device.is_cuda
        self.objective = Objective(trainer.model, trainer.loss, self.fused)
        self.prepared_for = None
        # whether the first layer is left to read its batch out of the data set
        self.gather = False

    def begin_epoch(self, tally, epoch, first, total) -> None:
        """Get ready for the steps from ``first`` on.

        Parameters
        ----------
        tally : Tally
            Where loss and hits go.
        epoch : int
        first : int
            Steps of the epoch that are done already, before an interrupt.
        total : int
            Steps of the whole run, which the schedule spans.
        """
        raise NotImplementedError

    def run_next(self, most=1) -> int:
        """The next step, or several: forward, loss, backward, update.

        Parameters
        ----------
        most : int
            Steps that may run, at least 1.

        Returns
        -------
        int
            Steps that ran.
        """
        raise NotImplementedError

    def parameters_changed(self) -> None:
        """Somebody else may have changed the parameters amid an epoch."""

    def end_epoch(self) -> None:
        """Let go of what the epoch needed; called however the epoch ends."""

    def _prepare(self) -> None:
        """Compile the kernels of fused layers, all at once, before the first needs one.

        A kernel that is missed here is compiled when it first runs.
        """
        loader, precision = self.loader, get_precision()
        if not self.fused or precision == self.prepared_for:
            return
        self.prepared_for = precision
        images, size = loader.dataset.images.shape, loader.batch_size
        kernels = []
        for count in {min(size, images[0]), images[0] % size} - {0}:
            shape = count, *images[1:]
            kernels += self.objective.kernels(shape, gather=self.gather)
        if kernels:
            fused.prepare(kernels, loader.device)

    def _train(self, images, labels, update=None, recording=False, feed=None) -> None:
        """One step; ``update``, a PartialStep, does the optimizer's part if given, and
        a ``feed`` is told to lay out the next step's batch.

        That runs beside the backward pass: the update leaves it no room on the GPU.
        """
        trainer = self.trainer
        scores, value = self.objective.forward(images, labels)
        self.tally.check(scores)
        if update is None:
            self.objective.backward()
        else:
            partials = {}
            self.objective.backward(partials)
        self.tally.add(value, scores, labels, feed)
        if update is None:
            if trainer.clip_grad_norm is not None:
                trainer.optimizer.clip_grad_norm(trainer.clip_grad_norm)
            trainer.optimizer.step()
        else:
            update.run(partials, recording)
        if trainer.average is not None:
            trainer.average.update()


class EagerSteps(Steps):
    """Each operation is launched as Python comes to it."""

    def begin_epoch(self, tally, epoch, first, total):
        self._prepare()
        self.tally = tally
        self.step, self.total = epoch * len(self.loader) + first, total
        self.loader.set_epoch(epoch)
        self.batches = iter(self.loader)
        # batches that were trained on before an interrupt are passed over
        for _ in range(first):
            next(self.batches)

    def run_next(self, most=1):
        images, labels = next(self.batches)
        trainer = self.trainer
        if trainer.schedule is not None:
            trainer.optimizer.lrs = trainer.scheduled_lrs(self.step, self.total)
        self._train(images, labels)
        self.tally.count(len(labels))
        self.step += 1
        return 1

    def end_epoch(self):
        # a loader that streams ends its thread when its iterator goes
        self.batches = None


# Steps of one graph, where nobody looks between them: the GPU needs 1 to 2 us from one
# graph to the next.
_TOGETHER = 8


class CapturedSteps(Steps):
    """The whole step is in a CUDA graph, from reading the batch to the update.

    The first step of each batch size runs operation by operation, while it is also
    seen which memory the step needs; the second is recorded, then replayed. There is
    another graph for a smaller last batch, and one of several steps in a row. A graph
    is made anew when what it was recorded with changes: the precision, or where the
    parameters are.

    Notes
    -----
    A recorded kernel keeps its arguments, so a step must not depend on a number that
    Python computes. The learning rates of the whole run are a table on the device, and
    the order of the epoch is an index array; a counter there says how far both are. A
    step lays out the next one's batch before it updates, see :class:`~cycnn.ops.Feed`.
    """

    def __init__(self, trainer, loader):
        super().__init__(trainer, loader)
        device = loader.device
        self.ops = for_device(device)
        # a set that does not fit streams through a window, in the order of the epoch
        self.window = Window(loader) if loader.resident() is None else None
        self.held = self.window or loader.resident()
        self.preparation = loader.preparation
        dataset = loader.dataset
        # images that are their own targets have to be there for the loss, too
        self.made = not dataset.has_classes and dataset.own_images
        bytes_ = dataset.images.dtype == np.uint8
        self.gather = bytes_ and not self.made and self.preparation is None
        order = empty(len(dataset), "int32", device)
        # what an epoch draws its random numbers with, where recorded kernels find it
        self.key = None
        if self.preparation is not None:
            self.key = self.preparation.key_of(0)
        # the numbers of the epoch's images, where the order holds places of the window
        self.samples = None
        if self.window is not None and self.preparation is not None:
            self.samples = empty(len(dataset), "int32", device)
        self.feed = Feed(
            order=order,
            position=empty(2, "int32", device),
            # numbers are gathered by the step: any ints of this length do for labels
            classes=self.held.labels if dataset.has_classes else order,
            index=empty(loader.batch_size, "int32", device),
            labels=empty(loader.batch_size, "int32", device),
            rates=None,
            lr=None,
        )
        self.graphs = {}
        # filters in the form that kernels read, which each update writes as well
        self.packed = {}
        self.recorded_with = None

    def begin_epoch(self, tally, epoch, first, total):
        self._prepare()
        trainer, loader = self.trainer, self.loader
        self.tally = tally
        self.step, self.total = epoch * len(loader) + first, total
        done = first * loader.batch_size
        self.left = len(loader.dataset) - done
        now = self._signature()
        if now != self.recorded_with:
            self.graphs.clear()
            self.packed = self._pack_filters()
            self.recorded_with = now
        else:
            self.parameters_changed()
        rates = self.feed.rates
        if trainer.schedule is not None and rates is None:
            table = [trainer.scheduled_lrs(i, total) for i in range(total)]
            shape = total, *trainer.optimizer.lr_tensor.shape
            rates = np.array(table, np.float32).reshape(shape)
            rates = Tensor(rates, loader.device)
        self.feed = self.feed._replace(rates=rates, lr=trainer.optimizer.lr_tensor)
        self.feed.position.copy_(np.array([done, self.step], np.int32))
        if self.key is not None:
            self.key.copy_(self.preparation.key_of(epoch))
        if self.window is None:
            self.feed.order.copy_(loader.order(epoch))
        else:
            self.feed.order.copy_(self.window.order())
            self.window.begin(epoch, done)
            if self.samples is not None:
                self.samples.copy_(loader.order(epoch))
            self.window.reach(done, done + loader.batch_size)
        self.ops.begin_step(self.feed)

    def run_next(self, most=1):
        count, steps = min(self.loader.batch_size, self.left), 1
        if self.window is not None:
            # a step reads its own images, and lays out the labels of the next one
            done = len(self.loader.dataset) - self.left
            self.window.reach(done, done + 2 * count)
        elif min(most, self.left // count) >= _TOGETHER:
            steps = _TOGETHER
        graph = self.graphs.get((count, steps))
        if graph is None:
            graph = self.graphs[count, steps] = new_graph(self.loader.device)
            # with fused layers, the update adds up the parts of the gradients itself
            graph.keep = [self._partial_step(self.packed) for _ in range(steps)]
            graph.rehearse(lambda: self._whole_steps(count, graph.keep))
        else:
            if not graph.recorded:
                self._record(graph, count)
            graph.launch()
        for _ in range(steps):
            self.tally.count(count)
        self.left -= steps * count
        self.step += steps
        return steps

    def parameters_changed(self):
        for packed in self.packed.values():
            packed.refresh()

    def _pack_filters(self):
        if self._partial_step() is None:
            return {}
        images = self.loader.dataset.images.shape
        shape = min(self.loader.batch_size, images[0]), *images[1:]
        return self.objective.pack_filters(shape, self.gather)

    def _partial_step(self, packed=()):
        # the length of the gradient is known only once its parts are added up
        if not self.fused or self.trainer.clip_grad_norm is not None:
            return None
        return self.trainer.optimizer.partial_step(packed)

    def _record(self, graph, count):
        updates = graph.keep
        graph.record(lambda: self._whole_steps(count, updates, recording=True))
        for update in updates:
            if update is not None:
                update.upload()

    def end_epoch(self):
        if self.window is not None:
            self.window.end()
        trainer = self.trainer
        if trainer.schedule is None:
            return
        if self.step:
            # what the device read from the table, for whoever looks at optimizer.lr
            trainer.optimizer.lrs = trainer.scheduled_lrs(self.step - 1, self.total)
        # also where no step used what was laid out
        for group in trainer.optimizer.param_groups:
            self.ops.fill(group.lr_tensor, group.lr)

    def _whole_steps(self, count, updates, recording=False):
        for update in updates:
            self._whole_step(count, update, recording)

    def _whole_step(self, count, update, recording):
        dataset, feed = self.loader.dataset, self.feed
        images, labels = self._images(count), feed.labels[:count]
        if self.made and isinstance(images, fused.Gather):
            images = images.made()
        if not dataset.has_classes:
            labels = gather_targets(
                self.ops, dataset, self.held.labels, feed.index[:count], images
            )
        self._train(images, labels, update, recording, feed)

    def _images(self, count):
        """The images of a step, which the first layer may be left to make."""
        dataset, feed = self.loader.dataset, self.feed
        index = feed.index[:count]
        if self.preparation is None:
            return fused.Gather(self.held.images, index, dataset.scale, dataset.shift)
        samples = index
        if self.samples is not None:
            samples = self.ops.samples_of_step(
                self.samples, feed.position, feed.index.size, count
            )
        return self.preparation.batch(self.key, self.held.images, index, samples)

    def _signature(self):
        trainer = self.trainer
        places = [(run.data.ptr, run.data.size) for run in trainer.optimizer.runs]
        return get_precision(), places, trainer.model.training, id(self.tally)


def new_graph(device):
    """A graph for ``device``; on the CPU, a stand-in that runs the step again."""
    if not device.is_cuda:
        return _Rerun()
    from ..gpu.graph import Graph

    return Graph(device.index)


class _Rerun:
    """What a graph does, without one: shows on the CPU that a step replays."""

    keep = None
    recorded = False

    def rehearse(self, function):
        return function()

    def record(self, function):
        self.launch, self.recorded = function, True
