"""Real data sets that come from installed packages: nothing is downloaded, every file is checked by SHA-256."""

from cpd_fast.data.climate import climate
from cpd_fast.data.fashion_mnist import fashion_mnist
from cpd_fast.data.splits import DataSplits, Split, augmented_batch

__all__ = ["DataSplits", "Split", "augmented_batch", "climate", "fashion_mnist"]
