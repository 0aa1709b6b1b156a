"""Training: the Trainer, its history, its progress bar, its checkpoints."""

from .history import EpochRecord, History
from .progress import ProgressBar
from .trainer import Trainer

__all__ = ["EpochRecord", "History", "ProgressBar", "Trainer"]
