"""``evit visualize``: which patches of a photograph a model keeps, as a picture and as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import timm.data
import torch

from evit_ext._util.files import replacing
from evit_ext.cli.options import (
    chosen_device,
)
from evit_ext.cli.output import check_writable, say_next, words_for
from evit_ext.cli.trained import (
    build,
    class_names,
    configuration,
    load_weights,
    name_model,
    preparation,
    shown_names,
)
from evit_ext.data.batches import transformed
from evit_ext.data.images import ImageLimits, Unreadable, printable, read_image
from evit_ext.data.listing import find_photos
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig

if TYPE_CHECKING:
    from evit_ext.visualize.photos import Photo

_PAGE_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
_AT_ONCE = 16


_UNTRAINED = "untrained weights: the patches mean nothing"


def run(options: argparse.Namespace) -> None:
    # Imported here, because it takes a while.
    from evit_ext.visualize import gallery, page, photos, picture, views

    # These checks come first, because the errors would otherwise appear only after the model has run.
    if options.most < 1:
        raise ValueError(f"expected --most of at least 1, got {options.most}")
    output = options.output
    if output is None and options.html is None:
        output = Path("evit.png")
    if output is not None:
        picture.check_ending(output)
        picture.font(12)
    for path in (output, options.html):
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the file to write")
        if path is not None:
            check_writable(path)
    found = find_photos(options.photos)
    for words in found.words():
        _tell(words)
    files = [image.path for image in found.images]
    if len(files) > options.most:
        _tell(f"there are {len(files)} photographs; the first {options.most} are shown: see --most")
        files = files[: options.most]

    name_model(options, None)
    config = configuration(options)
    known_names = class_names(options, config)
    torch.manual_seed(0)  # the same random weights each time
    model: Any = build(config, options, known_names)
    loaded = load_weights(model, options)
    warning = _UNTRAINED if options.random_weights else ""
    if loaded.missing:
        _tell(loaded.words)
        warning = f"{loaded.missing} tensors of the weights are untrained, missing in the file"
    labels = shown_names(known_names, int(getattr(model, "num_classes", 0)))
    image_settings = _image(model, config)
    rates = _rates(model, options)
    device = chosen_device(options)
    model = model.to(device).eval()
    eye = photos.Eye(image_settings)
    limits = ImageLimits(config.max_image_pixels, eye.shorter_side)
    seen, names = [], []
    for file in files:
        image = read_image(partial(_open, file), file, limits)
        view = image if isinstance(image, Unreadable) else transformed(image, eye.see, file)
        if isinstance(view, Unreadable):
            if len(files) == 1:
                raise ValueError(f"{view.path} cannot be read: {view.reason}")
            _tell(f"{view.path} cannot be read and is left out: {view.reason}")
            continue
        seen.append(view)
        names.append(printable(Path(file).name))
    if not seen:
        raise ValueError(f"none of {len(files)} photographs could be read")
    shown: list[Photo] = []
    for first in range(0, len(seen), _AT_ONCE):
        some = seen[first : first + _AT_ONCE]
        for tensor, view in zip(
            some, views.view_images(model, torch.stack(some).to(device), rates), strict=True
        ):
            shown.append(photos.Photo(names[len(shown)], eye.show(tensor), view))
    if warning:
        _tell(warning)
    everything = gallery.Gallery(
        config.model, loaded.words.partition("\n")[0], warning, views.meaning_of_scores(model), labels, shown
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(picture.draw(everything), output)
        print(f"{output}: {_count(shown)}, keep rate {' '.join(f'{rate:g}' for rate in rates)}")
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.html) as target:
            target.write(page.write(everything))
        print(f"{options.html}: {_count(shown)}, keep rate {' '.join(f'{rate:g}' for rate in rates)}")
    say_next(["evit", "export", *words_for(options, config.model), "--format", "onnx"])


def _open(file: str) -> IO[bytes]:
    return open(file, "rb")


def _count(photos: Sequence[Photo]) -> str:
    return photos[0].name if len(photos) == 1 else f"{len(photos)} photographs"


def _tell(text: str) -> None:
    print(f"evit visualize: {text}", file=sys.stderr)


def _rates(model: Any, options: argparse.Namespace) -> list[float]:
    """Return the keep rates to show, highest first; all are checked before anything is computed."""
    rates = options.keep_rates or (list(_PAGE_RATES) if options.html is not None else keep_rates(model))
    if not rates:
        raise ValueError("the model's rule has no keep rate of its own to show: give --keep-rate")
    rates = sorted(set(rates), reverse=True)
    for rate in rates:
        set_keep_rate(model, rate)
    return rates


def _image(model: Any, config: TrainConfig) -> dict[str, Any]:
    """Return how the model's images are prepared, as `timm.data.resolve_model_data_config` does."""
    size = model.patch_embed.img_size
    image: dict[str, Any] = timm.data.resolve_model_data_config(
        model, {"img_size": size[0]} if size and size[0] == size[1] else {}
    )
    if size is not None:
        image["input_size"] = (image["input_size"][0], *size)
    return {**image, **preparation(config)}
