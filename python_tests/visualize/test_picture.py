"""The picture, pixel by pixel: kept patches as they are, dropped ones faded, scores as colours in order."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import make_gallery, make_image, make_view
from PIL import Image, ImageFont

from evit_ext.visualize import picture
from evit_ext.visualize.gallery import Gallery
from evit_ext.visualize.heat import COLORS, heat
from evit_ext.visualize.photos import Photo


@pytest.mark.parametrize(("width", "height"), [(64, 32), (33, 47), (400, 300)])
def test_kept_patches_are_the_image_and_dropped_ones_faded(width: int, height: int) -> None:
    image, kept = make_image(0, width, height), make_view(3).rates[1].stages[0].kept
    fitted = np.asarray(picture.fitted(image, 240)).astype(int)
    found = np.asarray(picture.kept_picture(image, kept, 240)).astype(int)
    assert found.shape == fitted.shape and max(found.shape) <= 240
    tall, wide = found.shape[:2]
    for y in range(tall):
        for x in range(0, wide, 3):
            patch = kept[int((y + 0.5) * 2 / tall), int((x + 0.5) * 4 / wide)]
            assert (found[y, x] == fitted[y, x]).all() if patch else (found[y, x] > 170).all()


def test_merged_patches_are_of_one_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    groups = torch.tensor([[0, 1, 1], [2, 0, 3]])
    found = np.asarray(picture.merged_picture(image, groups, 36))
    owner = np.repeat(np.repeat(groups.numpy(), 12, axis=0), 12, axis=1)
    assert (found[owner >= 2] == pixels[owner >= 2]).all()
    for token in (0, 1):
        mean = pixels[owner == token].astype(float).mean(axis=0)
        assert (found[owner == token] == np.rint(mean)).all()


def test_levels_rise_with_the_scores_and_colours_with_the_levels() -> None:
    scores = torch.tensor([[0.0, 0.4, math.nan], [0.1, 0.9, 0.10001]])
    found = heat(scores)
    assert found.levels[0, 2] == -1 and found.levels[0, 0] == 0 and found.levels[1, 1] == 255
    order = scores.flatten().nan_to_num(-1).argsort()
    assert (np.diff(found.levels.flatten()[order.numpy()]) >= 0).all()
    assert (found.low, found.high) == (0.0, pytest.approx(0.9))
    assert len(set(found.levels.flatten().tolist())) >= 5
    luminance = COLORS @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()
    assert heat(torch.full((2, 2), 0.5)).levels.tolist() == [[0, 0], [0, 0]]
    assert heat(torch.full((2, 2), math.nan)).levels.tolist() == [[-1, -1], [-1, -1]]


def test_heat_lies_where_the_patches_lie() -> None:
    scores = torch.tensor([[0.1, math.nan], [0.3, 0.2], [0.5, 0.4]])
    found = heat(scores)
    pixels = np.asarray(picture.heat_picture(found, (20, 30)))
    for row in range(3):
        for column in range(2):
            cell = pixels[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10].reshape(-1, 3)
            level = found.levels[row, column]
            expected = picture.PAPER if level < 0 else COLORS[level]
            assert (cell == np.array(expected)).all()


def contains(page: Image.Image, part: Image.Image) -> list[tuple[int, int]]:
    """Where a picture lies on a page, as (x, y)."""
    whole, small = np.asarray(page), np.asarray(part)
    height, width = small.shape[:2]
    found = []
    for y, x in np.argwhere((whole == small[0, 0]).all(axis=2)):
        there = whole[y : y + height, x : x + width]
        if there.shape == small.shape and (there == small).all():
            found.append((int(x), int(y)))
    return found


def test_the_large_picture_has_every_stage_of_every_rate() -> None:
    gallery = make_gallery()
    (photo,) = gallery.photos
    page = picture.draw(gallery)
    assert len(contains(page, picture.fitted(photo.image, picture.LARGE))) == 2
    places = []
    for rate in photo.view.rates:
        for stage in rate.stages:
            shown = picture.kept_picture(photo.image, stage.kept, picture.LARGE)
            ((x, y),) = contains(page, shown)
            ((below_x, below_y),) = contains(page, picture.heat_picture(heat(stage.scores), shown.size))
            assert below_x == x and below_y > y + shown.height
            places.append((y, x))
    assert places == sorted(places) and len(set(places)) == 4
    plain = np.asarray(page)
    warned = np.asarray(picture.draw(make_gallery(warning="untrained weights")))
    assert warned.shape[0] > plain.shape[0]
    assert not (plain == (192, 42, 42)).all(axis=2).any() and (warned == (192, 42, 42)).all(axis=2).any()


@pytest.mark.parametrize(("photos", "across"), [(2, 1), (5, 2)])
def test_the_contact_sheet_has_every_photograph(photos: int, across: int) -> None:
    gallery = make_gallery(photos)
    page = picture.draw(gallery)
    places = []
    for photo in gallery.photos:
        found = contains(page, picture.fitted(photo.image, picture.SMALL))
        assert len(found) == 2 and found[0][0] == found[1][0]  # a row for each keep rate
        places.append(found[0])
        for rate, (x, y) in zip(photo.view.rates, found, strict=True):
            stages = [
                contains(page, picture.kept_picture(photo.image, s.kept, picture.SMALL)) for s in rate.stages
            ]
            # To the right of the photograph, in the order of the stages.
            assert all(any(place[1] == y for place in stage) for stage in stages)
            xs = [min(place[0] for place in stage if place[1] == y) for stage in stages]
            assert x < xs[0] < xs[1]
    assert len({x for x, _ in places}) == across
    assert [(y, x) for x, y in places] == sorted((y, x) for x, y in places)


def test_long_names_stay_on_the_page() -> None:
    short, long = (picture.draw(make_gallery(3, name=name)) for name in ("a", "a" * 400))
    assert short.size == long.size
    assert (np.asarray(long)[:, -24:] == 255).all()


def test_endings_and_old_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    picture.check_ending(Path("a.PNG"))
    with pytest.raises(ValueError, match=r"must be a .png, .jpg, .jpeg, .webp file, got 'a.txt'"):
        picture.check_ending(Path("a.txt"))

    def load_default() -> None:
        """Of Pillow before 10.1: it takes no size."""

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "evit_ext\[viz\]"'):
        picture.font(17)


@pytest.mark.parametrize(("name", "longest"), [("a.JPG", 65500), ("a.jpeg", 65500), ("a.webp", 16383)])
def test_formats_have_room_for_so_much(tmp_path: Path, name: str, longest: int) -> None:
    """The longest side is one that Pillow writes; and a longer one, which is refused before, it would not."""
    largest, larger = Image.new("RGB", (longest, 1)), Image.new("RGB", (longest + 1, 1))
    picture.save(largest, tmp_path / name)
    assert Image.open(tmp_path / name).size == largest.size
    message = f"a {Path(name).suffix} picture has sides of up to {longest} pixels.* {longest + 1} x 1"
    with pytest.raises(ValueError, match=message):
        picture.save(larger, tmp_path / f"larger{name}")
    assert not (tmp_path / f"larger{name}").exists()
    with pytest.raises((OSError, ValueError)):
        larger.save(tmp_path / f"larger{name}")
    picture.save(larger, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == larger.size


def test_galleries_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least one photograph"):
        Gallery("a", "b", "", "c", None, [])
    view = make_view()
    other = type(view)(view.grid, view.dense, view.rates[:1])
    with pytest.raises(ValueError, match="same keep rates"):
        Gallery("a", "b", "", "c", None, [Photo("a", make_image(), view), Photo("b", make_image(), other)])
