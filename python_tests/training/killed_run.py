"""A short training run with checkpoints, to be killed: ``python killed_run.py FOLDER EPOCHS``.

It goes on from the newest checkpoint, prints a line after every step, and writes the weights at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import evit_ext
from evit_ext.training import Precision, Recipe, RunCheckpoints, Trainer

STEPS = 5


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5, drop_path_rate=0.2
    )
    recipe = Recipe(
        epochs=epochs,
        batch_size=8,
        lr=3e-3,
        warmup_epochs=0.5,
        mixup=0.2,
        ema_decay=0.9,
        keep_rate=0.6,
        keep_rate_end_epoch=2,
    )
    trainer = Trainer(evit_ext.apply(vit, 0.6), recipe, STEPS, precision=Precision(torch.float32, "test"))
    checkpoints = RunCheckpoints(folder)
    found = checkpoints.load_latest()
    if found is not None:
        trainer.load_state_dict(found[0])

    def after_step() -> None:
        checkpoints.save(trainer.state_dict(), trainer.step)
        print(trainer.step, flush=True)

    for epoch in range(trainer.step // STEPS, epochs):
        generator = torch.Generator().manual_seed(epoch)  # as a sampler that is told the epoch
        labels = torch.randint(0, 5, (STEPS * 8,), generator=generator)
        images = torch.randn(STEPS * 8, 3, 32, 32, generator=generator) + labels[:, None, None, None]
        batches = list(zip(images.split(8), labels.split(8), strict=True))[trainer.step_in_epoch :]
        trainer.train_one_epoch(batches, progress=False, after_step=after_step)
    assert trainer.ema is not None
    state = {**vit.state_dict(), **{f"ema.{k}": v for k, v in trainer.ema.module.state_dict().items()}}
    torch.save(state, folder / "final.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
