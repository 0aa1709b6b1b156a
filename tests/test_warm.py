"""Kernels compiled ahead, in processes of their own. None of it needs a GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import make_trainer, patterns

pytest.importorskip("cuda.bindings.nvrtc")

import cycnn
from cycnn import cli, nn
from cycnn.errors import CompileError
from cycnn.gpu import cache
from cycnn.gpu import compile as kernel_compile
from cycnn.nn.fuse import forward_kernels
from cycnn.ops import fused
from cycnn.ops import fused_cuda_backward as backward
from cycnn.ops import fused_cuda_forward as forward
from cycnn.ops import fused_cuda_pair_backward as pair_backward
from cycnn.tensor import empty, zeros

# Options that change nothing make kernels that were not shipped; these compile quickly.
QUICK = [("optim", "sm_90", (f"-DUNUSED={i}",)) for i in range(3)]
BROKEN = ("optim", "sm_90", ("-Dfloat=?",))
ROOT = Path(cycnn.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_told", set())


def refuse(*_args, **_kwargs):
    raise AssertionError("this must not happen")


@pytest.fixture
def started(monkeypatch):
    """The commands of the processes that are started."""
    commands, popen = [], subprocess.Popen

    def record(command, **options):
        commands.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", record)
    return commands


# prepare


def test_what_processes_compile_is_found_by_load(started, monkeypatch):
    assert kernel_compile.prepare(QUICK + QUICK[:1], jobs=2) == 3
    assert len(started) == 2
    assert len(cache.entries()) == 3
    monkeypatch.setattr(kernel_compile, "compile_source", refuse)
    for request in QUICK:
        assert kernel_compile.load(*request).startswith(b"\x7fELF")


def test_nothing_starts_where_nothing_is_missing(monkeypatch):
    for request in QUICK[:2]:
        kernel_compile.load(*request)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert kernel_compile.prepare([], jobs=2) == 0
    assert kernel_compile.prepare(QUICK[:2], jobs=2) == 0
    assert kernel_compile.prepare(QUICK, jobs=2) == 1, "a single one is made here"
    assert len(cache.entries()) == 3


def test_what_does_not_compile_is_left_to_load():
    assert kernel_compile.prepare([BROKEN, *QUICK[:2]], jobs=2) == 2
    assert len(cache.entries()) == 2
    with pytest.raises(CompileError):
        kernel_compile.load(*BROKEN)


def test_processes_that_cannot_start_or_fail(tmp_path, monkeypatch):
    program = tmp_path / "python-here"
    monkeypatch.setattr(sys, "executable", str(program))
    assert kernel_compile.prepare(QUICK, jobs=2) == 0
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    assert kernel_compile.prepare(QUICK, jobs=2) == 0
    assert kernel_compile.load(*QUICK[0]).startswith(b"\x7fELF")


def test_an_interrupt_ends_the_processes(monkeypatch):
    waited_for = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            waited_for.append(self)
            if len(waited_for) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernel_compile.prepare(QUICK, jobs=2)
    assert [process.returncode for process in waited_for] == [-signal.SIGKILL] * 3


def test_a_program_with_python_inside_is_not_started_again(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with monkeypatch.context() as frozen:
        frozen.setattr(sys, "frozen", True, raising=False)
        assert kernel_compile.prepare(QUICK[:2], jobs=2) == 2
    cache.clear()
    monkeypatch.setattr(sys, "executable", "/usr/bin/editor")
    assert kernel_compile.prepare(QUICK[:2], jobs=2) == 2


def test_a_script_without_a_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('running', flush=True)\n"
        "from cycnn.gpu import compile\n"
        f"print(compile.prepare({QUICK[:2]!r}, jobs=2))\n"
        "import sys\n"
        "print('numpy' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["running", "2", "False"], done.stderr


def test_without_a_compiler_or_a_cache_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(kernel_compile, "compile_source", refuse)
    (tmp_path / "file").write_text("not a folder")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("CYCNN_CACHE_DIR", str(tmp_path / "file"))
        assert kernel_compile.prepare(QUICK, jobs=2) == 0
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc")
    assert kernel_compile.prepare(QUICK, jobs=2) == 0


# Which kernels a model needs


class RecordingKernel:
    """A Kernel whose launches are noted."""

    launched = set()

    def __init__(self, library, name, signature, options=(), specific=False):
        self.library, self.options, self.specific = library, options, specific
        self.what = library, tuple(options), bool(specific)

    def __call__(self, *_arguments, **_options):
        self.launched.add(self.what)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that fused layers would launch on an H100, from tensors of the CPU."""
    gpu = SimpleNamespace(arch="sm_90", sm_count=132, compute=None, capability=(9, 0))
    caches = [forward._conv, forward._pair, forward._kernels, forward._machine]
    caches += [forward._conv_tail]
    caches += [backward._conv, backward._conv_kernel, backward._linear, backward._tail]
    caches += [pair_backward._kernel, pair_backward._machine]
    for module in (forward, backward, pair_backward):
        monkeypatch.setattr(module, "Kernel", RecordingKernel)
        monkeypatch.setattr(module, "_get", lambda index: gpu)
        monkeypatch.setattr(
            module,
            "empty_on_gpu",
            lambda shape, dtype, device: empty(shape, dtype, "cpu"),
        )
    for module in (backward, pair_backward):
        monkeypatch.setattr(module, "_reduce", RecordingKernel("update", "", ""))
    for name in (
        "conv_block", "gather", "linear_block", "head", "tail", "tail_backward"
    ):
        monkeypatch.setattr(fused, f"{name}_supported", lambda *given: True)
    machine = fused.machine("sm_90", 132)
    monkeypatch.setattr(
        fused,
        "conv_pair_supported",
        lambda device, precision, x_shape, first, second, gather: bool(
            forward.conv_pair_kernels(
                machine, precision, x_shape, first, second, gather
            )
        ),
    )
    monkeypatch.setattr(
        fused,
        "conv_tail_supported",
        lambda device, *given: bool(forward.conv_tail_kernels(machine, *given)),
    )
    monkeypatch.setattr(
        fused,
        "conv_pair_backward_supported",
        lambda device, *given: bool(
            pair_backward.conv_pair_backward_kernels(machine, "fp32", *given)
        ),
    )
    monkeypatch.setattr(cycnn.devices, "_default", cycnn.devices.CPU)
    monkeypatch.setattr(RecordingKernel, "launched", set())
    for cached in caches:
        cached.cache_clear()
    yield RecordingKernel.launched
    for cached in caches:
        cached.cache_clear()


def vgg_like():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.Sigmoid(),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(32 * 9, 40)),
        nn.Linear(40, 5, bias=False),
    )


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "network, loss, shape, gather",
    [
        (nn.reference_network, nn.NLLLoss, (128, 1, 28, 28), False),
        (nn.reference_network, nn.NLLLoss, (96, 1, 28, 28), True),
        (vgg_like, nn.CrossEntropyLoss, (8, 3, 14, 14), False),
        (vgg_like, nn.CrossEntropyLoss, (8, 3, 14, 14), True),
    ],
)
def test_the_listed_kernels_are_those_launched(
    launched, network, loss, shape, gather, precision
):
    objective = nn.Objective(network(), loss(), fused=True)
    listed = objective.kernels(shape, fused.machine("sm_90", 132), precision, gather)
    assert not launched
    x, index = empty(shape, device="cpu"), zeros(shape[0], "int32", "cpu")
    if gather:
        x = fused.Gather(empty(shape, "uint8", "cpu"), index, 1.0, 0.0)
    cycnn.set_precision(precision)
    try:
        objective.forward(x, index)
        objective.backward()
    finally:
        cycnn.set_precision("fp32")
    assert {kernel.what for kernel in listed} == launched
    assert len(launched) > 6


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "network, shape",
    [(nn.reference_network, (2000, 1, 28, 28)), (vgg_like, (1, 3, 14, 14))],
)
def test_the_listed_kernels_of_predictions_are_those_launched(
    launched, network, shape, precision
):
    model = nn.fuse(network())
    machine = fused.machine("sm_90", 132)
    listed = forward_kernels(model, shape, machine, precision)
    cycnn.set_precision(precision)
    try:
        model(empty(shape, device="cpu"))
    finally:
        cycnn.set_precision("fp32")
    assert {kernel.what for kernel in listed} == launched
    assert len(launched) > 2


def test_the_reference_network_needs_what_the_plans_say():
    from test_templates_compile import (
        FIRST,
        SECOND,
        THIRD,
        conv_backward,
        conv_forward,
        conv_pair,
        conv_pair_backward,
        conv_tail,
        conv_tail_backward,
        head,
        linear_forward,
        tail_backward,
    )

    objective = nn.Objective(nn.reference_network(), nn.NLLLoss(), fused=True)
    for arch, mode in (("sm_90", "bf16"), ("sm_80", "tf32")):
        kernels = objective.kernels((128, 1, 28, 28), fused.machine(arch, 132), mode)
        if arch == "sm_90":
            some_have = {
                conv_pair(arch, mode, (FIRST, SECOND), gather=False),
                conv_pair_backward(arch, mode, (32, 64)),
                # which packs its filter for the convolution of "tf32"
                conv_tail(arch, mode, (THIRD, 128, 10)),
                conv_tail_backward(arch, mode, (512, 128, 10)),
                conv_forward(arch, "tf32", THIRD),
            }
        else:
            some_have = {
                *(conv_forward(arch, mode, shape) for shape in (FIRST, SECOND)),
                *(conv_backward(arch, mode, shape) for shape in (FIRST, SECOND)),
                linear_forward(arch, mode, (512, 128)),
                head(arch, mode, (128, 10)),
                conv_forward(arch, mode, THIRD),
                tail_backward(arch, mode, (512, 128, 10)),
            }
        planned = {
            *some_have,
            conv_backward(arch, mode, THIRD),
            ("update", (), False),
        }
        assert {(k.library, k.options, k.specific) for k in kernels} == planned
        assert {k.request(arch) for k in kernels} == {
            (library, arch + "a" if specific else arch, options)
            for library, options, specific in planned
        }


def test_what_cannot_be_listed_is_left_out():
    machine = fused.machine("sm_90", 132)

    class Own(nn.ReLU):
        pass

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), Own(), nn.Flatten(), nn.Linear(8, 4), nn.LogSoftmax()
    )
    objective = nn.Objective(model, nn.NLLLoss(), fused=True)
    libraries = {k.library for k in objective.kernels((4, 1, 9, 9), machine, "tf32")}
    assert libraries == {"conv_few_forward", "conv_block_backward", "update"}
    assert objective.kernels((4, 2, 9, 9), machine, "tf32") == [], "does not fit"
    old = fused.machine("sm_75", 40)
    assert objective.kernels((4, 1, 9, 9), old, "tf32") == [], "none before sm_80"
    unfused = nn.Objective(model, nn.NLLLoss())
    assert unfused.kernels((4, 1, 9, 9), machine, "tf32") == []


@pytest.mark.parametrize("capture", [False, True])
def test_training_prepares_for_every_batch_size(capture, monkeypatch):
    machine, prepared = fused.machine("sm_90", 132), []
    monkeypatch.setattr(cycnn.devices, "_default", cycnn.devices.CPU)
    monkeypatch.setattr(fused, "machine_of", lambda device: machine)
    monkeypatch.setattr(
        fused, "prepare", lambda kernels, device: prepared.append(set(kernels))
    )
    trainer = make_trainer()
    trainer.capture, trainer.fuse = capture, True
    train = patterns(72)
    objective = nn.Objective(trainer.model, trainer.loss, fused=True)

    def change(trainer, record):
        cycnn.set_precision("tf32" if record.epoch == 2 else "fp32")

    try:
        trainer.fit(train, 4, 32, seed=5, callbacks=[change])
    finally:
        cycnn.set_precision("fp32")
    sizes = [(n, *train.images.shape[1:]) for n in (32, 8)]

    def kernels(size, precision):
        # only a captured step reads its batch out of the data set
        return set(objective.kernels(size, machine, precision, gather=capture))

    expected = [
        {kernel for size in sizes for kernel in kernels(size, precision)}
        for precision in ("fp32", "tf32", "fp32")
    ]
    assert prepared == expected
    assert expected[0] > kernels(sizes[0], "fp32")


# cycnn warm


def test_warm_fills_the_cache_without_a_gpu(capsys, monkeypatch):
    command = ["warm", "--arch", "sm_80", "--batch-size", "32", "--precision", "tf32"]
    assert cli.main(command) == 0
    first, where = capsys.readouterr().out.splitlines()
    count = len(cache.entries())
    assert re.fullmatch(
        rf"sm_80, 108 SMs: {count} kernels, {count} compiled in \d+\.\d s", first
    )
    assert where.startswith(f"cache {cache.kernels()}: {count} kernels, ")
    monkeypatch.setattr(kernel_compile, "compile_source", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert cli.main(command) == 0
    assert f"{count} kernels, 0 compiled in" in capsys.readouterr().out


def warm(jobs, folder):
    """The command in a process group of its own, as a shell starts it."""
    folder.mkdir()
    command = [sys.executable, "-m", "cycnn", "warm", "--arch", "sm_80"]
    return subprocess.Popen(
        [*command, "--batch-size", "32", "--precision", "tf32", "--jobs", str(jobs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_real_ctrl_c_leaves_whole_kernels_alone(tmp_path, jobs):
    folder = tmp_path / "temporary"
    process = warm(jobs, folder)
    try:
        deadline = time.monotonic() + 120
        while not cache.entries():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        # the next ones are being compiled: Ctrl-C reaches all processes of a terminal
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # none is left behind
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt") and output == ""
    assert list(folder.iterdir()) == []
    assert sorted(cache.kernels().iterdir()) == cache.entries()
    for path in cache.entries():
        assert cache.read(path.stem) is not None


def test_warm_without_a_gpu_asks_for_an_architecture(capsys, monkeypatch):
    monkeypatch.setattr(cli, "cuda_unavailable_reason", lambda: "no driver")
    assert cli.main(["warm"]) == 1
    assert capsys.readouterr().err == (
        "cycnn warm: no GPU to compile for (no driver); name one with --arch\n"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "h100"], "not like sm_90"),
        (["--arch", "sm_75"], "no fused kernels"),
        (["--arch", "sm_87"], "how many multiprocessors"),
        (["--precision", "fp16"], "invalid choice"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_warm_refuses_what_makes_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["warm", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
