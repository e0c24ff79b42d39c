"""The page as text: its data are the gallery's, and nothing in a name gets out of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch
from galleries import CLASSES, make_gallery, make_image
from PIL import Image

from evit_ext.visualize import page
from evit_ext.visualize.heat import COLORS, heat

_VOID = {"meta", "input", "link", "img", "br"}


class Parsed(HTMLParser):
    """The elements of a page; fails where tags do not close in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def data_of(text: str) -> Any:
    return json.loads(Parsed(text).texts["script"][0])


def test_the_data_are_the_gallerys() -> None:
    gallery = make_gallery(2, warning="untrained")
    data = data_of(page.write(gallery))
    assert data["model"] == "deit_micro" and data["warning"] == "untrained"
    assert data["colors"][255] == "#{:02x}{:02x}{:02x}".format(*COLORS[255])
    for photo, found in zip(gallery.photos, data["photos"], strict=True):
        assert found["name"] == photo.name and (found["rows"], found["columns"]) == (2, 4)
        assert [rate["rate"] for rate in found["rates"]] == [0.5, 0.75]  # ascending, as the slider
        assert [best["name"] for best in found["best"]] == [
            CLASSES[number] for number in photo.view.dense.probabilities.argsort(descending=True)
        ]
        for rate in photo.view.rates:
            (written,) = (entry for entry in found["rates"] if entry["rate"] == rate.keep_rate)
            assert written["saved"] == 1 - rate.keep_rate and found["gmacs"] == 4
            for stage, entry in zip(rate.stages, written["stages"], strict=True):
                assert [bit == "1" for bit in entry["kept"]] == stage.kept.flatten().tolist()
                assert entry["levels"] == heat(stage.scores).levels.flatten().tolist()
                assert entry["dropped"] == stage.dropped
        kind, _, encoded = found["source"].partition(";base64,")
        assert kind == "data:image/png"
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert (np.asarray(image) == np.asarray(photo.image)).all()


def test_names_cannot_get_out() -> None:
    name = "</script><script>alert(1)</script>\u2028 @@DATA@@ \"'&amp;"
    gallery = make_gallery(name=name)
    text = page.write(gallery)
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert data_of(text)["photos"][0]["name"] == f"{name} 0"
    assert parsed.texts["title"] == [f"{name} 0: what deit_micro keeps"]
    assert "\u2028" not in parsed.texts["script"][0]
    # Nor with a space behind the name, or by beginning a comment, which some parsers take for an end, too.
    assert "<" not in text.partition('id="data">')[2].partition("</script>")[0]
    assert text.count("</script") == text.count("<script") == 2


def test_nothing_is_fetched_and_only_its_own_script_runs() -> None:
    text = page.write(make_gallery())
    parsed = Parsed(text)
    (policy,) = (
        str(found["content"])
        for tag, found in parsed.elements
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag, number in (("script", 1), ("style", 0)):
        text_of = parsed.texts[tag][number]
        digest = base64.b64encode(hashlib.sha256(text_of.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|url\(|@import", text)
    assert not [found for _, found in parsed.elements if {"src", "href", "style", "onclick"} & set(found)]


def test_every_control_has_a_name() -> None:
    parsed = Parsed(page.write(make_gallery()))
    named = {found["for"] for tag, found in parsed.elements if tag == "label"}
    controls = {found["id"] for tag, found in parsed.elements if tag in ("input", "select")}
    assert controls == named == {"photo", "rate", "stage"}
    assert ("html", {"lang": "en"}) in parsed.elements


def test_a_large_photograph_stays_small() -> None:
    gallery = make_gallery()
    (photo,) = gallery.photos
    smooth = make_image(0, 16, 16).resize((384, 384))
    large = type(gallery)(
        **{**vars(gallery), "photos": [type(photo)("a", smooth, photo.view)]},
    )
    text = page.write(large)
    assert "data:image/jpeg" in text and len(text) < 200_000


def test_scores_that_are_all_one() -> None:
    gallery = make_gallery()
    (photo,) = gallery.photos
    stage = photo.view.rates[0].stages[0]
    stage.scores.fill_(0.25)
    assert torch.isfinite(stage.scores).all()
    entry = data_of(page.write(gallery))["photos"][0]["rates"][1]["stages"][0]
    assert entry["levels"] == [0] * 8 and entry["low"] == entry["high"] == 0.25
