"""The page: one HTML file with sliders over keep rates and stages, which needs no network and no server."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from importlib import resources
from typing import Any

from PIL import Image

from evit_ext.visualize.class_names import most_probable
from evit_ext.visualize.gallery import Gallery, work_saved
from evit_ext.visualize.heat import COLORS, heat
from evit_ext.visualize.photos import Photo
from evit_ext.visualize.views import RateView

# Above this many pixels a photograph goes into the page as JPEG; below, PNG is as small, and exact.
_JPEG_FROM = 128 * 128


def write(gallery: Gallery) -> str:
    """Return the page as text, to be written in UTF-8.

    Nothing is fetched when it is opened, and its content security policy forbids it: only the script and the
    style that are in it may run, and only images that are in it be shown.
    """
    page = resources.files("evit_ext.visualize").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_digest(page, 'style')}'; script-src '{_digest(page, 'script')}'"
    )
    title = gallery.photos[0].name if len(gallery.photos) == 1 else f"{len(gallery.photos)} photographs"
    values = {
        "POLICY": policy,
        "TITLE": html.escape(f"{title}: what {gallery.model} keeps"),
        "DATA": _for_script(_data(gallery)),
    }
    # In one go, so that what is put in is not itself searched.
    return re.sub(r"@@(POLICY|TITLE|DATA)@@", lambda found: values[found[1]], page)


def _digest(page: str, tag: str) -> str:
    """Return the digest by which the policy knows the text of the one <tag> without attributes."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _for_script(data: Any) -> str:
    """Return JSON that cannot end the element it is in, whatever names files and classes have."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(gallery: Gallery) -> dict[str, Any]:
    return {
        "model": gallery.model,
        "weights": gallery.weights,
        "warning": gallery.warning,
        "scores": gallery.scores,
        "colors": [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in COLORS.tolist()],
        "photos": [_photo(gallery, photo) for photo in gallery.photos],
    }


def _photo(gallery: Gallery, photo: Photo) -> dict[str, Any]:
    dense = photo.view.dense
    rows, columns = photo.view.grid
    return {
        "name": photo.name,
        "source": _source(photo.image),
        "width": photo.image.width,
        "height": photo.image.height,
        "rows": rows,
        "columns": columns,
        "gmacs": dense.macs / 1e9,
        "best": _best(gallery, dense),
        "rates": [
            {
                "rate": rate.keep_rate,
                "gmacs": rate.macs / 1e9,
                "saved": work_saved(rate, dense),
                "best": _best(gallery, rate),
                "stages": _stages(rate),
            }
            # Ascending, as a slider does from left to right.
            for rate in sorted(photo.view.rates, key=lambda rate: rate.keep_rate)
        ],
    }


def _stages(rate: RateView) -> list[dict[str, Any]]:
    stages = []
    for stage in rate.stages:
        found = heat(stage.scores)
        stages.append(
            {
                "kept": "".join("1" if kept else "0" for kept in stage.kept.flatten().tolist()),
                "dropped": stage.dropped,
                "fused": stage.fused,
                "groups": None if stage.groups is None else stage.groups.flatten().tolist(),
                "levels": found.levels.flatten().tolist(),
                "low": float(f"{found.low:.3g}"),
                "high": float(f"{found.high:.3g}"),
            }
        )
    return stages


def _best(gallery: Gallery, rate: RateView) -> list[dict[str, Any]]:
    best = most_probable(rate.probabilities, gallery.class_names)
    return [{"name": name, "probability": round(probability, 5)} for name, probability in best]


def _source(image: Image.Image) -> str:
    """Return the image as a data URL."""
    file = io.BytesIO()
    kind = "JPEG" if image.width * image.height > _JPEG_FROM else "PNG"
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
