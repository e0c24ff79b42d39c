"""Which files of a folder are images, of which class, and what is said about the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from timm.utils.misc import natural_key as of_timm

from evit_ext.data.listing import ListedImage, find_photos, hold_out, list_images, natural_key


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(root: Path) -> list[tuple[str, str]]:
    return [(os.path.relpath(image.path, root), image.class_name) for image in list_images(root).images]


def test_the_first_level_is_the_class(tmp_path: Path) -> None:
    put(tmp_path / "cat/2023/x.jpg", tmp_path / "coffee/2024/may/y.jpg", tmp_path / "cat/z.jpg")
    found = list_images(tmp_path)
    assert found.classes == ["cat", "coffee"]
    assert {image.class_name for image in found.images if "2024" in image.path} == {"coffee"}
    (words,) = found.words()
    assert words.endswith("belong to the class of the first: cat/2023/x.jpg is of class cat")


def test_all_that_pillow_reads_and_natural_order(tmp_path: Path) -> None:
    names = ["10.webp", "2.tif", "1.BMP", "3.gif", "4.avif", "5.jp2", "6.jfif"]
    put(*(tmp_path / "a" / name for name in names))
    assert [path for path, _ in listed(tmp_path)] == [
        "a/1.BMP", "a/2.tif", "a/3.gif", "a/4.avif", "a/5.jp2", "a/6.jfif", "a/10.webp",
    ]  # fmt: skip


def test_what_is_skipped_is_said(tmp_path: Path) -> None:
    put(tmp_path / "a/1.jpg", tmp_path / "a/note.txt", tmp_path / "a/._1.jpg", tmp_path / "a/raw.heic")
    put(tmp_path / ".ipynb_checkpoints/1.jpg", tmp_path / "__MACOSX/._2.jpg", tmp_path / "a/README")
    put(*(tmp_path / "b" / f"{number}.heic" for number in range(7)), tmp_path / "list.csv")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    found = list_images(tmp_path)
    assert [image.path for image in found.images] == [str(tmp_path / "a/1.jpg")]
    said = "\n".join(found.words())
    assert "1 file skipped, Pillow reads no .txt (a/note.txt)" in said
    assert (
        "8 files skipped, Pillow reads no .heic (a/raw.heic, b/0.heic, b/1.heic, b/2.heic, b/3.heic and"
        in said
    )
    assert "3 files skipped, hidden (.ipynb_checkpoints, __MACOSX/._2.jpg, a/._1.jpg)" in said
    assert "2 files skipped, class folders without an image (__MACOSX, b)" in said
    assert "neither files nor folders (a/pipe.jpg)" in said and "links to nothing (a/gone.png)" in said
    assert "links to a folder above them (a/loop)" in said and "the name has no ending (a/README)" in said


def test_class_folders_that_look_the_same(tmp_path: Path) -> None:
    put(tmp_path / "caf\u00e9/1.jpg", tmp_path / "cafe\u0301/1.jpg")
    with pytest.raises(ValueError, match="two folders for the class café"):
        list_images(tmp_path)


def test_links_that_would_mix_classes(tmp_path: Path) -> None:
    """A link to the data set itself, in a class, would have all images be of that class, too."""
    put(tmp_path / "a/1.jpg", tmp_path / "a/old/2.jpg", tmp_path / "b/3.jpg", tmp_path / "other/4.jpg")
    (tmp_path / "data").mkdir()
    data = tmp_path / "data"
    (data / "a").symlink_to(tmp_path / "a")  # the usual way to choose classes
    (data / "b").symlink_to(tmp_path / "b")
    (data / "again").symlink_to(data)
    (tmp_path / "a/whole").symlink_to(data)
    (tmp_path / "a/same").symlink_to(tmp_path / "a/old")
    found = list_images(data)
    names = [(Path(image.path).name, image.class_name) for image in found.images]
    assert sorted(names) == [("1.jpg", "a"), ("2.jpg", "a"), ("3.jpg", "b")]
    said = "\n".join(found.words())
    assert "2 files skipped, links to a folder above them (" in said
    assert "1 file skipped, links to a folder of the same class (a/" in said
    (tmp_path / "b/more").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="would be of two classes, (a and b|b and a): a link leads"):
        list_images(data)
    (tmp_path / "b/more").unlink()
    (data / "c").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match="would be of two classes, (b and c|c and b): a link leads"):
        list_images(data)


def test_sorted_as_timm_does() -> None:
    texts = ["a10", "A9", "b", "1/2", "", "x007"]
    assert [natural_key(text) for text in texts] == [of_timm(text) for text in texts]
    assert natural_key("²") == ["²"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd5\xd5"))
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    (image,) = list_images(tmp_path).images
    assert image.class_name == "\\xd5\\xd5" and Path(image.path).is_file()


def test_holding_out(tmp_path: Path) -> None:
    images = [ListedImage(f"/root/{name}/{n}.jpg", name) for name in ("a", "b") for n in range(10)]
    images.append(ListedImage("/root/c/1.jpg", "c"))
    train, val = hold_out(images, 0.2, "/root")
    assert sorted([*train, *val]) == sorted(images)
    assert [sum(image.class_name == name for image in val) for name in "abc"] == [2, 2, 0]
    moved = [ListedImage(image.path.replace("/root", "/other"), image.class_name) for image in images]
    assert [image.path[6:] for image in hold_out(moved, 0.2, "/other")[1]] == [i.path[5:] for i in val]
    assert hold_out(list(reversed(images)), 0.2, "/root")[1] == list(reversed(val))
    # A new image moves none of the others' training images away, or few.
    more = [*images, ListedImage("/root/a/new.jpg", "a")]
    assert len(set(hold_out(more, 0.2, "/root")[1]) - set(val)) <= 1
    assert hold_out(images[:2], 0.01, "/root")[1] and hold_out(images[:2], 0.99, "/root")[0]
    assert hold_out(images, 1.0, "/root") == ([], images)


def test_photos_of_paths(tmp_path: Path) -> None:
    put(tmp_path / "photos/10.jpg", tmp_path / "photos/9.webp", tmp_path / "photos/sub/1.jpg")
    put(tmp_path / "odd name", tmp_path / "photos/a.txt")
    found = find_photos([tmp_path / "photos", tmp_path / "odd name"])
    assert [Path(image.path).name for image in found.images] == ["9.webp", "10.jpg", "odd name"]
    said = "\n".join(found.words())
    assert "folders in the folder" in said and "Pillow reads no .txt" in said
    with pytest.raises(ValueError, match="no image files, such as .jpg.*Pillow reads no .txt"):
        (tmp_path / "texts").mkdir()
        put(tmp_path / "texts/a.txt")
        find_photos([tmp_path / "texts"])
