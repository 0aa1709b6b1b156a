"""Data: IDX files, MNIST, and loaders that make batches on a device."""

from __future__ import annotations

from .dataset import ArrayDataset
from .idx import load_idx_pair, read_idx, write_idx
from .loader import DataLoader
from .mnist import mnist, mnist5k

__all__ = [
    "ArrayDataset",
    "DataLoader",
    "load_idx_pair",
    "mnist",
    "mnist5k",
    "read_idx",
    "write_idx",
]
