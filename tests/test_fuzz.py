"""Damaged and hostile files, made by hypothesis and by tools/fuzz.py."""

import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import digest, make_trainer, patterns

import cycnn
from cycnn import DataError, Trainer, data, optim
from cycnn.data import read_idx, write_idx
from cycnn.nn import weights
from cycnn.train import checkpoint

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", TOOL)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

# (what, where as a share of the length, with what)
places = st.floats(0, 1)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(st.just("put"), places, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("delete"), places, st.integers(1, 40)),
        st.tuples(st.just("truncate"), places, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def edited(content, edits):
    content = bytearray(content)
    for what, place, value in edits:
        at = min(int(place * len(content)), max(len(content) - 1, 0))
        if what == "flip" and content:
            content[at] ^= 1 << value
        elif what == "put":
            content[at : at + len(value)] = value
        elif what == "insert":
            content[at:at] = value
        elif what == "delete":
            del content[at : at + value]
        elif what == "truncate":
            del content[at:]
    return bytes(content)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(fuzz.HUGE),
    st.floats(),
    st.text(max_size=8),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    max_leaves=6,
)


def paths_into(value, path=()):
    """The way to every part of something made of dicts and lists."""
    yield path
    if isinstance(value, dict):
        parts = value.items()
    else:
        parts = enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from paths_into(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


# IDX


@pytest.fixture(scope="module")
def idx_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for name, dtype, shape in [
        ("bytes", "uint8", (3, 4, 5)),
        ("doubles", "float64", (2, 3)),
        ("none", "int16", (0, 7)),
    ]:
        write_idx(folder / name, rng.integers(0, 99, shape).astype(dtype))
    return folder, [path.read_bytes() for path in sorted(folder.iterdir())]


@settings(max_examples=400, deadline=None)
@given(number=st.integers(0, 2), edits=edits, form=st.integers(0, 2))
def test_idx(idx_files, number, edits, form):
    folder, files = idx_files
    content = files[number]
    if form == 0:
        content = edited(content, edits)
    elif form == 1:
        content = gzip.compress(edited(content, edits))
    else:
        content = edited(gzip.compress(content, mtime=0), edits)
    path = folder / "edited"
    path.write_bytes(content)
    try:
        array = read_idx(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert array.nbytes <= 1 << 16


# checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer, in the middle of an epoch, and the two files that it writes."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(momentum=0.5)

    def save(trainer):
        if trainer.step == 2:
            trainer.save(folder / "run")

    callback = type("Callback", (), {"on_step_end": staticmethod(save)})()
    trainer.fit(patterns(40), 2, 16, seed=1, callbacks=[callback])
    trainer.model.save(folder / "weights")
    return folder, trainer


def resume(path, trainer):
    return Trainer.resume(
        path, trainer.model, trainer.loss, trainer.optimizer, optim.schedules.linear()
    )


def read_or_refuse(run, content):
    """Both readers take a file, or refuse it and change nothing."""
    folder, trainer = run
    path = folder / "edited"
    path.write_bytes(content)
    before = digest(trainer)
    kept = trainer.model.state_dict(), trainer.optimizer.state_dict()
    readers = [
        (lambda: resume(path, trainer), DataError),
        (lambda: trainer.model.load(path), (ValueError, TypeError)),
    ]
    for read, errors in readers:
        try:
            # float64 numbers may be out of float32's range
            with np.errstate(all="ignore"):
                read()
        except errors as error:
            assert str(path) in str(error)
            assert digest(trainer) == before
        else:
            trainer.model.load_state_dict(kept[0])
            trainer.optimizer.load_state_dict(kept[1])
            assert digest(trainer) == before


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["run", "weights"]), edits=edits)
def test_damaged_files(run, name, edits):
    read_or_refuse(run, edited((run[0] / name).read_bytes(), edits))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["run", "weights"]), choice=st.randoms(), new=anything)
def test_headers_that_say_something_else(run, name, choice, new):
    content = (run[0] / name).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    path = choice.choice(list(paths_into(header)))
    text = json.dumps(replaced(header, path, new)).encode()
    read_or_refuse(run, len(text).to_bytes(8, "little") + text + content[8 + size :])


@settings(max_examples=300, deadline=None)
@given(choice=st.randoms(), new=anything)
def test_runs_that_say_something_else_under_a_correct_digest(run, choice, new):
    folder, _ = run
    tensors, metadata = weights.read(folder / "run")
    said = json.loads(metadata["cycnn"])
    text = json.dumps(replaced(said, choice.choice(list(paths_into(said))), new))
    metadata = {"cycnn": text, "sha256": checkpoint._digest(tensors, text)}
    weights.write(folder / "signed", tensors, metadata)
    read_or_refuse(run, (folder / "signed").read_bytes())


def signed(run, change):
    """The run's file with its JSON changed by ``change`` and a correct digest."""
    folder, _ = run
    tensors, metadata = weights.read(folder / "run")
    said = json.loads(metadata["cycnn"])
    change(said, tensors)
    text = json.dumps(said)
    metadata = {"cycnn": text, "sha256": checkpoint._digest(tensors, text)}
    weights.write(folder / "signed", tensors, metadata)
    return folder / "signed"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda said, _: said.pop("format"), "its JSON has no format"),
        (lambda said, _: said.pop("optimizer"), "optimizer is None"),
        (lambda said, _: said.update(run=[]), r"run is \[\]"),
        (lambda said, _: said.update(layers={}), r"layers is \{\}"),
        (lambda said, _: said["layers"].append([0, "ReLU", ""]), r"layers is \[\["),
        (lambda said, _: said["layers"][1].append(""), r"layers is \[\["),
        (lambda said, _: said["layers"].append(["9", "X", None]), "layer 9, X, is not"),
        (lambda said, _: said["layers"].clear(), r"layers is \[\]"),
        (lambda said, _: said.update(loss=3), "loss is 3"),
        (lambda said, _: said.update(loss=""), "made with the loss , this is NLLLoss"),
        (lambda said, _: said["run"].pop("tally"), "its run has no tally"),
        (lambda said, _: said["run"].update(epoch="1"), "epoch is '1'"),
        (lambda said, _: said["run"].update(tally=None), "step 2 of an epoch without"),
        (lambda said, _: said["run"].update(base_lr=10**400), "base_lr is 1000"),
        (lambda said, _: said["run"]["history"].append({}), "history is "),
        (lambda said, _: said["optimizer"].update(lr=10**400), "of another run: int"),
        (lambda said, _: said["optimizer"].update(lr=-1.0), "lr must be finite"),
        (lambda _, tensors: tensors.update(x=np.zeros(1)), "holds x, which no"),
        (
            lambda _, tensors: tensors.update({"optimizer.lr": np.zeros(())}),
            "holds optimizer.lr, which no",
        ),
    ],
)
def test_a_hostile_run_is_named_and_changes_nothing(run, change, message):
    path, trainer = signed(run, change), make_trainer(momentum=0.5)
    before = digest(trainer)
    with pytest.raises(DataError, match=message) as caught:
        resume(path, trainer)
    assert str(path) in str(caught.value)
    assert digest(trainer) == before


@pytest.mark.parametrize("shape", [[0, 2**63], [0] * 70, [0, 2**40, 2**40]])
def test_shapes_that_numpy_refuses(run, shape):
    folder, trainer = run
    array = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps({"a": array}).encode()
    path = folder / "shape"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DataError, match="shape is damaged: a is no array"):
        trainer.model.load(path)


def test_json_that_is_nested_too_deep(run):
    folder, trainer = run
    tensors, _ = weights.read(folder / "run")
    text = "[" * 200_000
    metadata = {"cycnn": text, "sha256": checkpoint._digest(tensors, text)}
    weights.write(folder / "deep", tensors, metadata)
    with pytest.raises(DataError, match="deep is damaged: no JSON in it"):
        resume(folder / "deep", trainer)


# the tool


@pytest.mark.parametrize("target, inputs", [("idx", 20_000), ("checkpoint", 3_000)])
def test_a_short_run_of_the_tool(tmp_path, target, inputs):
    """In a process of its own, with its limits of memory and time."""
    env = dict(os.environ)
    env["PYTHONPATH"] = str(Path(cycnn.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, TOOL, "--target", target, "--inputs", str(inputs)]
        + ["--keep", str(tmp_path / "findings")],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{target}: {inputs:,} inputs (seed 0)" in done.stdout
    assert ", 0 findings" in done.stdout
    taken = int(done.stdout.split("(seed 0), ")[1].split(" of")[0].replace(",", ""))
    # neither only refused at the first byte, nor hardly changed
    assert inputs // 100 < taken < inputs // 2
    assert not (tmp_path / "findings").exists()


def found(tmp_path, capsys, target):
    status = fuzz.main(
        ["--target", target, "--inputs", "300", "--timeout", "0.2"]
        + ["--keep", str(tmp_path / "findings")]
    )
    kept = list((tmp_path / "findings").glob("seed-0-input-*"))
    output = capsys.readouterr()
    assert status == 1 and kept
    assert "findings" in output.out
    return output.err


@pytest.fixture(autouse=True)
def no_limit_here(monkeypatch):
    """What the tool limits for its own process is not for that of the tests."""
    monkeypatch.setattr(fuzz, "limit_memory", lambda mebibytes: None)


def test_the_tool_finds_an_exception(tmp_path, capsys, monkeypatch):
    def read(path):
        if b"\xff" in Path(path).read_bytes():
            raise KeyError("planted")

        return read_idx(path)

    monkeypatch.setattr(data, "read_idx", read)
    assert "planted" in found(tmp_path, capsys, "idx")


def test_the_tool_finds_what_takes_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "read_idx", lambda path: time.sleep(0.25) or np.zeros(1))
    assert "s for one input" in found(tmp_path, capsys, "idx")


HARM = {
    "parameter": lambda model, optimizer: model.parameters()[0].data.fill_(7),
    "statistics": lambda model, optimizer: model[1].running_var.data.fill_(7),
    "random state": lambda model, optimizer: model[3].random_state.data.fill_(7),
    "state": lambda model, optimizer: optimizer.runs[-1].state["exp_avg"].fill_(7),
    "rate": lambda model, optimizer: setattr(optimizer.param_groups[1], "lr", 7),
    "steps": lambda model, optimizer: optimizer._counter.fill_(7),
    "averages": lambda model, optimizer, average: average.load_state_dict(
        average.state_dict() | {"decay": 0.7}
    ),
}


@pytest.mark.parametrize("what", HARM)
def test_the_tool_finds_what_a_refused_file_changed(
    tmp_path, capsys, monkeypatch, what
):
    load = checkpoint.load

    def careless(path, model, loss, optimizer, schedule, average):
        try:
            return load(path, model, loss, optimizer, schedule, average)
        except DataError:
            if average is not None or what == "parameter":
                averages = (average,) if what == "averages" else ()
                HARM[what](model, optimizer, *averages)
            raise

    monkeypatch.setattr(checkpoint, "load", careless)
    assert "a refused file changed" in found(tmp_path, capsys, "checkpoint")


def test_the_valid_files_hold_all_that_there_is(tmp_path):
    plain, full = fuzz.Checkpoint(tmp_path).runs
    for run in plain, full:
        for content in run.files:
            (tmp_path / "input").write_bytes(content)
            assert run.read(str(tmp_path / "input")), "as it is, it is taken"
    names = set()
    for content in full.files:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        names |= {name.split(".")[0] for name in header}
        assert any(name.endswith("running_mean") for name in header)
    assert {"model", "buffer", "optimizer", "average"} < names
    assert full.optimizer.state_dict()["step"] == 6
    assert len(full.optimizer.lrs) == 2


def test_the_same_seed_makes_the_same_inputs():
    def inputs(seed):
        rng = random.Random(seed)
        return [fuzz.damaged(bytes(100), rng) for _ in range(50)]

    assert inputs(1) == inputs(1) != inputs(2)


def test_the_limit_of_memory_holds(run_python):
    code = f"""if True:
        import importlib.util
        spec = importlib.util.spec_from_file_location("fuzz", {str(TOOL)!r})
        fuzz = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fuzz)
        fuzz.limit_memory(64)
        bytearray(16 << 20)
        try:
            bytearray(256 << 20)
        except MemoryError:
            print("refused")
    """
    pytest.importorskip("resource")
    assert run_python(code) == "refused\n"


def test_a_file_that_is_shortened_while_it_is_read(run_python):
    """Reading memory that maps a file ends the process (SIGBUS) if the file shrinks."""
    code = """if True:
        import threading
        import numpy as np
        from cycnn import DataError
        from cycnn.nn import weights

        path, rounds, shape = "weights", 20, (4000, 4000)
        weights.write(path, {"a": np.ones(shape, np.float32)})
        content = open(path, "rb").read()
        done = threading.Event()

        def shorten():
            with open(path, "r+b") as file:
                while not done.is_set():
                    file.truncate(len(content) // 3)
                    file.seek(0)
                    file.write(content)
                    file.flush()

        other = threading.Thread(target=shorten)
        other.start()
        whole = 0
        try:
            for _ in range(rounds):
                try:
                    whole += weights.read(path)[0]["a"].shape == shape
                except DataError:
                    pass
        finally:
            done.set()
            other.join()
        print(whole)
    """
    assert int(run_python(code)) <= 20
