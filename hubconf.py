"""Entry points of torch.hub: the models of evit_ext, and any vision transformer of timm as an EViT.

    model = torch.hub.load("path/to/this/folder", "evit_deit_small", keep_rate=0.7, source="local")

The package has to be installed, as it has compiled operators; torch.hub installs nothing.
"""

import importlib as _importlib
import sys as _sys
from pathlib import Path as _Path

dependencies = ["torch", "timm", "numpy", "yaml", "safetensors"]


def _import_evit_ext():
    """Import the package as it is installed, or as it is built in this folder."""
    here = _Path(__file__).resolve().parent
    path = _sys.path[:]
    if not any((here / "evit_ext").glob("_C*.so")):
        # torch.hub has put this folder in front of what is installed, but these sources cannot be imported.
        _sys.path[:] = [entry for entry in path if _Path(entry).resolve() != here]
    try:
        return _importlib.import_module("evit_ext")
    except ImportError as error:
        raise ImportError(
            f"evit_ext cannot be imported ({error}). Its operators are compiled when it is installed: "
            f"pip install {here}"
        ) from error
    finally:
        _sys.path[:] = path


_models = _import_evit_ext().models

evit_deit_tiny = _models.deit_tiny
evit_deit_small = _models.deit_small
evit_deit_base = _models.deit_base
evit_deit_tiny_distilled = _models.deit_tiny_distilled
evit_deit_small_distilled = _models.deit_small_distilled
evit_deit_base_distilled = _models.deit_base_distilled
evit_deit_small_256 = _models.deit_small_256
evit_deit_small_272 = _models.deit_small_272
evit_deit_small_288 = _models.deit_small_288
evit_deit_small_304 = _models.deit_small_304
evit_lvvit_tiny = _models.lvvit_tiny
evit_lvvit_small = _models.lvvit_small
evit_lvvit_medium = _models.lvvit_medium
evit_lvvit_large = _models.lvvit_large
dynamicvit_tiny = _models.dynamicvit_tiny
dynamicvit_small = _models.dynamicvit_small
dynamicvit_base = _models.dynamicvit_base


def evit(name, keep_rate=0.7, drop_loc=None, fuse_token=True, pretrained=False, **arguments):
    """Return any vision transformer of timm that evit_ext supports, as an EViT.

    Args:
        name: in timm's registry, such as "vit_small_patch16_224.augreg_in21k_ft_in1k".
        keep_rate: share of the patch tokens that a reorganising block keeps, in (0, 1]; one number, or one
            for each reorganising block.
        drop_loc: numbers of the reorganising blocks, ascending, from 0; None for those at the quarters of
            the depth.
        fuse_token: fuse the patches that are not kept into one token; without it they are lost.
        pretrained: load timm's weights. They were trained without token reorganisation; at low keep rates
            the model needs fine-tuning.
        arguments: of ``timm.create_model``, such as ``img_size`` and ``num_classes``.

    Raises:
        TypeError: an argument has a wrong type or is not known to timm.
        ValueError: there is no such model, it cannot be an EViT, or an argument is out of range.
        RuntimeError: the pretrained weights could not be fetched.
    """
    from evit_ext.models.by_name import create_evit

    return create_evit(name, keep_rate, drop_loc, fuse_token, pretrained=pretrained, **arguments)
