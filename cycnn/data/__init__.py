"""Data: sets from files of many kinds, and loaders that make batches on a device."""

from __future__ import annotations

from .augment import Augment
from .cifar10 import CLASSES as CIFAR10_CLASSES
from .cifar10 import cifar10
from .dataset import ArrayDataset
from .idx import load_idx_pair, read_idx, write_idx
from .image_folder import image_folder
from .loader import DataLoader
from .mnist import mnist, mnist5k
from .npz import load_npz
from .statistics import channel_statistics
from .targets import TargetDataset

__all__ = [
    "CIFAR10_CLASSES",
    "ArrayDataset",
    "Augment",
    "DataLoader",
    "TargetDataset",
    "channel_statistics",
    "cifar10",
    "image_folder",
    "load_idx_pair",
    "load_npz",
    "mnist",
    "mnist5k",
    "read_idx",
    "write_idx",
]
