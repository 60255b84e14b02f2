"""Data sets: built-in ones from installed packages (no downloads, files are checked), and one's own folders."""

from cpd_fast.data.climate import climate
from cpd_fast.data.fashion_mnist import fashion_mnist
from cpd_fast.data.folders import LAYOUTS, folder_data
from cpd_fast.data.splits import IGNORE, DataSplits, Split, augmented_batch

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "DataSplits",
    "Split",
    "augmented_batch",
    "climate",
    "fashion_mnist",
    "folder_data",
]
