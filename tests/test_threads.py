"""Threads that train, predict, save and resume one model at the same time."""

import copy
import threading

import numpy as np
import pytest
from training import CLASSES, digest, figures, make_trainer, patterns

import cycnn
from cycnn import Trainer, nn, optim
from cycnn.nn.inference import BATCH, turn
from cycnn.train import trainer as trainer_module

TRAIN = patterns(100)
LINEAR = optim.schedules.linear()
PATIENCE = 30  # seconds that nothing here takes


class Gate:
    """Lets everything pass, until somebody shuts it: then they wait in it."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()
        self.shut = False

    def wait(self):
        if self.shut:
            self.shut = False
            self.reached.set()
            assert self.opened.wait(PATIENCE)


class Gated(nn.Layer):
    """Passes its input on, through a gate."""

    def __init__(self, gate):
        self.gate = gate

    def forward(self, x):
        self.gate.wait()
        return x

    def backward(self, dy, input_grad=True, accumulate=False):
        return dy


def gated_trainer(gate=None):
    trainer = make_trainer()
    trainer.model = nn.Sequential(*trainer.model, Gated(gate or Gate()))
    return trainer


def fit(trainer, **options):
    return trainer.fit(TRAIN, 2, 16, seed=5, **options)


class Thread(threading.Thread):
    """One that keeps what its function returns or raises."""

    def __init__(self, function, *arguments, **options):
        super().__init__(name="worker", daemon=True)
        self.call = function, arguments, options
        self.result = self.error = None
        self.start()

    def run(self):
        function, arguments, options = self.call
        try:
            self.result = function(*arguments, **options)
        except BaseException as error:
            self.error = error

    def end(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture(scope="module")
def whole():
    """What a fit ends with that nobody disturbs."""
    trainer = gated_trainer()
    fit(trainer)
    return digest(trainer), figures(trainer.history)


@pytest.fixture
def training():
    """A trainer whose fit, in a thread, stands amid a step; its gate; the thread."""
    gate = Gate()
    trainer = gated_trainer(gate)
    gate.shut = True
    thread = Thread(fit, trainer)
    assert gate.reached.wait(PATIENCE)
    yield trainer, gate, thread
    gate.opened.set()
    thread.join(PATIENCE)


def same_model(trainer):
    optimizer = optim.SGD(trainer.model.parameters(), lr=0.1)
    return Trainer(trainer.model, nn.NLLLoss(), optimizer)


@pytest.mark.parametrize("second", [lambda trainer: trainer, same_model])
def test_a_second_fit_is_refused_at_once(training, whole, second):
    trainer, gate, thread = training
    other = second(trainer)
    state = cycnn.random.generator().bit_generator.state
    with pytest.raises(RuntimeError, match="under way, in worker: .* one thread"):
        other.fit(TRAIN, 2, 16)
    drawn = cycnn.random.generator().bit_generator.state
    np.testing.assert_equal(drawn, state)
    gate.opened.set()
    thread.end()
    assert (digest(trainer), figures(trainer.history)) == whole
    # and it is not refused for good
    trainer.fit(TRAIN, 3, 16)
    assert len(trainer.history) == 3


@pytest.fixture
def saved(tmp_path):
    gated_trainer().save(tmp_path / "run")
    return tmp_path / "run"


def test_a_resume_into_the_model_is_refused(saved, training, whole):
    trainer, gate, thread = training
    parts = trainer.model, trainer.loss, trainer.optimizer, LINEAR
    with pytest.raises(RuntimeError, match="under way, in worker"):
        Trainer.resume(saved, *parts)
    gate.opened.set()
    thread.end()
    assert (digest(trainer), figures(trainer.history)) == whole
    Trainer.resume(saved, *parts)


def test_a_copy_trains_beside_it(training, whole):
    trainer, gate, thread = training
    copied = copy.deepcopy(make_trainer().model)
    optimizer = optim.RMSprop(copied.parameters(), lr=0.01)
    twin = Trainer(copied, nn.NLLLoss(), optimizer, LINEAR)
    second = Thread(fit, twin)
    gate.opened.set()
    thread.end()
    second.end()
    assert digest(twin) == digest(trainer) == whole[0]


def test_a_fit_that_ends_early_is_over(whole):
    trainer = gated_trainer()

    class Fails:
        left = 3

        def on_step_end(self, trainer):
            self.left -= 1
            if not self.left:
                raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        fit(trainer, callbacks=[Fails()])
    Thread(fit, trainer).end()
    assert digest(trainer) == whole[0]


def test_what_callbacks_may_do_in_their_own_fit(whole, tmp_path):
    trainer, refused = gated_trainer(), []

    class Busy:
        def on_step_end(self, trainer):
            trainer.evaluate(TRAIN)
            trainer.predict(TRAIN)
            trainer.predict_proba(TRAIN)
            trainer.running()
            trainer.save(tmp_path / "run")

        def on_epoch_end(self, trainer, record):
            with pytest.raises(RuntimeError, match="which this is called") as error:
                trainer.fit(TRAIN, 5, 16)
            refused.append(error)
            # back to what it just saved
            parts = trainer.model, trainer.loss, trainer.optimizer, LINEAR
            Trainer.resume(tmp_path / "run", *parts)

    fit(trainer, callbacks=[Busy()])
    assert len(refused) == 2
    assert (digest(trainer), figures(trainer.history)) == whole


def test_another_thread_saves_between_two_steps(whole, tmp_path):
    path, gate, trainer = tmp_path / "run", Gate(), gated_trainer()
    step = trainer.optimizer.step

    def step_and_wait():
        step()
        gate.wait()  # updated, and not counted yet

    trainer.optimizer.step = step_and_wait
    gate.shut = True
    thread = Thread(fit, trainer)
    assert gate.reached.wait(PATIENCE)
    saver = Thread(trainer.save, path)
    saver.join(0.3)
    gate.opened.set()
    saver.end()
    thread.end()
    assert digest(trainer) == whole[0]

    other = gated_trainer()
    parts = other.model, other.loss, other.optimizer, LINEAR
    resumed = Trainer.resume(path, *parts)
    fit(resumed)
    assert (digest(resumed), figures(resumed.history)) == whole


def test_others_save_evaluate_and_predict_all_the_time(whole, tmp_path):
    trainer, over = gated_trainer(), threading.Event()
    path = tmp_path / "run"
    trainer.save(path)

    def disturb():
        count = 0
        while not over.is_set() or not count:
            trainer.save(path)
            trainer.evaluate(TRAIN)
            trainer.predict(TRAIN)
            other = gated_trainer()
            parts = other.model, other.loss, other.optimizer, LINEAR
            resumed = Trainer.resume(path, *parts)
            fit(resumed)
            assert (digest(resumed), figures(resumed.history)) == whole
            count += 1

    threads = [Thread(disturb) for _ in range(2)]
    fit(trainer)
    over.set()
    for thread in threads:
        thread.end()
    assert (digest(trainer), figures(trainer.history)) == whole


def with_dropout(gate):
    cycnn.manual_seed(0)
    layers = nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, CLASSES), Gated(gate)
    model = nn.Sequential(*layers).to("cpu")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer)


def test_a_prediction_does_not_decide_in_which_mode_an_epoch_trains():
    alone = with_dropout(Gate())
    fit(alone)

    gate = Gate()
    trainer = with_dropout(gate)
    trainer.model.eval()  # which the prediction meets and leaves

    class Predicts:
        def on_fit_start(self, trainer):
            gate.shut = True
            self.thread = Thread(trainer.predict, TRAIN)
            assert gate.reached.wait(PATIENCE)
            threading.Timer(0.3, gate.opened.set).start()

    predicts = Predicts()
    fit(trainer, callbacks=[predicts])
    predicts.thread.end()
    assert digest(trainer) == digest(alone)


@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_all_batches_of_a_prediction_meet_the_same_parameters(method, monkeypatch):
    trainer, free = gated_trainer(), []
    for_device = trainer_module.for_device

    def is_free():
        got = turn.acquire(blocking=False)
        if got:
            turn.release()
        free.append(got)

    def probed(device):
        Thread(is_free).end()
        return for_device(device)

    trainer.model = trainer.model[:-2]  # plain scores
    monkeypatch.setattr(trainer_module, "for_device", probed)
    getattr(trainer, method)(patterns(2 * BATCH))
    assert free == [False, False]
