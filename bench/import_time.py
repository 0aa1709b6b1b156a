#!/usr/bin/env python3
"""What ``import cycnn`` costs beyond NumPy, in fresh processes.

    python bench/import_time.py [--repeats 21]

Prints medians in milliseconds. The statements take turns, so that a busy moment of the
machine hits all of them; one turn before the measured ones fills the disk cache.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

STATEMENTS = {
    "numpy": "import numpy",
    "cycnn": "import cycnn",
    "numpy, then cycnn": "import numpy, cycnn",
    "numpy, then cycnn.nn, optim, data, Trainer": (
        "import numpy, cycnn; from cycnn import nn, optim, data, Trainer"
    ),
}
_TIMER = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def package_folder():
    """Where cycnn is installed, or the checkout that it is built in."""
    found = importlib.util.find_spec("cycnn")
    here = Path(found.origin).parent if found else Path(__file__).resolve().parent
    return str(here.parent)


def seconds(statement, folder):
    """Time of the statement in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMER.format(statement)],
        env={**os.environ, "PYTHONPATH": folder},
        cwd=folder,  # not a checkout, which would hide the installed package
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    folder = package_folder()
    samples = {name: [] for name in STATEMENTS}
    for turn in range(repeats + 1):
        for name, statement in STATEMENTS.items():
            taken = seconds(statement, folder)
            if turn:
                samples[name].append(taken)
    medians = {name: 1000 * statistics.median(x) for name, x in samples.items()}
    print(f"{'import':<44} {'ms':>7} {'beyond NumPy':>13}")
    for name, value in medians.items():
        line = f"{name:<44} {value:7.1f}"
        if name.startswith("numpy,"):
            line += f" {value - medians['numpy']:13.1f}"
        print(line)


if __name__ == "__main__":
    main()
