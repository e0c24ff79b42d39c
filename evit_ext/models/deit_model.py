"""The DeiT models: timm's, with position embeddings resized the way the published EViT does."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evit_ext._util.messages import shown
from evit_ext.models.position_embedding import resize_position_embedding

_logger = logging.getLogger(__name__)


class DeiT(VisionTransformer):
    """timm's VisionTransformer, with position embeddings resized the way the published EViT does.

    They are resized in the forward where ``dynamic_img_size`` is set and an image has another size than the
    model was built for, and when the weights of a model for another size are loaded. State-dict keys are
    timm's.
    """

    def _prefix(self) -> list[Tensor]:
        """Return the tokens before the patches, [1, number, C] each, in order."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _num_embedded_prefix_tokens(self) -> int:
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add the position embedding to patches [B, height, width, C] (dynamic_img_size) or [B, N, C]."""
        if not self.dynamic_img_size or self.pos_embed is None:
            return super()._pos_embed(x)
        embedding = resize_position_embedding(
            self.pos_embed,
            self.patch_embed.grid_size,
            (x.shape[1], x.shape[2]),
            self._num_embedded_prefix_tokens(),
        )
        x = x.flatten(1, 2)
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._prefix()]
        if self.no_embed_class:
            x = torch.cat([*prefix, x + embedding], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + embedding
        return self.pos_drop(x)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the image or patch size the model is built for; see timm's VisionTransformer."""
        old, old_grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(*args, **kwargs)
        if old is not None and self.pos_embed is not old:
            resized = resize_position_embedding(
                old.detach(), old_grid, self.patch_embed.grid_size, self._num_embedded_prefix_tokens()
            )
            self.pos_embed = nn.Parameter(resized, requires_grad=old.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}pos_embed"
        loaded = state_dict.get(key)
        if (
            loaded is not None
            and self.pos_embed is not None
            and loaded.dim() == 3
            and loaded.shape != self.pos_embed.shape
        ):
            num_prefix_tokens = self._num_embedded_prefix_tokens()
            # A state dict does not tell its grid. What is no square is left to the error about shapes.
            side = math.isqrt(max(loaded.shape[1] - num_prefix_tokens, 0))
            if side > 0 and side * side == loaded.shape[1] - num_prefix_tokens:
                grid = self.patch_embed.grid_size
                _logger.info("Resizing the position embedding from %s to %s patches.", (side, side), grid)
                # load_state_dict hands out a copy of its dict to be changed.
                state_dict[key] = resize_position_embedding(
                    loaded.detach(), (side, side), grid, num_prefix_tokens
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class DistilledDeiT(DeiT, VisionTransformerDistilled):
    """timm's DeiT with a distillation token and a head for it, with position embeddings as :class:`DeiT`'s.

    The distillation token is a prefix token, as the class token is, so it is never dropped; patches are
    ranked by the class token's attention. The forward returns the mean of the two heads' logits
    [B, classes], or, in training after ``set_distilled_training(True)``, both: (class token's, distillation
    token's). State-dict keys are timm's.

    Args:
        args, kwargs: of timm's VisionTransformer.

    Raises:
        ValueError: register tokens, a pooling or an embedding that it has no place for are asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Of these, timm's ignores the first, fails in the forward for the second, and has an assertion.
        only = {"reg_tokens": 0, "no_embed_class": False, "global_pool": "token"}
        for name, value in only.items():
            if kwargs.get(name, value) != value:
                raise ValueError(
                    "a distilled DeiT reads its class and distillation token: no "
                    f"{name}={shown(kwargs[name])}"
                )
        super().__init__(*args, **kwargs)

    def _prefix(self) -> list[Tensor]:
        assert self.cls_token is not None
        return [self.cls_token, self.dist_token]
