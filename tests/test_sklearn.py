"""CNNClassifier under scikit-learn's own checks, and with scikit-learn's tools."""

import doctest
import io
import pickle

import numpy as np
import pytest

import cycnn
from cycnn import devices, nn, optim, random

pytest.importorskip("sklearn")

from joblib import parallel_config
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from cycnn.sklearn import CNNClassifier, default_network


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small gain nothing from a second thread, and lose if it has to wait."""
    with threadpool_limits(1, "openmp"):
        yield


def classifier(**settings):
    return CNNClassifier(**{"device": "cpu", "random_state": 0, **settings})


@parametrize_with_checks(
    [
        classifier(epochs=15, batch_size=16),
        classifier(
            epochs=15, batch_size=16, optimizer="sgd", learning_rate=0.03, momentum=0.9
        ),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    """8x8 images, 0 to 16, as rows: for training, for testing, and their labels."""
    X, y = load_digits(return_X_y=True)
    return train_test_split(X, y, random_state=0, stratify=y)


@pytest.fixture(scope="module")
def images():
    """uint8 images (N, 3, 6, 5), whose bright channel is their class of three."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    X = rng.integers(0, 100, (60, 3, 6, 5))
    X[np.arange(60), y] += 100
    return X.astype(np.uint8), y


def same_weights(one, other):
    state, expected = one.model_.state_dict(), other.model_.state_dict()
    assert state.keys() == expected.keys()
    return all(np.array_equal(state[name], expected[name]) for name in state)


# With scikit-learn's tools


def test_digits_in_a_pipeline(digits):
    X, X_test, y, y_test = digits
    pipeline = make_pipeline(StandardScaler(), classifier(epochs=8, batch_size=32))
    pipeline.fit(X, y)
    fitted = pipeline[-1]
    assert pipeline.score(X_test, y_test) > 0.95
    assert fitted.image_shape_ == (1, 8, 8) and fitted.n_features_in_ == 64
    assert fitted.n_iter_ == len(fitted.loss_curve_) == 8
    assert fitted.loss_curve_[-1] < 0.1 * fitted.loss_curve_[0]


def test_a_grid_search_over_the_learning_rate(digits):
    X, _, y, _ = digits
    grid = {"learning_rate": [1e-6, 3e-3], "optimizer": ["rmsprop", "sgd"]}
    search = GridSearchCV(classifier(epochs=2, batch_size=32), grid, cv=2)
    search.fit(X[:600], y[:600])
    assert search.best_params_ == {"learning_rate": 3e-3, "optimizer": "rmsprop"}
    assert search.best_score_ > 0.6


def test_threads_train_the_same(digits):
    X, _, y, _ = digits
    grid = {"learning_rate": [1e-3, 2e-3, 3e-3]}
    scores = []
    for jobs in (1, 3):
        search = GridSearchCV(
            classifier(epochs=1, batch_size=32), grid, cv=2, n_jobs=jobs
        )
        with parallel_config("threading"):
            search.fit(X[:200], y[:200])
        scores.append(search.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("kind", ["none", "function", "layer"])
def test_clone_takes_the_parameters_and_nothing_learnt(kind):
    networks = {"function": default_network, "layer": nn.Sequential(nn.Linear(4, 2))}
    network = networks.get(kind)
    model = classifier(network=network, image_shape=(4,), learning_rate=0.1, epochs=1)
    model.fit(np.eye(4), [0, 1, 0, 1])
    copy = clone(model)
    assert not hasattr(copy, "model_")
    assert repr(copy) == repr(model)
    assert same_weights(copy.fit(np.eye(4), [0, 1, 0, 1]), model)


# Labels and probabilities


def test_labels_may_be_strings(images):
    X, y = images
    names = np.array(["red", "green", "blue"])
    model = classifier(epochs=20, batch_size=10).fit(X, names[y])
    assert list(model.classes_) == ["blue", "green", "red"]
    assert (model.predict(X) == names[y]).mean() > 0.9
    numbers = classifier(epochs=20, batch_size=10).fit(X, 2 - y)
    np.testing.assert_array_equal(numbers.predict_proba(X), model.predict_proba(X))


def test_probabilities(images):
    X, y = images
    plain, logs = (
        classifier(
            network=nn.Sequential(nn.Flatten(), nn.Linear(90, 3), *last), epochs=2
        )
        for last in ([], [nn.LogSoftmax()])
    )
    logs.network[1].load_state_dict(plain.network[1].state_dict())
    proba = plain.fit(X, y).predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(proba), plain.predict_log_proba(X))
    np.testing.assert_allclose(logs.fit(X, y).predict_proba(X), proba, rtol=1e-4)
    np.testing.assert_array_equal(plain.predict(X), proba.argmax(axis=1))


def test_probabilities_close_to_zero_keep_their_logarithm():
    network = nn.Sequential(nn.Linear(2, 2))
    network.load_state_dict({"0.weight": 300 * np.eye(2), "0.bias": np.zeros(2)})
    model = classifier(network=network, image_shape=(2,), learning_rate=0.0)
    log_proba = model.fit(np.eye(2), [0, 1]).predict_log_proba(np.eye(2))
    np.testing.assert_allclose(log_proba, [[0, -300], [-300, 0]], atol=1e-9)
    assert (model.predict_proba(np.eye(2)) > 0).all()


# Images


def test_uint8_is_scaled_and_floats_are_not(images):
    X, y = images
    model = classifier(epochs=2).fit(X, y)
    floats = classifier(epochs=2).fit(X / 255, y)
    np.testing.assert_allclose(
        model.predict_proba(X), floats.predict_proba(X / 255), rtol=1e-4
    )
    np.testing.assert_allclose(
        model.predict_proba(X), model.predict_proba(X / 255), rtol=1e-4
    )
    assert not np.allclose(model.predict_proba(X), model.predict_proba(X.astype(float)))


def test_rows_and_images_are_the_same_to_a_fitted_classifier(images):
    X, y = images
    rows = X.reshape(60, 90)
    model = classifier(epochs=2).fit(X, y)
    assert model.image_shape_ == (3, 6, 5) and model.n_features_in_ == 90
    of_rows = classifier(epochs=2, image_shape=(3, 6, 5)).fit(rows, y)
    assert same_weights(model, of_rows)
    for given in (rows, X, list(X)):
        np.testing.assert_array_equal(
            model.predict_proba(given), of_rows.predict_proba(X)
        )


@pytest.mark.parametrize(
    "shape, image_shape, found",
    [
        ((9, 16), None, (1, 4, 4)),
        ((9, 15), None, (15,)),
        ((9, 16), (16,), (16,)),
        ((9, 16), (2, 8), (1, 2, 8)),
        ((9, 16), [4, 2, 2], (4, 2, 2)),
        ((9, 5, 3), None, (1, 5, 3)),
        ((9, 5, 3), (5, 3), (1, 5, 3)),
        ((9, 2, 5, 3), None, (2, 5, 3)),
        ((9, 1), None, (1, 1, 1)),
    ],
)
def test_the_shape_of_images(shape, image_shape, found):
    X = np.random.default_rng(0).normal(size=shape)
    model = classifier(image_shape=image_shape, epochs=1).fit(X, np.arange(9) % 2)
    assert model.image_shape_ == found
    assert model.predict(X).shape == (9,)


@pytest.mark.parametrize(
    "shape, image_shape, message",
    [
        ((9, 16), (3, 3), r"16 numbers, .* got \(1, 3, 3\)"),
        (
            (9, 4, 2, 2),
            (1, 4, 4),
            r"images of shape \(4, 2, 2\) .* expected \(1, 4, 4\)",
        ),
        ((9, 16), (1, 2, 2, 4), r"\(C, H, W\).* got \(1, 2, 2, 4\)"),
        ((9, 1, 2, 2, 4), None, r"got \(1, 2, 2, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, image_shape, message):
    with pytest.raises(cycnn.ShapeError, match=message):
        classifier(image_shape=image_shape).fit(np.zeros(shape), np.arange(9) % 2)


def test_other_images_than_those_of_fit_are_refused(images):
    X, y = images
    model = classifier(epochs=1).fit(X, y)
    with pytest.raises(ValueError, match=r"\(3, 5, 6\) .* expected \(3, 6, 5\)"):
        model.predict(X.transpose(0, 1, 3, 2))
    with pytest.raises(ValueError, match="has 60 features, but .* expecting 90"):
        model.predict(X[:, :2])


@pytest.mark.parametrize("size", [1, 3, 4, 7, 28, 33])
def test_the_default_network_takes_images_of_any_size(size):
    network = default_network((2, size, size + 1), 5).to("cpu")
    assert network(np.zeros((3, 2, size, size + 1), np.float32)).shape == (3, 5)


# Networks, and what they may be trained with


def test_a_given_layer_is_trained_from_its_weights_and_not_changed(images):
    X, y = images
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 3)).to("cpu")
    before = network.state_dict()
    model = classifier(network=network, epochs=1, learning_rate=0.0).fit(X, y)
    np.testing.assert_array_equal(
        model.model_.state_dict()["1.weight"], before["1.weight"]
    )
    model.set_params(learning_rate=0.01).fit(X, y)
    assert not np.array_equal(model.model_.state_dict()["1.weight"], before["1.weight"])
    np.testing.assert_array_equal(network.state_dict()["1.weight"], before["1.weight"])


def test_a_function_makes_the_network(images):
    X, y = images
    asked = []

    def network(image_shape, classes):
        asked.append((image_shape, classes))
        return nn.Sequential(nn.Flatten(), nn.Linear(90, classes), nn.LogSoftmax())

    model = classifier(network=network, epochs=1).fit(X, y)
    assert asked == [((3, 6, 5), 3)] and len(model.model_) == 3


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"network": lambda shape, _: default_network(shape, 4)}, ValueError,
         r"gives \(1, 4\) for one image, there are 3 classes"),
        ({"network": lambda *_: nn.Linear(91, 3)}, ValueError, "91"),
        ({"network": lambda *_: "a network"}, TypeError, "got 'a network'"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of rmsprop, sgd"),
        ({"optimizer": optim.SGD}, ValueError, "optimizer must be one of"),
        ({"schedule": "steep"}, ValueError, "schedule must be one of linear, cosine"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"learning_rate": -1}, ValueError, "lr must be finite, not negative"),
        ({"device": "tpu"}, ValueError, "unknown device 'tpu'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(images, settings, error, message):
    model = classifier(**settings)
    with pytest.raises(error, match=message):
        model.fit(*images)
    with pytest.raises(NotFittedError):
        model.predict(images[0])


def test_a_schedule_of_ones_own(images):
    steps = []

    def schedule(step, total_steps):
        steps.append((step, total_steps))
        return 1.0

    given = classifier(schedule=schedule, epochs=2, batch_size=20).fit(*images)
    constant = classifier(schedule="constant", epochs=2, batch_size=20).fit(*images)
    assert steps == [(i, 6) for i in range(6)]
    assert same_weights(given, constant)
    cosine = optim.schedules.cosine()
    assert same_weights(
        classifier(schedule="cosine", epochs=2).fit(*images),
        classifier(schedule=cosine, epochs=2).fit(*images),
    )


def test_verbose_shows_the_epochs(images, capsys):
    classifier(epochs=2).fit(*images)
    assert capsys.readouterr().out == ""
    classifier(epochs=2, verbose=1).fit(*images)
    assert len(capsys.readouterr().out.splitlines()) == 2


# Random numbers


def test_the_same_random_state_gives_the_same_bits(images):
    models = [
        classifier(random_state=state, epochs=2, batch_size=16).fit(*images)
        for state in (1, 1, np.random.RandomState(1), 2)
    ]
    assert same_weights(models[0], models[1])
    assert same_weights(models[0], models[2])
    assert not same_weights(models[0], models[3])
    assert models[0].loss_curve_ == models[2].loss_curve_


def test_without_a_random_state_numpys_is_taken(images):
    models = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        models.append(classifier(random_state=None, epochs=1).fit(*images))
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


def test_the_librarys_random_numbers_go_on_as_if_nothing_was_trained(images):
    cycnn.manual_seed(3)
    expected = [random.draw_seed() for _ in range(2)]
    cycnn.manual_seed(3)
    found = [random.draw_seed()]
    classifier(epochs=1).fit(*images)
    found.append(random.draw_seed())
    assert found == expected


# Going on


def test_partial_fit_learns_from_parts(images):
    X, y = images
    model = classifier(batch_size=10)
    for _ in range(20):
        for part in (slice(0, 30), slice(30, 60)):
            model.partial_fit(X[part], y[part], classes=[0, 1, 2])
    assert model.score(X, y) > 0.9
    assert model.n_iter_ == len(model.loss_curve_) == 40
    assert model.loss_curve_[-1] < 0.5 * model.loss_curve_[0]


def test_partial_fit_is_at_the_learning_rate_whatever_fit_left(images):
    X, y = images
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "epochs": 1}
    # this fit changes nothing, and leaves a rate of 0
    model = classifier(**settings, schedule=lambda step, total: 0.0).fit(X, y)
    fresh = classifier(**settings).partial_fit(X, y, classes=[0, 1, 2])
    model.partial_fit(X, y)
    for found, expected in zip(
        model.model_.state_dict().values(), fresh.model_.state_dict().values()
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    model.set_params(learning_rate=0.0)
    before = model.model_.state_dict()
    model.partial_fit(X, y)
    for name, array in model.model_.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_partial_fit_refuses_labels_that_it_was_not_told_of(images):
    X, y = images
    model = classifier()
    with pytest.raises(ValueError, match="first call of partial_fit needs classes"):
        model.partial_fit(X, y)
    with pytest.raises(ValueError, match="not in classes: .2."):
        model.partial_fit(X, y, classes=[0, 1])
    model = classifier().partial_fit(X, y, classes=[2, 1, 0])
    with pytest.raises(ValueError, match="not in classes: .3."):
        model.partial_fit(X, y + 1)
    with pytest.raises(ValueError, match="they were .0 1 2. before"):
        model.partial_fit(X, y, classes=[0, 1])


def test_a_warm_start_goes_on_from_the_weights(images):
    X, y = images
    model = classifier(epochs=2, warm_start=True).fit(X, y)
    assert model.n_iter_ == 2
    before = clone(model).fit(X, y)
    model.set_params(learning_rate=0.0).fit(X, y)
    assert model.n_iter_ == 4 and same_weights(model, before)
    model.set_params(warm_start=False, learning_rate=1e-3).fit(X, y)
    assert model.n_iter_ == 2 and same_weights(model, before)


# Pickles


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_a_pickle_predicts_and_trains_as_the_original(images, optimizer):
    X, y = images
    model = classifier(
        optimizer=optimizer, momentum=0.9, learning_rate=1e-3, epochs=2, batch_size=16
    )
    model.fit(X, y)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    for one in (model, loaded):
        one.partial_fit(X, y)
    assert same_weights(loaded, model)
    assert loaded.loss_curve_ == model.loss_curve_ and loaded.n_iter_ == 3


class Elsewhere(nn.Sequential):
    """Says that it is on a GPU, until it is moved."""

    place = devices.Device("cuda")

    @property
    def device(self):
        return self.place

    def to(self, device):
        self.place = cycnn.device(device)
        return super().to(device)


class Looked(pickle.Unpickler):
    """Notes what a pickle is made of."""

    def __init__(self, file):
        super().__init__(file)
        self.made_of = set()

    def find_class(self, module, name):
        self.made_of.add(name)
        return super().find_class(module, name)


def test_a_pickle_has_nothing_of_a_gpu(images):
    X, y = images
    model = classifier(epochs=1, optimizer="sgd", momentum=0.9).fit(X, y)
    model.network = Elsewhere(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(90, 3))
    model.model_ = Elsewhere(*model.model_)
    content = pickle.dumps(model)
    looked = Looked(io.BytesIO(content))
    loaded = looked.load()
    assert loaded.network.place == loaded.model_.place == "cpu"
    assert b"cuda" not in content
    assert "ndarray" in looked.made_of and "Tensor" not in looked.made_of
    # and the classifier keeps what it had
    assert model.network.place == model.model_.place == "cuda:0"


def test_a_pickle_loads_where_its_device_is_not(images, run_python, tmp_path):
    X, y = images
    model = classifier(epochs=1).fit(X, y)
    model.device = "cuda:7"
    np.save(tmp_path / "expected.npy", model.predict_proba(X))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, X)))
    run_python(LOAD, CUDA_VISIBLE_DEVICES="")


LOAD = """
import pickle
import numpy as np

model, X = pickle.load(open("model.pickle", "rb"))
assert model.model_.device == "cpu"
np.testing.assert_allclose(model.predict_proba(X), np.load("expected.npy"), rtol=1e-3)
"""


@pytest.mark.gpu
def test_what_was_fitted_on_a_gpu_loads_without_one(images, run_python, tmp_path):
    X, y = images
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 3)).to("cuda")
    model = classifier(network=network, device="cuda", epochs=2).fit(X, y)
    assert model.model_.device.is_cuda
    np.save(tmp_path / "expected.npy", model.predict_proba(X))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, X)))
    run_python(LOAD, CUDA_VISIBLE_DEVICES="")
    assert model.model_.device.is_cuda and network.device.is_cuda


# The module


def test_the_example():
    assert doctest.testmod(cycnn.sklearn).failed == 0


def test_without_scikit_learn_the_message_says_what_to_install(run_python):
    code = """
import sys
sys.modules["sklearn"] = None
import cycnn
cycnn.nn, cycnn.Trainer
try:
    cycnn.sklearn
except ImportError as error:
    print(error)
"""
    message = run_python(code)
    assert "needs scikit-learn 1.6 or newer" in message
    assert "pip install 'cycnn[sklearn]'" in message


def test_scikit_learn_is_imported_with_the_module_only(run_python):
    code = """
import sys
import cycnn
for name in cycnn.__all__: getattr(cycnn, name)
print("sklearn" in sys.modules)
made = cycnn.sklearn.CNNClassifier()
import sklearn
print(sklearn is sys.modules["sklearn"] is not cycnn.sklearn, sklearn.__version__[0])
"""
    assert run_python(code).split() == ["False", "True", "1"]
