"""What goes wrong on a GPU, and what a user is told. In processes of their own."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training import make_trainer

import cycnn
from cycnn import Trainer, optim
from cycnn.errors import OutOfMemoryError
from cycnn.gpu import memory
from cycnn.ops import cuda as ops

pytestmark = [pytest.mark.gpu, pytest.mark.no_sanitizer]

TESTS = Path(__file__).resolve().parents[1]
# the cycnn that these tests import, wherever it lies, and what the tests share
PATH = os.pathsep.join([str(Path(cycnn.__file__).resolve().parents[1]), str(TESTS)])


def python(code, *arguments, **environment):
    """Standard output of a program that must end well and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


WILD = r'extern "C" __global__ void wild(int* at) { at[threadIdx.x] = 1; }'


def test_after_an_illegal_address_every_call_says_so():
    code = """if True:
        import sys
        import numpy as np
        import cycnn
        from cuda.bindings import driver
        from cycnn import nn
        from cycnn.gpu import compile, device

        model = nn.reference_network().to("cuda")
        x = cycnn.zeros((2, 1, 28, 28), device="cuda")
        model(x).numpy()
        cubin = compile.compile_source(sys.argv[1], "wild.cu", device.get(0).arch, ())
        _, module = driver.cuModuleLoadData(cubin)
        _, kernel = driver.cuModuleGetFunction(module, b"wild")
        nowhere = np.array([16], np.uint64)
        places = np.array([nowhere.ctypes.data], np.uint64)
        driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, 0, places.ctypes.data, 0)
        for attempt in (lambda: model(x).numpy(), x.numpy, cycnn.synchronize,
                        lambda: cycnn.zeros(4, device="cuda").numpy()):
            try:
                print("returned", attempt())
            except cycnn.CudaError as error:
                print("restart it" in str(error), error.name)
    """
    assert python(code, WILD).splitlines() == ["True cudaErrorIllegalAddress"] * 4


@pytest.mark.parametrize("visible", ["", "7777"])
def test_a_hidden_gpu_is_no_gpu(visible):
    code = """if True:
        import cycnn
        from training import make_trainer, patterns
        print(cycnn.cuda_unavailable_reason())
        make_trainer().fit(patterns(20), 1, 8)
        try:
            cycnn.zeros(3, device="cuda")
        except cycnn.CudaError as error:
            print(error)
    """
    lines = python(code, CUDA_VISIBLE_DEVICES=visible).splitlines()
    assert len(lines) == 2 and all("CUDA_VISIBLE_DEVICES" in line for line in lines)


def test_a_gpu_that_is_too_old_is_named():
    code = """if True:
        import cycnn
        from cycnn.gpu import device
        device._MINIMUM_CAPABILITY = (99, 0)
        print(cycnn.cuda_unavailable_reason())
    """
    assert "cycnn needs 99.0 or newer" in python(code)


def test_an_interrupt_while_a_step_is_recorded():
    code = """if True:
        import signal
        from cycnn import nn
        from training import digest, figures, make_trainer, patterns

        class Interrupts(nn.ReLU):
            calls_left = -1

            def forward(self, x):
                self.calls_left -= 1
                if self.calls_left == 0:
                    signal.raise_signal(signal.SIGINT)
                return super().forward(x)

        train = patterns(60)
        whole, broken = (make_trainer(device="cuda") for _ in range(2))
        for trainer in (whole, broken):
            layers = list(trainer.model)
            trainer.model = nn.Sequential(layers[0], Interrupts(), *layers[2:])
        broken.model[1].calls_left = 2  # the second is recorded
        whole.fit(train, 2, 8, seed=1)
        try:
            broken.fit(train, 2, 8, seed=1)
        except KeyboardInterrupt:
            print("interrupted after", broken.step)
        broken.fit(train, 2, 8, seed=1)
        print(digest(broken) == digest(whole), figures(broken.history) ==
              figures(whole.history))
    """
    assert python(code) == "interrupted after 2\nTrue True\n"


@pytest.mark.parametrize("capture", [False, True])
def test_an_interpreter_ends_with_everything_alive(capture):
    code = f"""if True:
        import sys
        import cycnn
        from training import make_trainer, patterns
        trainer = make_trainer(device="cuda")
        trainer.capture = {capture}

        class Leave:
            def on_step_end(self, trainer):
                if trainer.step == 3:
                    sys.exit(0)  # with tensors, graphs and a loader in use

        kept = cycnn.zeros(1000, device="cuda")
        trainer.fit(patterns(60), 1, 8, callbacks=[Leave()])
    """
    assert python(code) == ""


def test_threads_with_models_of_their_own():
    code = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from training import digest, make_trainer, patterns

        trainers = [make_trainer(device="cuda") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda t: t.fit(patterns(100), 3, 16, seed=1), trainers))
        print(len({digest(trainer) for trainer in trainers}))
    """
    assert python(code) == "1\n"


def test_more_elements_than_an_int_counts():
    count = 2**31 + 5
    free, _ = memory.info(0)
    if free < 2 * 4 * count + 2**30:
        with pytest.raises(OutOfMemoryError):
            ops.relu_forward(cycnn.zeros(count, device="cuda"))
        return
    x = cycnn.zeros(count, device="cuda")
    x[count - 3 :].copy_(np.array([-1, 2, 3], np.float32))
    y = ops.relu_forward(x)
    assert y[count - 5 :].numpy().tolist() == [0, 0, 0, 2, 3]
    assert y[:5].numpy().tolist() == [0] * 5


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_two_processes_end_with_the_same_bits(name, capture):
    code = f"""if True:
        import cycnn
        from cycnn import Trainer, nn, optim
        from training import digest, patterns

        cycnn.set_precision({name!r})
        cycnn.manual_seed(7)
        model = nn.reference_network().to("cuda")
        optimizer = optim.RMSprop(
            model.parameters(), lr=0.001, initial_accumulator=1e-3
        )
        trainer = Trainer(model, nn.NLLLoss(), optimizer, capture={capture})
        trainer.fit(patterns(500, side=28, classes=10), 1, 64, seed=3)
        print(digest(trainer))
    """
    assert python(code) == python(code)


def test_a_run_survives_kills(tmp_path):
    """As tests/test_kill.py, with fewer kills: of graphs and of copies from the GPU."""
    script = TESTS / "killed_run.py"
    env = {**os.environ, "PYTHONPATH": PATH, "CYCNN_TEST_DEVICE": "cuda"}
    rng = random.Random(1)

    def run(path, patience):
        process = subprocess.Popen(
            [sys.executable, script, path], env=env, stdout=subprocess.PIPE, bufsize=0
        )
        with process:
            assert process.stdout.readline() == b"ready\n"
            start = time.monotonic()
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
            output = process.stdout.read().decode()
        assert process.returncode in (0, -signal.SIGKILL)
        said = dict(line.split() for line in output.splitlines())
        return process.returncode == 0, said, time.monotonic() - start

    _, whole, seconds = run(tmp_path / "whole", 60)
    path, kills, ended = tmp_path / "run", 0, False
    while not ended:
        ended, said, _ = run(path, rng.uniform(0, seconds / 2) if kills < 6 else 60)
        kills += not ended
        if path.exists():
            fresh = make_trainer(momentum=0.5)
            Trainer.resume(
                path, fresh.model, fresh.loss, fresh.optimizer, optim.schedules.linear()
            )
        if ended and kills < 6:  # a process was through before it was killed
            assert said["done"] == whole["done"]
            path.unlink()
            ended = False
    assert said["done"] == whole["done"]
