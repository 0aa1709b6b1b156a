"""The training loop: forward, loss, backward, update, and what to measure on the way.

Loss and hits are added up on the device. The host reads them at the end of an epoch,
and in between only for a progress bar, so that on a GPU it runs ahead and the device
is never idle.
"""

from __future__ import annotations

import contextlib
import logging
import math
import reprlib
import signal
import threading
import time

import numpy as np

from .. import random, shapes
from ..data import ArrayDataset, DataLoader, TargetDataset
from ..devices import CPU
from ..errors import DataError, ShapeError
from ..nn import LogSoftmax, Predictor, Sequential, Softmax, weights
from ..nn.arguments import count
from ..nn.inference import BATCH, turn
from ..nn.layer import Layer
from ..nn.loss import ClassLoss
from ..ops import for_device
from ..optim import EMA
from ..optim.optimizer import Optimizer, checked
from ..tensor import Tensor, zeros
from . import checkpoint
from .history import EpochRecord, History
from .progress import ProgressBar
from .steps import CapturedSteps, EagerSteps

_log = logging.getLogger("cycnn")


class Tally:
    """Loss and hits of many batches, added up on the device.

    A batch's loss is a mean, and every batch but the last has the same size. So the
    losses of full batches are summed as they are, the last one is kept apart, and the
    host weighs both when it reads them: one small operation a batch.

    What is added on the device (:meth:`add`) and what the host counts (:meth:`count`)
    are apart, since a replayed step does the first without Python.

    ``ignored`` is the label of images that do not count in the accuracy. No score is
    for it, so none of them is a hit, and the host divides by the others. (Where it is a
    class, they all count.)
    """

    def __init__(self, loader, ignored=None):
        device = loader.device
        self._ops = for_device(device)
        self._loader = loader
        self._batch_size = loader.batch_size
        # no classes: nothing is right or wrong, there is a loss alone
        self._classes = None
        # whose labels are not the ignored one; None: all
        self._labelled = None
        if loader.dataset.has_classes:
            labels = loader.dataset.labels
            labelled = np.ones(labels.shape, bool)
            if ignored is not None:
                labelled = labels != ignored
            self._classes = int(labels.max(initial=-1, where=labelled)) + 1
            if not labelled.all():
                self._ignored, self._labelled = ignored, labelled
        self._epoch = self._labelled_in_order = None
        self._loss_sum = zeros((), device=device)
        self._rest = zeros((), device=device)
        self._hits = zeros((), "int32", device)
        self._full = self._rest_count = 0

    def clear(self, epoch):
        """Begin an epoch."""
        self._epoch, self._labelled_in_order = epoch, None
        for tensor in (self._loss_sum, self._rest, self._hits):
            self._ops.fill(tensor, 0)
        self._full = self._rest_count = 0

    def check(self, scores):
        """DataError if there are labels that the model has no score for.

        The kernels of a GPU make such a loss NaN: they cannot raise.
        """
        if self._classes is not None and scores.shape[-1] < self._classes:
            raise DataError(
                f"the data set has labels up to {self._classes - 1}, and the model gives "
                f"{scores.shape[-1]} scores an image: it needs {self._classes}"
            )
        if self._labelled is not None and 0 <= self._ignored < scores.shape[-1]:
            # a class, which the device finds hits of
            self._labelled = None

    def add(self, losses, scores, labels, feed=None):
        """Add a batch on the device; ``losses``: its loss, or terms of which it is the
        mean. With a ``feed`` the next batch of a recorded step is laid out, too.
        """
        full = len(labels) == self._batch_size
        total = self._loss_sum if full else self._rest
        given = losses, scores, labels, total, self._hits
        if self._classes is None:
            given = losses, None, None, total, None
        if feed is None and self._classes is None:
            self._ops.add(total, losses, total)
        elif feed is None:
            self._ops.tally(*given)
        else:
            self._ops.end_step(*given, feed)

    def count(self, images):
        """Note that a batch of so many images was added."""
        if images == self._batch_size:
            self._full += 1
        else:
            self._rest_count = images

    def read(self):
        """Mean loss and share of hits so far. Waits for the device.

        The latter is None where there are no classes.
        """
        count = self._full * self._batch_size + self._rest_count
        classifies = self._classes is not None
        if not count:
            return float("nan"), float("nan") if classifies else None
        total = float(self._loss_sum) * self._batch_size
        if self._rest_count:
            total += float(self._rest) * self._rest_count
        if not classifies:
            return total / count, None
        judged = self._judged(count)
        return total / count, int(self._hits) / judged if judged else float("nan")

    def _judged(self, count):
        """How many of the epoch's first ``count`` images have a label."""
        labelled = self._labelled
        if labelled is None:
            return count
        if count < len(labelled):
            if self._labelled_in_order is None:
                order = self._loader.order(self._epoch, CPU).numpy()
                self._labelled_in_order = labelled[order]
            labelled = self._labelled_in_order[:count]
        return int(np.count_nonzero(labelled))

    def state(self) -> dict:
        """Everything, as numbers that JSON keeps exactly."""
        return {
            "loss_sum": float(self._loss_sum),
            "hits": int(self._hits),
            "full": self._full,
            "rest": float(self._rest),
            "rest_count": self._rest_count,
        }

    def restore(self, state: dict) -> None:
        self._loss_sum.copy_(np.float32(state["loss_sum"]))
        self._hits.copy_(np.int32(state["hits"]))
        self._rest.copy_(np.float32(state["rest"]))
        self._full, self._rest_count = state["full"], state["rest_count"]


class _InterruptGuard:
    """Makes Ctrl-C wait for the end of the training step that it falls into.

    Without it an interrupt between an update and the counting of that update would
    leave a state that is no step's, and a run resumed from it would end elsewhere. A
    second Ctrl-C does not wait. Off the main thread, or where the program handles
    SIGINT in its own way, the guard stands aside.
    """

    def __init__(self):
        self.in_step = False
        self._pending = False

    def __enter__(self):
        self._installed = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._installed:
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc_info):
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number, frame):
        if self.in_step and not self._pending:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def leave_step(self):
        self.in_step = False
        if self._pending:
            raise KeyboardInterrupt


# What trains or resumes at the moment: (trainer, model, thread). A step leaves
# activations in the layers and gradients in the parameters, so it takes one thread.
_under_way = []
_registry = threading.Lock()


@contextlib.contextmanager
def _training_alone(trainer):
    """A block in which no other thread trains the trainer's model.

    Raises
    ------
    RuntimeError
        If one does already, or the trainer's own fit is under way.
    """
    entry = trainer, trainer.model, threading.current_thread()
    with _registry:
        for other, model, thread in _under_way:
            own = thread is entry[2]
            # a thread that is not alive was left behind by a fork
            if thread.is_alive() and (
                other is trainer or (model is trainer.model and not own)
            ):
                where = "which this is called from" if own else f"in {thread.name}"
                raise RuntimeError(
                    f"a fit of this model is under way, {where}: a model is trained by "
                    f"one thread at a time. Wait until that fit has ended (stop() ends "
                    f"it after its epoch), or train a copy.deepcopy of the model with "
                    f"an optimizer and a Trainer of its own"
                )
        _under_way.append(entry)
    try:
        yield
    finally:
        with _registry:
            _under_way.remove(entry)


class Trainer:
    """Trains a classifier, or a model of numbers, and says how good it is.

    Parameters
    ----------
    model : nn.Layer
        Maps images (N, C, H, W) to scores (N, classes), or to numbers of the shape of
        a :class:`~cycnn.data.TargetDataset`'s targets. Training runs on the device
        that it is on.
    loss : nn.NLLLoss, nn.CrossEntropyLoss, nn.MSELoss ...
        Whatever fits the model's output: NLLLoss for a model that ends in LogSoftmax,
        CrossEntropyLoss for one that ends in plain scores; for numbers MSELoss, L1Loss,
        SmoothL1Loss or BCEWithLogitsLoss. The loss of an epoch is the mean of those of
        its batches, weighted by their images; NaN if a batch has none but images whose
        label is the loss's ``ignore_index``. Their labels count in no accuracy, unless
        they are a class.
    optimizer : optim.Optimizer
        Of the model's parameters, or of some of them. Its learning rate at this moment
        is the base that the schedule multiplies.
    schedule : callable, optional
        ``schedule(step, total_steps)`` gives the multiplier of the base learning rate
        at each step, both counted over the whole run. See ``optim.schedules``. None
        leaves the optimizer's learning rate alone.
    capture : bool, optional
        Record each training step as a CUDA graph and replay it, which gives the same
        numbers in a fraction of the time. Default: on a GPU. Layers of one's own must
        then do the same operations in every step, and not read results on the host.
    fuse : bool, optional
        Train with fused layers, see :func:`cycnn.nn.fuse`: the same results up to
        rounding, faster. Default: on a GPU.
    clip_grad_norm : float, optional
        The longest that the gradient of a step, of all parameters as one vector, may
        be: :meth:`cycnn.optim.Optimizer.clip_grad_norm`. Gradients are then summed
        ahead of the update, not in it.
    average : optim.EMA, optional
        Updated after each step. :meth:`fit` tests, and :meth:`evaluate`,
        :meth:`predict` and :meth:`predict_proba` compute, with its averages instead of
        the model's parameters.

    Attributes
    ----------
    history : History
        One record for every finished epoch; still there when :meth:`fit` ends early.
    epoch, step : int
        Finished epochs of the run, and finished steps of the epoch under way.
    epochs, steps_per_epoch : int
        What the last call of :meth:`fit` was asked for.
    seed : int or None
        What the order of the images depends on, together with the epoch.

    Notes
    -----
    A callback is a callable, called as ``callback(trainer, record)`` after every
    epoch, or an object with any of these methods::

        on_fit_start(trainer)           on_fit_end(trainer), however fit ends
        on_step_end(trainer)            on_epoch_end(trainer, record)

    It may call ``trainer.stop()``, ``trainer.save(path)``, ``trainer.running()``,
    :meth:`evaluate`, :meth:`predict` and :meth:`predict_proba`. So may other threads:
    they take turns with the steps. :meth:`fit` is for one thread at a time.
    """

    def __init__(
        self,
        model,
        loss,
        optimizer,
        schedule=None,
        capture=None,
        fuse=None,
        clip_grad_norm=None,
        average=None,
    ):
        _check_parts(model, loss, optimizer, schedule, average)
        if clip_grad_norm is not None:
            clip_grad_norm = checked("clip_grad_norm", clip_grad_norm, positive=True)
        self.clip_grad_norm = clip_grad_norm
        self.average = average
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.capture = capture
        self.fuse = fuse
        self.base_lrs = optimizer.lrs
        self.history = History()
        self.epoch = self.step = 0
        self.epochs = self.steps_per_epoch = 0
        self.seed = None
        # What the order of batches depends on, kept while an epoch is under way.
        self._order = None
        # Loss and hits of the epoch under way; and the same of an epoch that was saved
        # or interrupted, as numbers, until it goes on.
        self._tally = None
        self._partial = None
        self._seconds = 0.0
        self._started = None
        self._stopped = False

    @property
    def base_lr(self) -> float:
        """What the schedule multiplies; of several groups, the first one's."""
        return self.base_lrs[0]

    def scheduled_lrs(self, step, total_steps) -> list:
        """The learning rate of each group of parameters at a step of the run."""
        factor = self.schedule(step, total_steps)
        return [base * factor for base in self.base_lrs]

    # training

    def fit(
        self,
        train,
        epochs,
        batch_size,
        *,
        shuffle=True,
        seed=None,
        test=None,
        augment=None,
        callbacks=(),
        progress=False,
    ) -> History:
        """Train until the run has ``epochs`` epochs.

        Epochs done earlier count: after an interrupt or :meth:`resume`, the same call
        carries on where the run stood, and after ``fit(..., epochs=3)`` a call with
        ``epochs=5`` adds two.

        Parameters
        ----------
        train : data.ArrayDataset
            Or a :class:`~cycnn.data.TargetDataset`, for a loss of numbers.
        epochs : int
            Epochs of the whole run; the schedule spans them all.
        batch_size : int
            Images a step. The last batch of an epoch holds what is left.
        shuffle : bool
            Whether each epoch has an order of its own. It depends on the seed and the
            epoch alone.
        seed : int, optional
            Seed of the order. Default: the run's own, drawn from
            :func:`cycnn.manual_seed`'s generator when the run starts.
        test : data.ArrayDataset, optional
            Evaluated after every epoch.
        augment : data.Augment, optional
            What happens to the training images at random. Nothing ever happens to those
            of ``test``, nor in :meth:`evaluate` and :meth:`predict`.
        callbacks : sequence
            See the class's notes.
        progress : bool
            Show a :class:`ProgressBar`.

        Returns
        -------
        History
            The run's, which is also ``trainer.history``.

        Raises
        ------
        ValueError
            For an empty training set, numbers that make no sense, an optimizer that
            holds none of the model's parameters, or an order of batches or an
            ``augment`` that contradicts the epoch under way.
        TypeError
            If ``epochs`` or ``batch_size`` is no integer.
        RuntimeError
            At once, if another thread trains the model, or a callback calls this. The
            fit under way goes on.
        KeyboardInterrupt
            Ctrl-C, once the step under way is complete. ``history``, :meth:`save` and
            another :meth:`fit` work afterwards.
        """
        epochs = count(epochs, "fit", "epochs")
        batch_size = count(batch_size, "fit", "batch_size")
        # somebody may have given the trainer, or a layer, another part since
        _check_parts(
            self.model, self.loss, self.optimizer, self.schedule, self.average
        )
        if len(train) == 0:
            raise ValueError("the training set is empty")
        self._check_targets(train)
        if test is not None:
            self._check_targets(test)
        with _training_alone(self):
            if seed is None:
                seed = self.seed if self.seed is not None else random.draw_seed()
            device = self.model.device
            loader = DataLoader(
                train,
                batch_size,
                shuffle=shuffle,
                seed=seed,
                device=device,
                augment=augment,
            )
            test_loader = None
            if test is not None:
                test_loader = DataLoader(test, BATCH, device=device)
            with turn:
                self._check_order(seed, bool(shuffle), batch_size, len(train), augment)
                self.seed = seed
                if self.step:
                    # an interrupted epoch; the model may have moved since
                    self._partial = self._tally_state()
                self.epochs, self.steps_per_epoch = epochs, len(loader)
                self._tally = Tally(loader, self._ignored(train))
                steps = self._steps(loader)
            self._stopped = False
            if self.epoch >= epochs:
                _log.warning(
                    "nothing to train: the run has %d epochs already and was asked for "
                    "%d",
                    self.epoch,
                    epochs,
                )
            callbacks = [*callbacks, *([ProgressBar()] if progress else [])]
            _notify(callbacks, "on_fit_start", self)
            try:
                with _InterruptGuard() as guard:
                    while self.epoch < epochs and not self._stopped:
                        self._run_epoch(steps, callbacks, guard)
                        self._finish_epoch(len(train), test_loader, callbacks, guard)
            finally:
                self._pause_clock()
                _notify(callbacks, "on_fit_end", self)
        return self.history

    def stop(self) -> None:
        """Let :meth:`fit` end after the epoch under way. For callbacks."""
        self._stopped = True

    def running(self) -> dict:
        """Loss, accuracy and images per second of the epoch so far.

        On a GPU this waits for the steps that are under way. In a callback at the end
        of a step; there is no such epoch outside of :meth:`fit`.
        """
        if not self.step:
            raise RuntimeError("no epoch is under way")
        with turn:
            loss, accuracy = self._tally.read()
        images = min(self.step * self._order["batch_size"], self._order["images"])
        return {
            "loss": loss,
            "accuracy": accuracy,
            "images_per_second": images / self._elapsed(),
        }

    def _check_targets(self, dataset):
        # a fused kernel would take the bits of numbers for class indices
        if isinstance(dataset, TargetDataset) and isinstance(self.loss, ClassLoss):
            raise TypeError(
                f"{self.loss!r} is of class indices, {dataset!r} has numbers: give an "
                f"ArrayDataset, or a loss of numbers such as MSELoss"
            )
        ignored = dataset.ignore_index
        if ignored is None or not isinstance(self.loss, ClassLoss):
            return
        if self.loss.ignore_index != ignored and (dataset.labels == ignored).any():
            raise DataError(
                f"{dataset!r} has images to ignore, of label {ignored}, which "
                f"{self.loss!r} does not: give it ignore_index={ignored}"
            )

    def _ignored(self, dataset):
        """The label of images that do not count, or None."""
        if dataset.ignore_index is not None:
            return dataset.ignore_index
        return getattr(self.loss, "ignore_index", None)

    def _check_order(self, seed, shuffle, batch_size, images, augment):
        order = {
            "seed": seed,
            "shuffle": shuffle,
            "batch_size": batch_size,
            "images": images,
            "augment": None if augment is None else repr(augment),
        }
        if self.step:
            for name, value in order.items():
                # older checkpoints do not say how images were augmented
                if value != self._order.get(name, value):
                    raise ValueError(
                        f"epoch {self.epoch + 1} is under way with {name} "
                        f"{self._order[name]}, so it cannot go on with {value}"
                    )
        self._order = order

    def _steps(self, loader):
        capture = self.capture
        if capture is None:
            capture = loader.device.is_cuda
        if capture:
            return CapturedSteps(self, loader)
        return EagerSteps(self, loader)

    def _tally_state(self):
        """Loss and hits of an epoch that is under way, as numbers."""
        if self._partial is not None:
            return self._partial
        return self._tally.state() if self.step else None

    def _run_epoch(self, steps, callbacks, guard):
        watchers = [c for c in callbacks if hasattr(c, "on_step_end")]
        meddling = any(type(watcher) is not ProgressBar for watcher in watchers)
        self._started = time.perf_counter()
        total = self.epochs * self.steps_per_epoch
        with turn:
            # a prediction leaves the mode as it met it
            self.model.train()
            tally = self._tally
            tally.clear(self.epoch)
            if self._partial is not None:
                tally.restore(self._partial)
                self._partial = None
            steps.begin_epoch(tally, self.epoch, self.step, total)
        try:
            while self.step < self.steps_per_epoch:
                guard.in_step = True
                left = self.steps_per_epoch - self.step
                with turn:
                    self.step += steps.run_next(1 if meddling else left)
                guard.leave_step()
                for watcher in watchers:
                    watcher.on_step_end(self)
                if meddling:
                    with turn:
                        steps.parameters_changed()
        finally:
            with turn:
                steps.end_epoch()

    def _finish_epoch(self, images, test_loader, callbacks, guard):
        with turn:
            loss, accuracy = self._tally.read()
        self._pause_clock()
        if not math.isfinite(loss):
            _log.warning(
                "epoch %d: the loss is %s; try a smaller learning rate, and look for "
                "NaN in the data",
                self.epoch + 1,
                loss,
            )
        seconds = self._seconds
        test = {"loss": None, "accuracy": None}
        if test_loader is not None:
            test = self._evaluate(test_loader)
        record = EpochRecord(
            epoch=self.epoch + 1,
            loss=loss,
            accuracy=accuracy,
            lr=self.optimizer.lr,
            seconds=seconds,
            images_per_second=images / seconds,
            test_loss=test["loss"],
            test_accuracy=test["accuracy"],
        )
        guard.in_step = True  # all of this, or none
        with turn:
            self.history.append(record)
            self.epoch += 1
            self.step = 0
            self._seconds = 0.0
        guard.leave_step()
        _notify(callbacks, "on_epoch_end", self, record)

    def _elapsed(self) -> float:
        """Seconds of training in the epoch under way, pauses left out."""
        started = self._started  # which fit may set to None in another thread
        running = 0.0 if started is None else time.perf_counter() - started
        return self._seconds + running

    def _pause_clock(self):
        self._seconds, self._started = self._elapsed(), None

    # using the model

    def evaluate(self, dataset, batch_size=BATCH) -> dict:
        """Mean loss and accuracy over a data set.

        Parameters
        ----------
        dataset : data.ArrayDataset
        batch_size : int
            Images that run at a time.

        Returns
        -------
        dict
            ``{"loss": float, "accuracy": float}``, accuracy from 0 to 1, or None for a
            :class:`~cycnn.data.TargetDataset`; NaN for an empty set.
        """
        self._check_targets(dataset)
        return self._evaluate(DataLoader(dataset, batch_size, device=self.model.device))

    def _evaluate(self, loader):
        with self._averaged():
            tally = Tally(loader, self._ignored(loader.dataset))
            predictor = self._predictor()
            for images, labels in loader:
                scores = predictor.scores(images, loader.batch_size)
                tally.check(scores)
                tally.add(self.loss(scores, labels), scores, labels)
                tally.count(len(labels))
            loss, accuracy = tally.read()
        return {"loss": loss, "accuracy": accuracy}

    def predict(self, images) -> np.ndarray:
        """The class of each image: int32, shape (N,).

        Parameters
        ----------
        images : ndarray, Tensor or data.ArrayDataset
            Shape (N, C, H, W). A dataset is scaled and shifted as it says. An array
            or tensor is taken as it is: floating-point numbers on the scale that the
            model was trained on.

        Notes
        -----
        As in NumPy's argmax, NaN counts as the largest score: an image that the model
        gives nothing but NaN for gets class 0. :meth:`predict_proba` shows the NaN.
        """
        parts = []
        with self._averaged():
            for scores in self._outputs(images):
                if isinstance(scores, Tensor):
                    parts.append(for_device(scores.device).argmax(scores))
                else:
                    shapes.check_scores("the model's output", scores.shape)
                    parts.append(scores.argmax(1).astype(np.int32))
        if not parts:
            return np.empty(0, np.int32)
        return np.concatenate([np.asarray(part) for part in parts])

    def predict_proba(self, images) -> np.ndarray:
        """The probability of each class for each image: float32, shape (N, classes).

        These are the output of a model that ends in Softmax, the exponentials of that
        of one that ends in LogSoftmax, and the softmax of that of any other.

        Parameters
        ----------
        images : ndarray, Tensor or data.ArrayDataset
            As for :meth:`predict`, at least one image.
        """
        device, last = self.model.device, _last_layer(self.model)
        parts = []
        with self._averaged():
            for scores in self._outputs(images):
                if isinstance(last, Softmax):
                    parts.append(np.array(scores))
                    continue
                if not isinstance(last, LogSoftmax):
                    ops = for_device(device)
                    scores = ops.log_softmax_forward(Tensor(scores, device))
                parts.append(np.exp(np.asarray(scores)))
        if not parts:
            raise ShapeError("predict_proba needs at least one image, got none")
        return np.concatenate(parts)

    @contextlib.contextmanager
    def _averaged(self):
        """A block in which the model has the averages, if there are any.

        No other thread takes a step within it: all batches meet the same parameters.
        """
        with turn:
            if self.average is None or self.average.is_applied:
                yield
            else:
                with self.average.applied():
                    yield

    def _predictor(self):
        if self.fuse is False or self.capture is False:
            return Predictor(self.model, self.fuse, self.capture)
        return self.model._own_predictor()  # these are its defaults

    def _outputs(self, images):
        """The model's output for images, in evaluation mode: an array or Tensors."""
        predictor = self._predictor()
        if isinstance(images, ArrayDataset):
            for batch, _ in DataLoader(images, BATCH, device=self.model.device):
                yield predictor.scores(batch)
            return
        if not isinstance(images, Tensor):
            images = np.asarray(images)
            if images.dtype.kind != "f":
                images = Tensor(images, self.model.device)  # which the layers refuse
        elif images.device != self.model.device:
            images = images.to(self.model.device)
        if len(images):
            yield predictor.scores(images)

    # checkpoints

    def save(self, path) -> None:
        """Write the whole run to one file, from which it can go on exactly.

        The file (safetensors) holds parameters, optimizer state, position, seed and
        history. It is written beside ``path`` and renamed, so that an interrupted save
        leaves the old file whole. Called by another thread during :meth:`fit`, it is
        the state between two steps.
        """
        with turn:
            state = {
                "epoch": self.epoch,
                "step": self.step,
                "seed": self.seed,
                "base_lr": self.base_lrs if len(self.base_lrs) > 1 else self.base_lr,
                "seconds": self._elapsed(),
                "order": self._order,
                "tally": self._tally_state(),
                "history": self.history.to_list(),
            }
            parts = self.model, self.loss, self.optimizer, self.schedule
            content = checkpoint.packed(*parts, state, self.average)
        # nobody waits for the disk
        weights.write(path, *content)

    @classmethod
    def resume(
        cls,
        path,
        model,
        loss,
        optimizer,
        schedule=None,
        capture=None,
        fuse=None,
        clip_grad_norm=None,
        average=None,
    ) -> Trainer:
        """A trainer that goes on where the saved one stood.

        Parameters
        ----------
        path : path of a file that :meth:`save` wrote
        model, loss, optimizer, schedule, capture, fuse, clip_grad_norm, average
            Made as for the saved run. Parameters, optimizer state and averages are
            overwritten by those of the file.

        Returns
        -------
        Trainer
            Call :meth:`fit` as for the whole run; on the same kind of device it ends
            with the same bits as a run that was never interrupted.

        Raises
        ------
        DataError
            If the file is no checkpoint, is damaged, or was made by another model,
            loss, optimizer or schedule; the message names the first difference. Nothing
            is changed then. Layers and losses of the library are compared with their
            settings, those of one's own by the name of their class.
        RuntimeError
            If another thread trains the model.
        FileNotFoundError
        """
        trainer = cls(
            model, loss, optimizer, schedule, capture, fuse, clip_grad_norm, average
        )
        with _training_alone(trainer):
            state = checkpoint.load(path, model, loss, optimizer, schedule, average)
        trainer.epoch = state["epoch"]
        trainer.step = state["step"]
        trainer.seed = state["seed"]
        base = state["base_lr"]
        trainer.base_lrs = base if isinstance(base, list) else [base]
        trainer.history = History.from_list(state["history"])
        trainer._seconds = state["seconds"]
        trainer._order = state["order"]
        trainer._partial = state["tally"]
        return trainer


def _notify(callbacks, event, *args):
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(*args)
        elif event == "on_epoch_end" and callable(callback):
            callback(*args)


def _check_parts(model, loss, optimizer, schedule, average) -> None:
    """TypeError or ValueError if they are not what a Trainer is made of."""
    for name, value, wanted, fits in (
        ("model", model, "an nn.Layer", isinstance(model, Layer)),
        (
            "loss",
            loss,
            "a loss such as nn.CrossEntropyLoss()",
            callable(loss) and callable(getattr(loss, "backward", None)),
        ),
        (
            "optimizer",
            optimizer,
            "an optim.Optimizer such as optim.Adam(model.parameters())",
            isinstance(optimizer, Optimizer),
        ),
        (
            "schedule",
            schedule,
            "None or schedule(step, total_steps)",
            schedule is None or callable(schedule),
        ),
        (
            "average",
            average,
            "None or an optim.EMA",
            average is None or isinstance(average, EMA),
        ),
    ):
        if isinstance(value, type):
            raise TypeError(
                f"{name} is the class {value.__name__}: write {value.__name__}(...)"
            )
        if not fits:
            raise TypeError(f"{name} must be {wanted}, got {reprlib.repr(value)}")
    own = {id(parameter) for _, parameter in model._walk()}
    for name, holder in (("optimizer", optimizer), ("average", average)):
        # some are enough: the others may be of a loss that learns
        if holder is not None and own.isdisjoint(map(id, holder._params)):
            raise ValueError(
                f"the {name} holds none of the model's parameters, so it would do "
                f"nothing: {holder!r}. Make it of model.parameters() of the model that "
                f"the Trainer is given (a copy has parameters of its own)"
            )


def _ends_in_log_softmax(model) -> bool:
    return isinstance(_last_layer(model), LogSoftmax)


def _last_layer(model):
    while isinstance(model, Sequential) and len(model):
        model = model[-1]
    return model
