"""Image folders and segmentation folders of one's own, as :class:`DataSplits`.

Pictures are decoded once, at one size. What is larger than ``IN_MEMORY`` bytes lies in an unnamed file that is mapped
into memory, so that a data set may be larger than the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpd_fast.data.splits import IGNORE, DataSplits, Split
from cpd_fast.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB, 0-255
IN_MEMORY = 1 << 28
LAYOUTS = ("auto", "image-folder", "segmentation", "ade20k", "cityscapes")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
HALVED = "the folder has no test split: every other picture of val became test"
DIVIDED = "the folder has no splits: 80 % train, 10 % val, 10 % test, shuffled with seed 0"

# name, (r, g, b) of the 19 classes that Cityscapes evaluates, by trainId; the ids of labelIds files
CITYSCAPES = {
    "road": (7, (128, 64, 128)), "sidewalk": (8, (244, 35, 232)), "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)), "fence": (13, (190, 153, 153)), "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)), "traffic sign": (20, (220, 220, 0)), "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)), "sky": (23, (70, 130, 180)), "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)), "car": (26, (0, 0, 142)), "truck": (27, (0, 0, 70)), "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)), "motorcycle": (32, (0, 0, 230)), "bicycle": (33, (119, 11, 32)),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A picture and what belongs to it: a class number, or the path of a mask."""

    image: Path
    label: int | Path


Found = dict[str, list[Pair]]  # by split


def folder_data(root: str | Path, size: int | tuple[int, int] = 224, layout: str = "auto") -> DataSplits:
    """A folder of pictures as train, val and test.

    Layouts:

    - ``image-folder``: ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg`` and perhaps ``test/``; or ``CLASS/*.jpg`` alone.
    - ``segmentation``: ``images/train/NAME.jpg`` with ``masks/train/NAME.png`` (or ``annotations``, ``labels``), or
      ``train/images/NAME.jpg`` with ``train/masks/NAME.png``. Masks hold class numbers; 255 is not looked at. Names of
      the classes, one a line, may stand in ``classes.txt``.
    - ``ade20k``: ``images/training``, ``annotations/training``, ``.../validation``; 0 in a mask is not looked at; names
      in ``objectInfo150.txt``.
    - ``cityscapes``: ``leftImg8bit/train/CITY/*_leftImg8bit.png`` with ``gtFine/.../*_labelTrainIds.png`` or
      ``*_labelIds.png``.

    Args:
        root: The folder.
        size: Height and width that pictures get. Classification: the shorter side is resized and the middle is cut out;
            segmentation: resized, masks without interpolation.
        layout: One of the above, or ``"auto"``.

    Returns:
        uint8 images ``(N, 3, H, W)``, uint8 labels ``(N,)`` or ``(N, H, W)``, ImageNet's mean and standard deviation.

    Raises:
        DataError: If the folder does not have the layout, pictures cannot be read, or labels are out of range; lists
            what is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of pictures")
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    shape = (size, size) if isinstance(size, int) else size
    kind = _guess(root) if layout == "auto" else layout
    if kind == "image-folder":
        return _classification(root, shape)
    finder = {"segmentation": _generic_pairs, "ade20k": _ade20k_pairs, "cityscapes": _cityscapes_pairs}[kind]
    return _segmentation(root, shape, kind, finder(root))


def _guess(root: Path) -> str:
    names = {p.name for p in root.iterdir() if p.is_dir()}
    if {"leftImg8bit", "gtFine"} <= names:
        return "cityscapes"
    if {"images", "annotations"} <= names and (root / "images/training").is_dir():
        return "ade20k"
    masks = ("masks", "annotations", "labels")
    inside = {p.name for s in SPLIT_NAMES["train"] if (root / s).is_dir() for p in (root / s).iterdir() if p.is_dir()}
    if any("images" in where and m in where for where in (names, inside) for m in masks):
        return "segmentation"
    return "image-folder"


# ------------------------------------------------------------------------------------------------------ classification
def _classification(root: Path, size: tuple[int, int]) -> DataSplits:
    folders = {
        split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in SPLIT_NAMES.items()
    }
    top = folders["train"] or root
    classes = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{top}: expected one folder a class, at least two, got {', '.join(classes) or 'none'}; "
            f"other layouts: {', '.join(LAYOUTS[2:])}"
        )
    if len(classes) > 255:
        raise DataError(f"{top}: {len(classes)} classes, at most 255 are supported; use the Python API")
    found: Found = {}
    for split, folder in (
        (s, f) for s, f in (folders.items() if folders["train"] else (("train", root),)) if f is not None
    ):
        other = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if strangers := sorted(set(other) - set(classes)):
            raise DataError(f"{folder}: classes that {top} does not have: {', '.join(strangers[:5])}")
        found[split] = [Pair(p, n) for n, c in enumerate(classes) for p in _pictures(folder / c)]
    found, note = _complete(root, found)
    splits = {s: _load(pairs, size, lambda labels: labels) for s, pairs in found.items()}
    return DataSplits(
        name=root.resolve().name,
        classes=tuple(classes),
        palette=(),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        shift=max(1, min(size) // 16),
        flips="h",
        source={"folder": str(root), "layout": "image-folder", **note},
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
    )


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _complete(root: Path, found: Found) -> tuple[Found, dict[str, str]]:
    """Make the splits that are missing.

    Raises:
        DataError: If there are too few pictures.
    """
    if "val" not in found and "test" in found:
        found["val"] = found.pop("test")
    note = {}
    if "val" not in found:
        order = np.random.default_rng(0).permutation(len(found["train"]))
        pairs = [found["train"][i] for i in order]
        tenth = max(1, len(pairs) // 10)
        found = {"train": pairs[2 * tenth :], "val": pairs[:tenth], "test": pairs[tenth : 2 * tenth]}
        note = {"note": DIVIDED}
    elif "test" not in found:
        found = {**found, "val": found["val"][::2], "test": found["val"][1::2]}
        note = {"note": HALVED}
    if empty := [split for split, pairs in found.items() if not pairs]:
        count = {s: len(p) for s, p in found.items()}
        raise DataError(
            f"{root}: no pictures for {', '.join(empty)} (found {count}); suffixes: {' '.join(IMAGE_SUFFIXES)}"
        )
    return found, note


# -------------------------------------------------------------------------------------------------------- segmentation
def _generic_pairs(root: Path) -> Found:
    found: Found = {}
    for split, names in SPLIT_NAMES.items():
        for n in names:
            for images, masks in (
                *((root / "images" / n, root / m / n) for m in ("masks", "annotations", "labels")),
                *((root / n / "images", root / n / m) for m in ("masks", "annotations", "labels")),
            ):
                if images.is_dir() and masks.is_dir():
                    found[split] = _matched(_pictures(images), masks, lambda p: f"{p.stem}.png")
    if not found:
        flat = next((root / m for m in ("masks", "annotations", "labels") if (root / m).is_dir()), None)
        if flat is not None and (root / "images").is_dir():
            found["train"] = _matched(_pictures(root / "images"), flat, lambda p: f"{p.stem}.png")
    if "train" not in found:
        raise DataError(f"{root}: expected images/train and masks/train, or train/images and train/masks; see layouts")
    return found


def _ade20k_pairs(root: Path) -> Found:
    found: Found = {}
    for split, name in (("train", "training"), ("val", "validation")):
        images, masks = root / "images" / name, root / "annotations" / name
        if not images.is_dir() or not masks.is_dir():
            raise DataError(f"{root}: layout ade20k: expected images/{name} and annotations/{name}")
        found[split] = _matched(_pictures(images), masks, lambda p: f"{p.stem}.png")
    return found


def _cityscapes_pairs(root: Path) -> Found:
    found: Found = {}
    for split in ("train", "val"):
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        if not images.is_dir() or not masks.is_dir():
            raise DataError(f"{root}: layout cityscapes: expected leftImg8bit/{split} and gtFine/{split}")
        pictures = _pictures(images)
        kind = "labelTrainIds" if any(masks.rglob("*_labelTrainIds.png")) else "labelIds"

        def mask(picture: Path, kind: str = kind) -> str:
            return f"{picture.parent.name}/{picture.stem.removesuffix('_leftImg8bit')}_gtFine_{kind}.png"

        found[split] = _matched(pictures, masks, mask)
    return found


def _matched(pictures: Sequence[Path], masks: Path, name: Callable[[Path], str]) -> list[Pair]:
    """Pictures with their masks.

    Raises:
        DataError: If a picture has none.
    """
    pairs = [Pair(p, masks / name(p)) for p in pictures]
    lost = [p.image.name for p in pairs if isinstance(p.label, Path) and not p.label.is_file()]
    if lost:
        example = pairs[[p.image.name for p in pairs].index(lost[0])].label
        raise DataError(
            f"{masks}: {len(lost)} of {len(pairs)} pictures have no mask, first {lost[0]} (looked for {example})"
        )
    return pairs


def _segmentation(root: Path, size: tuple[int, int], kind: str, found: Found) -> DataSplits:
    found, note = _complete(root, found)
    change = {"ade20k": _zero_is_nothing, "cityscapes": _train_ids(found), "segmentation": lambda m: m}[kind]
    splits = {s: _load(pairs, size, change) for s, pairs in found.items()}
    seen = np.zeros(256, bool)
    for split in splits.values():
        seen[np.unique(split.labels.numpy())] = True
    seen[IGNORE] = False
    highest = int(np.flatnonzero(seen).max(initial=0))
    if kind == "cityscapes":
        classes, palette = tuple(CITYSCAPES), tuple(c for _, c in CITYSCAPES.values())
    else:
        classes = _ade20k_names(root) if kind == "ade20k" else ()
        classes = classes or _class_names(root, highest)
        palette = tuple(_colour(n) for n in range(len(classes)))
    if highest >= len(classes):
        raise DataError(f"{root}: masks hold class {highest}, but there are {len(classes)} names; 255 is not looked at")
    return DataSplits(
        name=root.resolve().name,
        classes=classes,
        palette=palette,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flips="h",
        source={"folder": str(root), "layout": kind, **note},
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
    )


def _class_names(root: Path, highest: int) -> tuple[str, ...]:
    path = root / "classes.txt"
    if path.is_file():
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    return tuple(f"class {n}" for n in range(max(highest + 1, 2)))


def _ade20k_names(root: Path) -> tuple[str, ...]:
    """Names of the 150 classes, from the table that comes with the pictures; none without it or with others."""
    path = root / "objectInfo150.txt"
    if (root / "classes.txt").is_file() or not path.is_file():
        return ()
    rows = path.read_text().splitlines()[1:]
    return tuple(row.split("\t")[-1].partition(",")[0].strip() for row in rows if row.strip())


def _zero_is_nothing(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 0, IGNORE, mask - 1).astype(np.uint8)


def _train_ids(found: Found) -> Callable[[np.ndarray], np.ndarray]:
    if any(str(p.label).endswith("_labelTrainIds.png") for p in found["train"]):
        return lambda mask: mask
    table = np.full(256, IGNORE, np.uint8)
    for n, (label_id, _) in enumerate(CITYSCAPES.values()):
        table[label_id] = n
    return lambda mask: table[mask]


def _colour(n: int) -> tuple[int, int, int]:
    """Far apart in hue for neighbouring classes."""
    import colorsys

    r, g, b = colorsys.hsv_to_rgb((n * 0.618034) % 1, 0.65 if n % 2 else 0.45, 0.55 + 0.4 * ((n * 0.37) % 1))
    return round(r * 255), round(g * 255), round(b * 255)


# ------------------------------------------------------------------------------------------------------------ decoding
def _load(pairs: Sequence[Pair], size: tuple[int, int], change: Callable[[Any], Any]) -> Split:
    """Decode every picture and mask.

    Raises:
        DataError: If some cannot be read; names the first few.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise DataError("pictures need Pillow: pip install pillow") from e
    is_dense = isinstance(pairs[0].label, Path)
    images = _array((len(pairs), 3, *size))
    labels = _array((len(pairs), *size)) if is_dense else np.empty(len(pairs), np.uint8)
    broken = []
    for n, pair in enumerate(pairs):
        try:
            with Image.open(pair.image) as picture:
                rgb = picture.convert("RGB")
                rgb = rgb.resize(size[::-1], Image.Resampling.BILINEAR) if is_dense else _middle(rgb, size)
                images[n] = np.asarray(rgb).transpose(2, 0, 1)
            if isinstance(pair.label, Path):
                with Image.open(pair.label) as mask:
                    if mask.mode not in ("L", "P", "I", "I;16", "1"):
                        broken.append(f"{pair.label}: a colour picture ({mask.mode}), expected class numbers")
                        continue
                    small = np.asarray(mask.resize(size[::-1], Image.Resampling.NEAREST))
                    if small.max() > IGNORE:
                        broken.append(
                            f"{pair.label}: holds {small.max()}, class numbers end at 254 (255: not looked at)"
                        )
                        continue
                    labels[n] = change(small.astype(np.uint8))
            else:
                labels[n] = pair.label
        except (OSError, ValueError, SyntaxError) as e:
            broken.append(f"{pair.image}: {e}")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise DataError(f"{len(broken)} of {len(pairs)} pictures cannot be read: {'; '.join(broken[:3])}{more}")
    return Split(_tensor(images), _tensor(labels))


def _middle(picture: Any, size: tuple[int, int]) -> Any:
    """Resize so that the picture covers ``size``, and cut out the middle."""
    from PIL import Image

    h, w = size
    scale = max(h / picture.height, w / picture.width)
    picture = picture.resize(
        (max(w, round(picture.width * scale)), max(h, round(picture.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (picture.width - w) // 2, (picture.height - h) // 2
    return picture.crop((left, top, left + w, top + h))


def _array(shape: tuple[int, ...]) -> np.ndarray:
    """uint8, in memory or mapped from a file without a name that goes with the array."""
    if np.prod(shape, dtype=np.int64) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array))
