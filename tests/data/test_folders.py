"""Folders of real picture files, made here, become splits; what is wrong with one is said, with the file's name."""

import numpy as np
import pytest

from cpd_fast.data import IGNORE, folder_data
from cpd_fast.data import folders as module
from cpd_fast.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def picture(path, value, size=(12, 10), mode="RGB"):
    """A file of one colour; ``size`` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def mask(path, left, right, size=(12, 10), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size[::-1], left, np.uint8)
    pixels[:, size[0] // 2 :] = right
    made = Image.fromarray(pixels)
    (made if mode == "L" else made.convert(mode)).save(path)


def classes(root, splits=("train", "val", "test"), count=2, suffix="png"):
    for split in splits:
        for name, colour in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
            for n in range(count):
                picture(root / split / name / f"{n}.{suffix}", colour)


def test_image_folder(tmp_path):
    classes(tmp_path)
    data = folder_data(tmp_path, 8)
    assert data.classes == ("cat", "dog") and not data.is_segmentation
    assert tuple(data.train.images.shape) == (4, 3, 8, 8) and data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images[0, 0].eq(250).all() and data.train.images[3, 2].eq(250).all()  # RGB, in the right class
    assert len(data.val) == len(data.test) == 4 and "note" not in data.source


def test_missing_test_split_is_half_of_val(tmp_path):
    classes(tmp_path, ("training", "validation"))
    data = folder_data(tmp_path, 8)
    assert len(data.val) == len(data.test) == 2 and data.source["note"] == module.HALVED


def test_folder_without_splits_is_divided_and_nothing_is_in_two(tmp_path):
    for n in range(20):
        for name in ("cat", "dog"):
            picture(tmp_path / name / f"{n}.png", (n * 10, 200 if name == "dog" else 0, 0))
    data = folder_data(tmp_path, 8)
    assert [len(s) for s in (data.train, data.val, data.test)] == [32, 4, 4] and data.source["note"] == module.DIVIDED
    seen = [tuple(i[:2, 0, 0].tolist()) for s in (data.train, data.val, data.test) for i in s.images]
    assert len(set(seen)) == 40
    assert all(
        (i[1, 0, 0] > 100) == (label == 1) for i, label in zip(data.train.images, data.train.labels, strict=True)
    )


def test_the_middle_is_cut_out(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    for split in ("train", "val"):
        for name in ("a", "b"):
            for n in range(2):
                path = tmp_path / split / name / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(wide).save(path)
    assert folder_data(tmp_path, 10).train.images.eq(255).all()


@pytest.mark.parametrize("layout", ["outside", "inside", "flat"])
def test_segmentation_folder(tmp_path, layout):
    splits = ("train", "val") if layout != "flat" else ("",)
    for split in splits:
        for n in range(10 if layout == "flat" else 2):
            images, masks = {
                "outside": (f"images/{split}", f"masks/{split}"),
                "inside": (f"{split}/images", f"{split}/labels"),
                "flat": ("images", "annotations"),
            }[layout]
            picture(tmp_path / images / f"{n}.jpg", (200, 100, 0))
            mask(tmp_path / masks / f"{n}.png", 1, IGNORE)
    (tmp_path / "classes.txt").write_text("sky\nland\nsea\n")
    data = folder_data(tmp_path, 8)
    assert data.classes == ("sky", "land", "sea") and len(data.palette) == 3 and data.is_segmentation
    assert data.train.labels[0, :, :4].eq(1).all() and data.train.labels[0, :, 4:].eq(IGNORE).all()
    assert data.class_weights().isfinite().all()


def test_palette_masks_hold_numbers(tmp_path):
    for split in ("train", "val"):
        for n in range(2):
            picture(tmp_path / f"images/{split}/{n}.jpg", (1, 2, 3))
            path = tmp_path / f"masks/{split}/{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Image.new("P", (8, 8), 2)
            made.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0])
            made.save(path)
    assert folder_data(tmp_path, 8).train.labels.eq(2).all()


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        for n in range(2):
            picture(tmp_path / f"images/{split}/ADE_{n}.jpg", (1, 2, 3))
            mask(tmp_path / f"annotations/{split}/ADE_{n}.png", 0, 3)
    data = folder_data(tmp_path, 8)
    assert data.source["layout"] == "ade20k" and len(data.classes) == 3
    assert data.train.labels[0, 0, 0] == IGNORE and data.train.labels[0, 0, -1] == 2  # 0 is nothing, 1 is class 0
    names = ("wall", "building, edifice", "sky")
    rows = [f"{n}\t0.1\t1\t1\t{name}" for n, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    assert folder_data(tmp_path, 8).classes == ("wall", "building", "sky")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert folder_data(tmp_path, 8).classes == ("a", "b", "c")


@pytest.mark.parametrize(("kind", "road", "car"), [("labelIds", 7, 26), ("labelTrainIds", 0, 13)])
def test_cityscapes(tmp_path, kind, road, car):
    for split in ("train", "val"):
        for n in range(2):
            picture(tmp_path / f"leftImg8bit/{split}/ulm/ulm_{n}_leftImg8bit.png", (1, 2, 3))
            mask(tmp_path / f"gtFine/{split}/ulm/ulm_{n}_gtFine_{kind}.png", road, car)
    data = folder_data(tmp_path, (4, 8))
    assert len(data.classes) == 19 and tuple(data.train.images.shape[1:]) == (3, 4, 8)
    assert data.classes[data.train.labels[0, 0, 0]] == "road" and data.classes[data.train.labels[0, 0, -1]] == "car"


def test_large_data_is_mapped(tmp_path, monkeypatch):
    classes(tmp_path)
    small = folder_data(tmp_path, 8)
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    assert folder_data(tmp_path, 8).train.images.equal(small.train.images)


def broken_file(root):
    classes(root)
    (root / "train/cat/0.png").write_bytes(b"no picture")


def other_class(root):
    classes(root)
    picture(root / "val/bird/0.png", (1, 2, 3))


def no_masks(root):
    classes(root, (), 0)
    for n in range(2):
        picture(root / f"images/train/{n}.jpg", (1, 2, 3))
    mask(root / "masks/train/0.png", 0, 1)


def colour_mask(root):
    for split in ("train", "val"):
        for n in range(2):
            picture(root / f"images/{split}/{n}.jpg", (1, 2, 3))
            mask(root / f"masks/{split}/{n}.png", 0, 1, mode="RGB")


def too_few_names(root):
    for split in ("train", "val"):
        for n in range(2):
            picture(root / f"images/{split}/{n}.jpg", (1, 2, 3))
            mask(root / f"masks/{split}/{n}.png", 0, 7)
    (root / "classes.txt").write_text("a\nb\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "expected one folder a class, at least two, got none; other layouts: segmentation"),
        (lambda root: classes(root, ("train", "val"), 0), "expected one folder a class"),
        (broken_file, r"1 of 4 pictures cannot be read: .*cat/0\.png: cannot identify"),
        (other_class, "classes that .*train does not have: bird"),
        (no_masks, r"1 of 2 pictures have no mask, first 1\.jpg \(looked for .*masks/train/1\.png\)"),
        (colour_mask, r"masks/train/0\.png: a colour picture \(RGB\), expected class numbers"),
        (too_few_names, "masks hold class 7, but there are 2 names"),
    ],
    ids=["empty", "no pictures", "broken", "class", "no mask", "colour", "names"],
)
def test_faults_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        folder_data(tmp_path, 8)


def test_folder_and_layout_must_exist(tmp_path):
    with pytest.raises(DataError, match="no such folder of pictures"):
        folder_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="layout 'coco' is unknown; choose one of auto, image-folder, segmentation"):
        folder_data(tmp_path, layout="coco")
