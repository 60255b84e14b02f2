"""Fashion-MNIST from Debian's package, or from any folder that holds its four files."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch

from cpd_fast.data._files import check_sha256
from cpd_fast.data.splits import DataSplits, Split
from cpd_fast.errors import DataError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NUM_VAL = 5000  # the data set has no validation split: the last images of train
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def fashion_mnist(folder: str | os.PathLike[str] | None = None) -> DataSplits:
    """Load Fashion-MNIST: 55,000 train, 5,000 val and 10,000 test pictures of 28x28, 10 classes.

    Args:
        folder: Holds the four ``*-ubyte.gz`` files; default: where Debian's ``dataset-fashion-mnist`` puts them.

    Returns:
        uint8 images ``(N, 1, 28, 28)``, uint8 labels ``(N,)``.

    Raises:
        DataError: If a file is missing, unreadable or not the published one.

    Example:
        >>> data = fashion_mnist()  # doctest: +SKIP
        >>> len(data.train), len(data.val), len(data.test)  # doctest: +SKIP
        (55000, 5000, 10000)
    """
    root = FOLDER if folder is None else Path(folder)
    missing = [name for name in SHA256 if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"Fashion-MNIST: {root} lacks {', '.join(missing)}; install Debian's package with: "
            f"apt-get install {PACKAGE}, or give a folder that holds the four files (--data-dir)"
        )
    remedy = f"reinstall it with: apt-get install --reinstall {PACKAGE}, or copy the file again"
    x, y, x_test, y_test = (
        torch.from_numpy(_read_idx(check_sha256(root / name, sha256, remedy))) for name, sha256 in SHA256.items()
    )
    x, x_test = x[:, None], x_test[:, None]  # (N, 1, 28, 28)
    return DataSplits(
        name="fashion-mnist",
        classes=CLASSES,
        palette=(),
        mean=0.2860 * 255,  # of the training pictures
        std=0.3530 * 255,
        train=Split(x[:-NUM_VAL], y[:-NUM_VAL]),
        val=Split(x[-NUM_VAL:], y[-NUM_VAL:]),
        test=Split(x_test, y_test),
        shift=2,
        flips="h",
        source={"files": f"Debian {PACKAGE}" if folder is None else "a folder of the user's"},
    )


def _read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes.

    Raises:
        DataError: If it is not one.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        _, kind, ndim = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
        return np.frombuffer(bytearray(raw), np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as e:
        raise DataError(f"{path}: not a gzipped IDX file of bytes ({e})") from e
