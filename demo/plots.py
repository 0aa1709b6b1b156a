"""The demo's picture: learning curves and the digits that the network confuses."""

import sys

import numpy as np


def require():
    """Exit with advice where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")


def most_confused(trainer, test, count):
    """Indices, predictions and confidences of the surest mistakes on ``test``."""
    probabilities = trainer.predict_proba(test)
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != test.labels)
    sureness = probabilities[wrong, predicted[wrong]]
    order = np.argsort(-sureness, kind="stable")[:count]
    return wrong[order], predicted[wrong[order]], sureness[order]


def save(path, histories, trainer, test, rows=4, columns=6):
    """Write the picture of the runs so far; ``trainer`` holds the last one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))

    losses, errors = left.subplots(2, 1, sharex=True)
    for history in histories:
        epochs = history["epoch"]
        marker = "o" if len(epochs) < 15 else None
        for name, axes, values in (
            ("training", losses, history["loss"]),
            ("test", losses, history["test_loss"]),
            ("training", errors, [100 - 100 * a for a in history["accuracy"]]),
            ("test", errors, [100 - 100 * a for a in history["test_accuracy"]]),
        ):
            colour = "tab:blue" if name == "training" else "tab:orange"
            label = name if history is histories[0] else None
            axes.plot(epochs, values, marker=marker, color=colour, label=label)
    losses.set_ylabel("loss")
    errors.set_ylabel("error, %")
    errors.set_xlabel("epoch")
    errors.xaxis.get_major_locator().set_params(integer=True)
    errors.set_xlim(0.5, max(map(len, histories)) + 0.5)
    losses.legend()
    for axes in (losses, errors):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)

    right.suptitle("most confused: predicted (how sure) / true")
    grid = right.subplots(rows, columns).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, index, digit, sure in zip(
        grid, *most_confused(trainer, test, rows * columns)
    ):
        axes.imshow(test.images[index].reshape(test.images.shape[-2:]), cmap="gray_r")
        axes.set_title(f"{digit} ({sure:.0%}) / {test.labels[index]}", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
