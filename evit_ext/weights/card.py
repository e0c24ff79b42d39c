"""A model's card: the README.md of its repository on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import timm.data
from torch import nn

from evit_ext.cost.macs import count_macs
from evit_ext.models.by_name import is_ours
from evit_ext.patching.keep_rates import keep_rates
from evit_ext.tokens.stage import find_stages

_USE = """```python
import evit_ext
import timm.data
from PIL import Image

model = evit_ext.from_pretrained("hf-hub:{repo_id}"){hint}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0))
```
"""

_DENSE = """Without evit_ext, the same model with all patches is
`timm.create_model("hf-hub:{repo_id}", pretrained=True)`.
"""


def model_card(
    model: nn.Module, config: dict[str, Any], repo_id: str, license: str | None, description: str
) -> str:
    """Return the card's Markdown, which begins with the metadata that the hub reads.

    Args:
        model: in any mode.
        config: the contents of its config.json.
        repo_id: "owner/name".
        license: of the weights; None leaves it open.
        description: the author's own text.
    """
    cfg, evit = config["pretrained_cfg"], config["evit"]
    rule = find_stages(model)[0].rule
    head = ["library_name: evit_ext", "pipeline_tag: image-classification"]
    head += ["tags:", "- image-classification", "- timm", f"- {rule.name}"]
    if license is not None:
        head.append(f"license: {license}")
    rates = ", ".join(f"{value:g}" for value in keep_rates(model))
    where = f"at blocks {', '.join(map(str, evit['drop_loc']))}; what is not kept is {rule.describe()}"
    # timm's defaults fill in what the configuration leaves out.
    image = timm.data.resolve_data_config(pretrained_cfg=cfg)
    height, width = cfg["input_size"][1:]
    facts = {
        "Architecture": f"`{config['architecture']}`",
        "Keep rate" if rates else "Tokens": f"{rates}, {where}" if rates else f"reduced {where}",
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "GMACs": f"{count_macs(model) / 1e9:.3g}, multiply-accumulates of an image in 10⁹",
        "Images": f"{height} × {width} pixels",
        "Normalised by": f"mean {_shown(image['mean'])}, deviation {_shown(image['std'])}",
        "Classes": str(config["num_classes"]),
    }
    method = rule.title if rule.paper is None else f"[{rule.title}]({rule.paper})"
    lines = [
        "---",
        *head,
        "---",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"A vision transformer that drops patches: {method}, by evit_ext.",
        "",
        *((description.strip(), "") if description.strip() else ()),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Use",
        "",
        _USE.format(repo_id=repo_id, hint="  # or keep_rate=0.5, or any other" if rates else ""),
        "" if is_ours(config["architecture"]) else _DENSE.format(repo_id=repo_id),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _shown(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values)
