"""A scikit-learn classifier: :class:`cycnn.Trainer` behind ``fit`` and ``predict``.

Needs the package scikit-learn (the extra ``cycnn[sklearn]``), which is imported with
this module and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np

try:
    # the package: an import is absolute, although this module has the same name
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"cycnn.sklearn needs scikit-learn 1.6 or newer ({error}): "
        f"pip install 'cycnn[sklearn]'"
    ) from error

from . import nn, optim, random
from .data import ArrayDataset
from .devices import CPU
from .devices import device as as_device
from .errors import CudaError, ShapeError
from .train import Trainer
from .train.trainer import _ends_in_log_softmax

_DTYPES = (np.float32, np.uint8)  # what is kept; all else becomes the first
_OPTIMIZERS = {"rmsprop": optim.RMSprop, "sgd": optim.SGD}
_SCHEDULES = {
    name: getattr(optim.schedules, name)() for name in ("linear", "cosine", "constant")
}


def default_network(image_shape, classes):
    """The network of a :class:`CNNClassifier` that is given none.

    As often as the image can be halved and keeps two rows and columns: a 3x3
    convolution (32 channels, then 64, then 128), ReLU, max pooling. Then two Linear
    layers with 128 numbers in between. Vectors, and images too small to be halved,
    have these two layers only.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W), or (F,) for vectors.
    classes : int

    Returns
    -------
    nn.Sequential
    """
    layers = []
    if len(image_shape) == 3:
        channels, height, width = image_shape
        made = 32
        while min(height, width) >= 4:
            conv = nn.Conv2d(channels, made, 3, padding=1)
            layers += [conv, nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = made, height // 2, width // 2
            made = min(2 * made, 128)
        layers.append(nn.Flatten())
        image_shape = channels, height, width
    layers += [nn.Linear(math.prod(image_shape), 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, classes))


class CNNClassifier(ClassifierMixin, BaseEstimator):
    """A convolutional network as a scikit-learn classifier.

    Images are arrays (N, C, H, W), (N, H, W) with one channel, or flat rows
    (N, C H W). Those of dtype uint8 are divided by 255; all other numbers are taken as
    they are, in float32.

    Parameters
    ----------
    network : None, callable or nn.Layer
        None is :func:`default_network`. ``network(image_shape, classes)`` makes a new
        model, from images to one score for each class. A Layer is copied, and each
        training begins with the weights that it has.
    image_shape : None or tuple of int
        (C, H, W) or (H, W) of the images that flat rows stand for; (F,) if they are
        vectors and no images. None takes rows whose length is a square for square
        images of one channel, and others for vectors.
    epochs : int
        Of each :meth:`fit`.
    batch_size : int
    optimizer : {"rmsprop", "sgd"}
    learning_rate, momentum, weight_decay : float
        As :class:`cycnn.optim.RMSprop` and :class:`cycnn.optim.SGD` describe them.
    schedule : {"linear", "cosine", "constant"} or callable
        How the learning rate changes during :meth:`fit`; see ``optim.schedules``.
    device : None or str
        None is the first usable GPU, else the CPU.
    random_state : None, int or RandomState
        What the first weights and the order of the images depend on. The same integer
        gives the same bits on the same device.
    verbose : int
        Other than 0: show a progress bar.
    warm_start : bool
        Let :meth:`fit` begin with the weights of the fit before.

    Attributes
    ----------
    classes_ : ndarray
        The labels, sorted.
    n_features_in_ : int
        Numbers in an image.
    feature_names_in_ : ndarray of str
        Where X was a data frame.
    image_shape_ : tuple of int
        (C, H, W), or (F,) for vectors.
    model_ : nn.Layer
        The trained network. It gives scores or logarithms of probabilities.
    loss_curve_ : list of float
        Mean loss of each epoch.
    n_iter_ : int
        Epochs of training that the weights have seen.

    Notes
    -----
    A pickle holds all weights as arrays in host memory: what was fitted on a GPU can
    be loaded where there is none. :meth:`partial_fit` goes on after loading as it
    would have before.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from cycnn.sklearn import CNNClassifier
    >>> X, y = load_digits(return_X_y=True)      # 1797 images as rows of 64 numbers
    >>> model = CNNClassifier(batch_size=32, random_state=0).fit(X[::2], y[::2])
    >>> model.score(X[1::2], y[1::2]) > 0.95
    True
    """

    def __init__(
        self,
        network=None,
        image_shape=None,
        *,
        epochs=10,
        batch_size=128,
        optimizer="rmsprop",
        learning_rate=1e-3,
        momentum=0.0,
        weight_decay=0.0,
        schedule="linear",
        device=None,
        random_state=None,
        verbose=0,
        warm_start=False,
    ):
        self.network = network
        self.image_shape = image_shape
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    def fit(self, X, y):
        """Train for ``epochs`` epochs; returns the classifier.

        Parameters
        ----------
        X : array_like, shape (N, F), (N, H, W) or (N, C, H, W)
        y : array_like, shape (N,)
            Labels of any kind: integers, strings.
        """
        first = not (self.warm_start and hasattr(self, "n_iter_"))
        X, y = self._validated(X, y, first)
        if first:
            self._start(np.unique(y))
        self._optimizer = self._new_optimizer()
        schedule = self.schedule
        if not callable(schedule):
            schedule = _choice("schedule", schedule, _SCHEDULES)
        return self._train(X, y, self.epochs, schedule)

    def partial_fit(self, X, y, classes=None):
        """Train for one more epoch, without a schedule; returns the classifier.

        Parameters
        ----------
        X, y : array_like
            As for :meth:`fit`.
        classes : array_like, optional
            All labels that there will be; needed in the first call.
        """
        first = not hasattr(self, "n_iter_")
        if first and classes is None:
            raise ValueError("the first call of partial_fit needs classes")
        if classes is not None:
            classes = np.unique(classes)
            if not first and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes are {classes}, they were {self.classes_} before"
                )
        X, y = self._validated(X, y, first)
        if first:
            self._start(classes)
            self._optimizer = self._new_optimizer()
        return self._train(X, y, 1, None)

    def predict(self, X):
        """The label of each image: shape (N,)."""
        best = self._scores(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X):
        """The probability of each class, in the order of ``classes_``: (N, classes)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X):
        """The logarithm of :meth:`predict_proba`."""
        # Log-softmax, which leaves logarithms of probabilities as they are. In double
        # precision: probabilities down to 1e-308 do not become 0.
        scores = self._scores(X).astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    def _scores(self, X):
        check_is_fitted(self, "n_iter_")
        images = self._validated(X)
        if images.dtype == np.uint8:
            images = np.multiply(images, 1 / 255, dtype=np.float32)
        return np.asarray(self.model_.predict(images))

    def _validated(self, X, y="no_validation", reset=False):
        """Images in the shape that the network takes; with labels, if there are any."""
        shape = None
        if isinstance(X, (list, tuple)):
            X = np.asarray(X)
        if getattr(X, "ndim", 2) > 2:
            X = check_array(X, dtype=_DTYPES, allow_nd=True, ensure_all_finite=False)
            shape = X.shape[1:] if X.ndim > 3 else (1, *X.shape[1:])
            X = X.reshape(len(X), -1)
        found = validate_data(self, X, y, dtype=_DTYPES, reset=reset)
        rows, *labels = found if isinstance(found, tuple) else (found,)
        if reset:
            self.image_shape_ = self._find_image_shape(shape)
        if shape not in (None, self.image_shape_):
            raise ShapeError(
                f"images of shape {shape} are given, expected {self.image_shape_}"
            )
        images = rows.reshape(-1, *self.image_shape_)
        if not labels:
            return images
        check_classification_targets(labels[0])
        return images, labels[0]

    def _find_image_shape(self, given):
        """The shape of images; ``given`` is that of X, None if it has flat rows."""
        features = self.n_features_in_
        if self.image_shape is None:
            side = math.isqrt(features)
            square = side * side == features
            found = given or ((1, side, side) if square else (features,))
        else:
            found = tuple(self.image_shape)
            if len(found) == 2:
                found = 1, *found
        if len(found) not in (1, 3) or math.prod(found) != features:
            raise ShapeError(
                f"an image of X is {features} numbers, expected the shape (C, H, W), "
                f"(H, W) or (F,) of as many: got {found}"
            )
        return found

    def _start(self, classes):
        """Make the model."""
        self._random = check_random_state(self.random_state)
        with random.seeded(self._draw_seed()):
            if isinstance(self.network, nn.Layer):
                model = copy.deepcopy(self.network)
            else:
                make = default_network if self.network is None else self.network
                model = make(self.image_shape_, len(classes))
        if not isinstance(model, nn.Layer):
            raise TypeError(f"network must be or make an nn.Layer, got {model!r}")
        model.to(as_device(self.device))
        shape = model.predict(np.zeros((1, *self.image_shape_), np.float32)).shape
        if shape != (1, len(classes)):
            raise ShapeError(
                f"the network gives {shape} for one image, there are {len(classes)} "
                f"classes: expected {(1, len(classes))}"
            )
        self.model_, self.classes_, self.loss_curve_ = model, classes, []

    def _new_optimizer(self):
        return _choice("optimizer", self.optimizer, _OPTIMIZERS)(
            self.model_.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def _draw_seed(self):
        return int(self._random.randint(2**31 - 1))

    def _train(self, X, y, epochs, schedule):
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y has labels that are not in classes: {unknown}")
        scale = 1 / 255 if X.dtype == np.uint8 else 1.0
        dataset = ArrayDataset(X, np.searchsorted(self.classes_, y), scale)
        loss = nn.CrossEntropyLoss()
        if _ends_in_log_softmax(self.model_):
            loss = nn.NLLLoss()
        # the fit before may have left it near 0, and set_params may have changed it
        self._optimizer.lr = self.learning_rate
        trainer = Trainer(self.model_, loss, self._optimizer, schedule)
        seed, progress = self._draw_seed(), bool(self.verbose)
        trainer.fit(dataset, epochs, self.batch_size, seed=seed, progress=progress)
        self.loss_curve_ += trainer.history["loss"]
        self.n_iter_ = len(self.loss_curve_)
        return self

    def __getstate__(self):
        state = dict(super().__getstate__())
        for name in ("network", "model_"):
            layer = state.get(name)
            if isinstance(layer, nn.Layer) and layer.device != CPU:
                state[name] = copy.deepcopy(layer).to(CPU)
        if "_optimizer" in state:
            state["_optimizer"] = self._optimizer.state_dict()
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_optimizer" not in state:
            return
        with contextlib.suppress(CudaError):  # if there is none it stays on the CPU
            self.model_.to(as_device(self.device))
        saved = state["_optimizer"]
        make = _OPTIMIZERS[saved["type"].lower()]
        self._optimizer = make(self.model_.parameters(), lr=saved["lr"])
        self._optimizer.load_state_dict(saved)


def _choice(name, value, known):
    """What a parameter names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]
