"""The page in a headless Chromium: sliders by mouse's event, by keyboard and by address; widths; dark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from galleries import make_gallery, make_view

from evit_ext.visualize import page, picture
from evit_ext.visualize.views import StageView

if find_browser() is None:
    pytest.skip("no Chromium or Chrome is installed", allow_module_level=True)

_RIGHT, _LEFT, _TAB = ("ArrowRight", 39), ("ArrowLeft", 37), ("Tab", 9)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.write(make_gallery(2, warning="untrained weights")), encoding="utf-8")
    return path


@pytest.fixture
def browser(file: Path) -> Iterator[Browser]:
    with Browser(file) as browser:
        yield browser
        assert browser.problems == []


def text(browser: Browser, name: str) -> str:
    return str(browser.js(f"document.getElementById('{name}').textContent"))


def drawn(browser: Browser, name: str) -> str:
    return str(browser.js(f"document.getElementById('{name}').toDataURL()"))


def patch_is_faded(browser: Browser, row: int, column: int) -> bool:
    """Whether the middle of a patch, dark in the image, is light in the picture of what is kept."""
    light = browser.js(
        "(() => { const c = document.getElementById('kept');"
        f"const at = (n, size, of) => Math.floor((n + 0.5) * size / of);"
        f"const p = c.getContext('2d').getImageData(at({column}, c.width, 4), at({row}, c.height, 2), 1, 1);"
        "return Math.min(...p.data.slice(0, 3)); })()"
    )
    return int(light) > 170


def check_patches(browser: Browser, photo: int, rate: int, stage: int) -> None:
    kept = make_view(photo).rates[rate].stages[stage - 1].kept
    faded = [[patch_is_faded(browser, row, column) for column in range(4)] for row in range(2)]
    assert faded == (~kept).tolist()


def test_keyboard_alone(browser: Browser) -> None:
    # At first: the higher of two keep rates (the slider ascends), the last stage.
    assert text(browser, "rate-text") == "0.75" and text(browser, "stage-text") == "2 of 2"
    check_patches(browser, 0, 0, 2)
    focused = "document.activeElement.id"
    browser.press(*_TAB)
    assert browser.js(focused) == "photo"
    browser.press(*_TAB)
    assert browser.js(focused) == "rate"
    kept, heat = drawn(browser, "kept"), drawn(browser, "heat")
    browser.press(*_LEFT)
    assert text(browser, "rate-text") == "0.5" and text(browser, "saved") == "50 %"
    assert text(browser, "best-title") == "at keep rate 0.5"
    assert drawn(browser, "kept") != kept and drawn(browser, "heat") != heat
    check_patches(browser, 0, 1, 2)
    assert browser.js("document.getElementById('rate').getAttribute('aria-valuetext')") == "0.5"
    browser.press(*_TAB)
    assert browser.js(focused) == "stage"
    browser.press(*_LEFT)
    assert text(browser, "stage-text") == "1 of 2"
    check_patches(browser, 0, 1, 1)
    browser.press(*_LEFT)
    assert text(browser, "stage-text") == "before the first"
    assert text(browser, "told") == "Keep rate 0.5: all 8 patches, before the first stage."
    assert drawn(browser, "kept") == drawn(browser, "seen")
    browser.press(*_RIGHT)
    check_patches(browser, 0, 1, 1)
    assert browser.js("location.hash") == "#photo=1&rate=0.5&stage=1"


def test_another_photograph(browser: Browser) -> None:
    browser.js(
        "(() => { const s = document.getElementById('photo'); s.value = 1;"
        "s.dispatchEvent(new Event('input')); })()"
    )
    assert text(browser, "name") == "photo 1"
    check_patches(browser, 1, 0, 2)


def test_the_address_says_what_is_shown(file: Path) -> None:
    with Browser(file, "photo=2&rate=0.5&stage=1") as browser:
        assert text(browser, "name") == "photo 1" and text(browser, "rate-text") == "0.5"
        check_patches(browser, 1, 1, 1)
        browser.js("location.hash = '#rate=0.75&stage=0'")
        browser.wait("document.getElementById('stage-text').textContent === 'before the first'")
        assert text(browser, "rate-text") == "0.75" and text(browser, "name") == "photo 0"
        browser.js("location.hash = '#photo=99&rate=7&stage=99'")
        browser.wait("document.getElementById('stage-text').textContent === '2 of 2'")
        assert text(browser, "name") == "photo 0" and text(browser, "rate-text") == "0.75"
        assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_it_fits_the_width_and_can_be_read(file: Path, width: int, dark: bool) -> None:
    with Browser(file, width=width, dark=dark) as browser:
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js("document.getElementById('kept').getBoundingClientRect().width") >= 120
        # Contrast of all text with the page, and of faint text with the cards, as WCAG reckons it.
        contrast = browser.js(
            """(() => {
              const light = (color) => {
                const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((value) => {
                  const part = value / 255;
                  return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const style = (selector) => getComputedStyle(document.querySelector(selector));
              const pairs = [
                [style('body').color, style('body').backgroundColor],
                [style('#model').color, style('body').backgroundColor],
                [style('figcaption').color, style('.card').backgroundColor],
                [style('#saved').color, style('.card').backgroundColor],
                [style('#warning').color, style('#warning').backgroundColor],
              ];
              return Math.min(...pairs.map(([ink, paper]) => {
                const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
                return (high + 0.05) / (low + 0.05);
              }));
            })()"""
        )
        assert contrast >= 4.5
        paper = browser.js("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(18, 21, 28)") is dark


def test_what_names_hold_is_not_run(file: Path) -> None:
    with Browser(file) as browser:
        assert "</script>" in str(browser.js("document.getElementById('best').textContent"))
        assert browser.js("document.title") != "broken in"
        # Nor could it, were it let in: the policy knows the page's own script only.
        browser.js(
            "(() => { const s = document.createElement('script');"
            "s.textContent = 'document.title = \"broken in\"'; document.body.append(s); })()"
        )
        assert browser.js("document.title") != "broken in"


def test_merged_patches_have_the_mean_colour_of_their_group(tmp_path: Path) -> None:
    groups = torch.tensor([[0, 1, 1, 2], [0, 3, 1, 4]])
    stage = StageView(torch.ones(2, 4, dtype=torch.bool), torch.full((2, 4), math.nan), 3, False, groups)
    gallery = make_gallery()
    (photo,) = gallery.photos
    view = replace(photo.view, rates=(replace(photo.view.rates[0], stages=(stage,)),))
    path = tmp_path / "page.html"
    path.write_text(page.write(replace(gallery, photos=[replace(photo, view=view)])), encoding="utf-8")
    with Browser(path) as browser:
        *pixels, width, height = browser.js(
            "(() => { const c = document.getElementById('kept');"
            "const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return [...p, c.width, c.height]; })()"
        )
        assert "merged into others in it" in text(browser, "kept-text")
        assert browser.problems == []
    shown = np.array(pixels).reshape(height, width, 4)[..., :3]
    scale = width // photo.image.width
    expected = np.asarray(picture.merged_picture(photo.image, groups, max(photo.image.size)), dtype=int)
    assert np.abs(shown[::scale, ::scale] - expected).max() <= 1  # both are rounded
