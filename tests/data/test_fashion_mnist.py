"""Fashion-MNIST: the real files where they are installed, small stand-ins for the errors."""

import gzip
import struct

import pytest
import torch

from cpd_fast.data import DataSplits, Split, augmented_batch, fashion_mnist
from cpd_fast.data.fashion_mnist import FOLDER, SHA256, _read_idx
from cpd_fast.errors import DataError


@pytest.mark.skipif(not FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_files():
    data = fashion_mnist()
    assert [len(s) for s in (data.train, data.val, data.test)] == [55000, 5000, 10000]
    assert data.test.labels.bincount().tolist() == [1000] * 10
    x, y = augmented_batch(data, 512, seed=0, step=0)
    assert abs(x.mean().item()) < 0.2 and abs(x.std().item() - 1) < 0.2 and y.shape == (512,)


def test_missing_folder_names_the_package(tmp_path):
    with pytest.raises(DataError, match=r"lacks train-images.*apt-get install dataset-fashion-mnist.*--data-dir"):
        fashion_mnist(tmp_path)


def test_corrupt_file_shows_both_hashes(tmp_path):
    for name in SHA256:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"train-images.*expected SHA-256 b0564c3e.*got [0-9a-f]{64}"):
        fashion_mnist(tmp_path)


def test_read_idx(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBII", 0, 8, 2, 2, 3) + bytes(range(6))))
    assert _read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(struct.pack(">HBBII", 0, 8, 2, 2, 3) + bytes(range(5))))
    with pytest.raises(DataError, match="not a gzipped IDX file"):
        _read_idx(path)


def test_shift_moves_and_fills_with_zero():
    image = torch.full((1, 1, 6, 6), 255, dtype=torch.uint8)
    split = Split(image, torch.zeros(1, dtype=torch.uint8))
    data = DataSplits("toy", ("a",), (), 0.0, 255.0, split, split, split, shift=2, flips="")
    counts = {int(augmented_batch(data, 1, seed=0, step=s)[0].sum()) for s in range(40)}
    assert counts <= {(6 - a) * (6 - b) for a in range(3) for b in range(3)} and len(counts) > 3
