"""Image folders: classes, splits and channels; what cannot be read is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnify.comparing.image_folder import read_image_folder
from bnify.errors import SpecError


def write_images(
    folder: Path, classes: str = "ab", count: int = 5, mode: str = "RGB", form: str = "png"
) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            level = 100 * classes.index(name) + i
            image = Image.new("RGB", (9, 6), (level, 0, 0) if mode == "RGB" else (level,) * 3)
            image.convert(mode).save(folder / name / f"{i}.{form}")


def test_a_folder_a_class_is_split_within_each_class(tmp_path: Path):
    write_images(tmp_path, "abc", count=10)
    write_images(tmp_path, "d", count=3)  # rare, and in every part all the same
    parts, classes, notes = read_image_folder(tmp_path, 8, seed=0)
    assert classes == 4
    assert notes == ()
    assert [len(part.labels) for part in parts] == [19, 7, 7]
    for part in parts:
        assert part.images.shape[1:] == (3, 8, 8)
        assert sorted(set(part.labels.tolist())) == [0, 1, 2, 3]
    everything = sorted(
        (int(label), int(image[0, 0, 0]))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert everything == sorted(
        (label, (100 * label + i) % 256 if label < 3 else i)
        for label, count in ((0, 10), (1, 10), (2, 10), (3, 3))
        for i in range(count)
    )


def test_split_folders_are_kept_apart(tmp_path: Path):
    for name, count in (("train", 6), ("validation", 3), ("test", 2)):
        write_images(tmp_path / name, count=count)
    parts, classes, notes = read_image_folder(tmp_path, 4, seed=0)
    assert ([len(part.labels) for part in parts], classes, notes) == ([12, 6, 4], 2, ())


@pytest.mark.parametrize(
    ("there", "sizes", "note"),
    [
        ((), [12, 4, 4], "validation and test data are a fifth each of train/"),
        (("val",), [16, 6, 4], "test data are a fifth of train/: they have no folder"),
        (("test",), [16, 4, 6], "validation data are a fifth of train/: they have no folder"),
    ],
)
def test_a_part_without_a_folder_is_a_fifth_of_train(
    tmp_path: Path, there: tuple, sizes: list, note: str
):
    write_images(tmp_path / "train", count=10)
    for name in there:
        write_images(tmp_path / name, count=3)
    parts, _, notes = read_image_folder(tmp_path, 4, seed=1)
    assert [len(part.labels) for part in parts] == sizes
    assert notes == (note,)
    levels = [int(image[0, 0, 0]) for part in parts for image in part.images]
    in_train = [level for level in levels if level % 100 < 10]
    assert len(in_train) >= 20


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I", "I;16"])
@pytest.mark.parametrize("size", [1, 5])
def test_images_that_are_all_grey_get_one_channel(tmp_path: Path, mode: str, size: int):
    write_images(tmp_path, mode="L", form="tif")
    for path in tmp_path.rglob("*.tif"):
        with Image.open(path) as image:
            image.load()
        if mode.startswith("I"):
            wide = np.asarray(image).astype(np.uint16) * 257
            image = Image.fromarray(wide.astype(np.int32) if mode == "I" else wide)
        else:
            image = image.convert(mode)
        image.save(path)
        with Image.open(path) as written:
            assert written.mode == mode
    parts, _, _ = read_image_folder(tmp_path, size, seed=0)
    assert all(part.images.shape[1:] == (1, size, size) for part in parts)
    if mode != "1":
        levels = {int(image[0, 0, 0]) for part in parts for image in part.images}
        assert levels == {*range(5), *range(100, 105)}


def test_one_coloured_image_keeps_three_channels_for_all(tmp_path: Path):
    write_images(tmp_path, mode="L")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a" / "0.png")
    parts, _, _ = read_image_folder(tmp_path, 4, seed=0)
    assert all(part.images.shape[1] == 3 for part in parts)


def test_other_files_are_left_out_and_said(tmp_path: Path):
    write_images(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "__pycache__").mkdir()
    _, classes, notes = read_image_folder(tmp_path, 4, seed=0)
    assert classes == 2
    assert notes == (f"1 files in {tmp_path.name}/ are no images and were left out",)


@pytest.mark.parametrize("form", ["png", "jpg", "bmp", "gif", "webp", "tif", "ppm"])
def test_the_usual_formats_are_read(tmp_path: Path, form: str):
    write_images(tmp_path, form=form)
    parts, _, _ = read_image_folder(tmp_path, 4, seed=0)
    assert sum(len(part.labels) for part in parts) == 10


def test_an_image_that_hides_postscript_is_not_opened(tmp_path: Path):
    write_images(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(SpecError, match=r"0\.png cannot be read: UnidentifiedImageError"):
        read_image_folder(tmp_path, 4, seed=0)


@pytest.mark.parametrize("keep", [0, 20, 50])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, keep: int):
    write_images(tmp_path)
    path = tmp_path / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SpecError) as caught:
        read_image_folder(tmp_path, 4, seed=0)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_classes_and_parts_are_refused(tmp_path: Path):
    write_images(tmp_path / "one", "a")
    with pytest.raises(SpecError, match="has 1 class folders"):
        read_image_folder(tmp_path / "one", 4, seed=0)

    write_images(tmp_path / "less" / "train", "abc")
    write_images(tmp_path / "less" / "test", "ab")
    with pytest.raises(SpecError, match="test has no images of the class c"):
        read_image_folder(tmp_path / "less", 4, seed=0)

    write_images(tmp_path / "more" / "train", "ab")
    write_images(tmp_path / "more" / "val", "abc")
    with pytest.raises(SpecError, match="val has one class more: c"):
        read_image_folder(tmp_path / "more", 4, seed=0)

    write_images(tmp_path / "empty", "ab")
    (tmp_path / "empty" / "c").mkdir()
    with pytest.raises(SpecError, match="c has no image"):
        read_image_folder(tmp_path / "empty", 4, seed=0)

    write_images(tmp_path / "both" / "train")
    write_images(tmp_path / "both" / "val")
    write_images(tmp_path / "both" / "validation")
    with pytest.raises(SpecError, match="there are both"):
        read_image_folder(tmp_path / "both", 4, seed=0)

    write_images(tmp_path / "untrained" / "test")
    write_images(tmp_path / "untrained" / "val")
    with pytest.raises(SpecError, match=r"has val/ but no train/"):
        read_image_folder(tmp_path / "untrained", 4, seed=0)

    write_images(tmp_path / "few", "ab", count=2)
    with pytest.raises(SpecError, match="a has 2 images: too few to split"):
        read_image_folder(tmp_path / "few", 4, seed=0)


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_images(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SpecError, match="needs Pillow") as caught:
        read_image_folder(tmp_path, 4, seed=0)
    assert caught.value.hint == "pip install pillow"
