"""A progress bar of one line, in plain text."""

from __future__ import annotations

import shutil
import sys
import time

# Reading the running loss waits for the device, so it happens this seldom.
_SECONDS_BETWEEN_READS = 0.2
_BAR = 24


def epoch_line(record, epochs: int) -> str:
    """One epoch in a line of text."""
    width = len(str(epochs))
    line = f"epoch {record.epoch:{width}d}/{epochs}  loss {record.loss:.4f}"
    if record.accuracy is not None:
        line += f"  accuracy {record.accuracy:7.2%}"
    if record.test_accuracy is not None:
        line += f"  test {record.test_accuracy:7.2%}"
    elif record.test_loss is not None:
        line += f"  test {record.test_loss:.4f}"
    return (
        f"{line}  {record.seconds:.3g} s  {record.images_per_second:,.0f} images/s"
    )


class ProgressBar:
    """A callback that shows how far training is.

    On a terminal a bar is redrawn at most five times a second, with the loss and
    accuracy of the epoch so far. Each finished epoch leaves one line; elsewhere (a
    pipe, a notebook) these lines are all there is, and nothing is read from the
    device during an epoch.

    Parameters
    ----------
    stream : text stream, optional
        Default: standard output, looked up when training starts.
    """

    def __init__(self, stream=None):
        self._given = stream
        self._drawn = 0

    def on_fit_start(self, trainer):
        self._stream = self._given if self._given is not None else sys.stdout
        self._live = self._stream.isatty()
        self._due = 0.0

    def on_step_end(self, trainer):
        if not self._live:
            return
        now = time.monotonic()
        if now < self._due:
            return
        running = trainer.running()
        self._due = time.monotonic() + _SECONDS_BETWEEN_READS
        done = trainer.step / trainer.steps_per_epoch
        full = round(done * _BAR)
        accuracy = running["accuracy"]
        shown = "" if accuracy is None else f"  accuracy {accuracy:.2%}"
        line = (
            f"epoch {trainer.epoch + 1}/{trainer.epochs} "
            f"[{'#' * full}{'.' * (_BAR - full)}] {done:4.0%}  "
            f"loss {running['loss']:.4f}{shown}  "
            f"{running['images_per_second']:,.0f} images/s"
        )
        # a line longer than the terminal would wrap, and \r would not undo it
        self._draw(line[: shutil.get_terminal_size().columns - 1])

    def on_epoch_end(self, trainer, record):
        self._erase()
        self._stream.write(epoch_line(record, trainer.epochs) + "\n")
        self._stream.flush()

    def on_fit_end(self, trainer):
        self._erase()

    def _draw(self, line):
        self._stream.write("\r" + line.ljust(self._drawn))
        self._stream.flush()
        self._drawn = len(line)

    def _erase(self):
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()
            self._drawn = 0
