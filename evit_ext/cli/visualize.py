"""``evit visualize``: which patches of a photograph a model keeps, as a picture and as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm.data
import torch

from evit_ext.cli.options import (
    add_device,
    add_keep_rates,
    add_options,
    add_weights,
    chosen_device,
    overrides,
)
from evit_ext.cli.output import check_writable
from evit_ext.cli.runs import load_weights, newest_weights, run_config
from evit_ext.cli.trained import build, is_of_digits, preparation
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.weights import load_checkpoint

if TYPE_CHECKING:
    from evit_ext.visualize.photos import Photo

_FIELDS = (
    "model",
    "model_args",
    "img_size",
    "num_classes",
    "drop_loc",
    "fuse_token",
    "pretrained",
    "max_image_pixels",
    "crop_pct",
)
_PAGE_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
_AT_ONCE = 16

_EXAMPLES = """examples:
  evit visualize photo.jpg --model deit_small --checkpoint evit.pth -o photo.png
  evit visualize photo.jpg --model vit_small_patch16_224 --pretrained --keep-rate 0.7 0.5
  evit visualize photo.jpg --checkpoint runs/small --html photo.html
  evit visualize photos/ --checkpoint runs/small -o sheet.png
"""

_UNTRAINED = "untrained weights: the patches mean nothing"


def add_parser(commands: Any) -> None:
    """Add ``evit visualize`` to the commands."""
    parser = commands.add_parser(
        "visualize",
        help="which patches of a photograph a model keeps, as a picture and as a page",
        description="Show a photograph as the model sees it and, stage by stage, the patches that are kept,\n"
        "what scores they got, and what the model takes it for with all patches and without.\n"
        "Several photographs, or a folder of them, make a contact sheet.",
        usage="evit visualize PHOTO ... [--checkpoint RUN | --model NAME [--checkpoint FILE | --pretrained]] "
        "[OPTION ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="an image file, or a folder of them")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the picture there: .png, .jpg or .webp (default: evit.png, unless there is --html)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page there, with sliders over stages and keep rates; one file that needs nothing else",
    )
    add_weights(parser, "FILE|RUN", "; or the folder of a run of evit train, which knows its model, too")
    add_keep_rates(parser, "each in (0, 1] (default: the model's own; with --html 0.9 0.8 0.7 0.6 0.5)")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the name of a class on each line (default: of a run's data, or ImageNet's where "
        "their number is ImageNet's)",
    )
    parser.add_argument(
        "--most", type=int, default=64, metavar="N", help="photographs to show of more (default: 64)"
    )
    add_device(parser)
    group = parser.add_argument_group("model, as in a run's configuration")
    add_options(group, _FIELDS, {"model": "the run's; without a run it is needed"})
    parser.set_defaults(run=_visualize)


class _Model(NamedTuple):
    """A model with its weights and facts about it; `warning` is "" if its weights are trained."""

    model: Any
    name: str
    weights: str
    warning: str
    image: dict[str, Any]
    class_names: Sequence[str] | None


def _visualize(options: argparse.Namespace) -> None:
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
    found = photos.find_photos(options.photos)
    if found.others:
        _tell(f"files of the folders that are no images by their names are left out: {found.others}")
    files = found.files
    if len(files) > options.most:
        _tell(f"there are {len(files)} photographs; the first {options.most} are shown: see --most")
        files = files[: options.most]

    torch.manual_seed(0)  # the same random weights each time
    known = _build(options)
    rates = _rates(known.model, options)
    device = chosen_device(options)
    model = known.model.to(device).eval()
    eye = photos.Eye(known.image)
    seen, names = [], []
    for file in files:
        image = photos.read_photo(file, _max_pixels(options))
        if isinstance(image, photos.Unreadable):
            if len(files) == 1:
                raise ValueError(f"{image.path} cannot be read: {image.reason}")
            _tell(f"{image.path} cannot be read and is left out: {image.reason}")
            continue
        seen.append(eye.see(image))
        names.append(photos.shown_name(file))
    if not seen:
        raise ValueError(f"none of {len(files)} photographs could be read")
    shown: list[Photo] = []
    for first in range(0, len(seen), _AT_ONCE):
        some = seen[first : first + _AT_ONCE]
        for tensor, view in zip(
            some, views.view_images(model, torch.stack(some).to(device), rates), strict=True
        ):
            shown.append(photos.Photo(names[len(shown)], eye.show(tensor), view))
    if known.warning:
        _tell(known.warning)
    everything = gallery.Gallery(
        known.name, known.weights, known.warning, views.meaning_of_scores(model), known.class_names, shown
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(picture.draw(everything), output)
        print(f"{output}: {_count(shown)}, keep rate {' '.join(f'{rate:g}' for rate in rates)}")
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page.write(everything), encoding="utf-8")
        print(f"{options.html}: {_count(shown)}, keep rate {' '.join(f'{rate:g}' for rate in rates)}")


def _count(photos: Sequence[Photo]) -> str:
    return photos[0].name if len(photos) == 1 else f"{len(photos)} photographs"


def _tell(text: str) -> None:
    print(f"evit visualize: {text}", file=sys.stderr)


def _max_pixels(options: argparse.Namespace) -> int:
    given = overrides(options).get("max_image_pixels")
    return TrainConfig.max_image_pixels if given is None else int(given)


def _rates(model: Any, options: argparse.Namespace) -> list[float]:
    """Return the keep rates to show, highest first; all are checked before anything is computed."""
    rates = options.keep_rates or (list(_PAGE_RATES) if options.html is not None else keep_rates(model))
    rates = sorted(set(rates), reverse=True)
    for rate in rates:
        set_keep_rate(model, rate)
    return rates


def _build(options: argparse.Namespace) -> _Model:
    """Return the requested model with its weights."""
    given = overrides(options)
    folder = options.checkpoint if options.checkpoint and Path(options.checkpoint).is_dir() else None
    if options.checkpoint is not None and given.get("pretrained"):
        raise ValueError("expected --checkpoint or --pretrained, got both")
    if folder is None and options.checkpoint is None and options.ema is not None:
        raise ValueError("--ema chooses among the weights of --checkpoint, got none")
    if folder is None and "model" not in given:
        raise ValueError("expected --model NAME, or --checkpoint with the folder of a run")
    config = load_config(**given) if folder is None else run_config(folder, given)
    state, words = (None, "") if folder is None else newest_weights(folder, options.ema)
    model: Any = build(config, state)
    warning = ""
    if state is not None:
        load_weights(model, state, str(folder))
    elif options.checkpoint is not None:
        loaded = load_checkpoint(model, options.checkpoint, use_ema=options.ema, progress=False)
        words = str(loaded).partition("\n")[0]
        if loaded.missing_keys:
            _tell(str(loaded))
            warning = f"{len(loaded.missing_keys)} tensors of the weights are untrained, missing in the file"
    elif config.pretrained:
        words = "pretrained"
    else:
        words, warning = "random", _UNTRAINED
    return _Model(
        model, config.model, words, warning, _image(model, config), _class_names(model, config, options)
    )


def _image(model: Any, config: TrainConfig) -> dict[str, Any]:
    """Return how the model's images are prepared, as `timm.data.resolve_model_data_config` does."""
    size = model.patch_embed.img_size
    image: dict[str, Any] = timm.data.resolve_model_data_config(
        model, {"img_size": size[0]} if size and size[0] == size[1] else {}
    )
    if size is not None:
        image["input_size"] = (image["input_size"][0], *size)
    return {**image, **preparation(config)}


def _class_names(model: Any, config: TrainConfig, options: argparse.Namespace) -> Sequence[str] | None:
    from evit_ext.visualize.class_names import folder_names, imagenet_names, read_class_names

    num_classes = int(getattr(model, "num_classes", 0))
    if options.classes is not None:
        return read_class_names(options.classes, num_classes)
    if is_of_digits(config):
        return [str(number) for number in range(num_classes)]
    names = folder_names(config.data, config.val_split, num_classes) if config.data else None
    return imagenet_names(num_classes) if names is None else names
