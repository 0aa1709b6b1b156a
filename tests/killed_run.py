"""A short training for tests/test_kill.py to kill.

    python killed_run.py FILE [SAVE LINE]

Goes on from FILE if it is there, saves to it every other step, and says on standard
output where it stands: "ready", "saved <steps done>", at the end "done <digest>". With
SAVE and LINE it kills itself in that save of its own, just before the LINE-th line that
is run in cycnn/nn/weights.py; "lines <n>" tells how many lines the first save takes.
"""

import os
import signal
import sys

from training import digest, make_trainer, patterns

from cycnn import Trainer, optim
from cycnn.nn import weights

EPOCHS, STEPS = 4, 12


def say(*words):
    # one write: a kill leaves a whole line or none
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Saver:
    def __init__(self, path, die_in=None, die_at=None):
        self.path, self.die_in, self.die_at = path, die_in, die_at
        self.saves = self.lines = 0

    def on_step_end(self, trainer):
        if trainer.step % 2:
            return
        self.saves += 1
        traced = self.saves == (self.die_in or 1)
        if traced:
            sys.settrace(self.trace)
        trainer.save(self.path)
        if traced:
            sys.settrace(None)
            say("lines", self.lines)
        say("saved", trainer.epoch * STEPS + trainer.step)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename != weights.__file__:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def main(path, *die):
    # with momentum, so that the file holds two tensors of state for each parameter
    device = os.environ.get("CYCNN_TEST_DEVICE", "cpu")
    trainer = make_trainer(momentum=0.5, device=device)
    if os.path.exists(path):
        trainer = Trainer.resume(
            path,
            trainer.model,
            trainer.loss,
            trainer.optimizer,
            optim.schedules.linear(),
        )
    saver = Saver(path, *map(int, die))
    train = patterns(8 * STEPS)
    say("ready")
    trainer.fit(train, EPOCHS, 8, seed=5, callbacks=[saver])
    say("done", digest(trainer))


if __name__ == "__main__":
    main(*sys.argv[1:])
