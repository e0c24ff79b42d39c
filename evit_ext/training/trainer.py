"""The loop: timm's optimizer, scheduler, mixup, EMA and losses; ours is what EViT adds, the keep rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import timm.loss
import timm.optim
import torch
from timm.data.mixup import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from evit_ext.apply import set_keep_rate
from evit_ext.families import reorganizing_blocks
from evit_ext.randomness import random_state, set_random_state
from evit_ext.schedule import keep_rate_schedule
from evit_ext.training.precision import Precision, autocast, choose_precision
from evit_ext.training.progress import Progress
from evit_ext.training.recipe import Recipe


class EpochResult(NamedTuple):
    """`loss` and `accuracy` (percent; of the unmixed labels) are means over the epoch, seen in training."""

    loss: float
    accuracy: float
    keep_rate: float
    images_per_second: float


class Trainer:
    """Trains a model after a recipe, an epoch at a time.

    Args:
        model: returns logits [B, classes], or where `loss` is given anything that has them as ``.logits``; on
            its device already, wrapped (DistributedDataParallel,
            torch.compile) or not. An EViT gets the recipe's keep rate, along its schedule. Nothing is seeded
            here: seed torch before the model is made, and NumPy too where the recipe has mixup, as timm's
            draws from NumPy's global generator.
        recipe: see :class:`Recipe`.
        steps_per_epoch: batches that an epoch has.
        num_classes: needed for mixup, CutMix and label smoothing with them; by default ``model.num_classes``.
        precision: by default chosen for the model's device.
        loss: of what the model returned, the images and the targets, such as :class:`DynamicViTLoss`; by
            default the cross-entropy. Targets come mixed as the recipe says; label smoothing without mixup is
            left to a `loss` that is given.

    Attributes:
        model: what is trained.
        ema: timm's moving average of it, or None; evaluate ``ema.module``.

    Raises:
        ValueError: an optimizer that this timm does not know, or no step in an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        num_classes: int | None = None,
        precision: Precision | None = None,
        loss: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if recipe.optimizer not in timm.optim.list_optimizers():
            raise ValueError(
                f"timm {timm.__version__} has no optimizer {recipe.optimizer!r}; "
                "timm.optim.list_optimizers() lists what it has, and a newer timm may have more"
            )
        self.model = model
        # What a wrapper (DistributedDataParallel, torch.compile) hides: names, blocks, the number of classes.
        self._unwrapped: nn.Module = unwrap_model(model)
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        self.precision = precision or choose_precision(self.device)
        self.optimizer = timm.optim.create_optimizer_v2(
            self._unwrapped, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * steps_per_epoch,
            lr_min=recipe.min_lr,
            warmup_t=math.ceil(recipe.warmup_epochs * steps_per_epoch),
            warmup_lr_init=recipe.warmup_lr,
            t_in_epochs=False,
        )
        self.scheduler.step_update(0)
        self.ema = (
            ModelEmaV3(self._unwrapped, decay=recipe.ema_decay) if recipe.ema_decay is not None else None
        )
        self._step = 0
        self._seen = _Seen(self.device)
        self._reorganizes = bool(reorganizing_blocks(self._unwrapped)) and recipe.keep_rate is not None
        self._mixup, self._loss = self._targets(num_classes)
        self._custom_loss = loss

    def _targets(self, num_classes: int | None) -> tuple[Any, nn.Module]:
        recipe = self.recipe
        if recipe.mixup > 0 or recipe.cutmix > 0:
            if num_classes is None:
                num_classes = int(self._unwrapped.num_classes)  # type: ignore[arg-type]
            mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )
            return mixup, timm.loss.SoftTargetCrossEntropy()
        if recipe.label_smoothing > 0:
            return None, timm.loss.LabelSmoothingCrossEntropy(recipe.label_smoothing)
        return None, nn.CrossEntropyLoss()

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of training."""
        return self._step

    @property
    def step_in_epoch(self) -> int:
        """Steps done of the epoch that is under way; 0 between epochs."""
        return self._step % self.steps_per_epoch

    def train_one_epoch(
        self,
        batches: Iterable[Any],
        description: str = "train",
        progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> EpochResult:
        """Train on the batches of an epoch: `steps_per_epoch` tuples that begin with images and labels.

        Args:
            batches: of images float [B, C, H, W] and labels int64 [B]; what else a tuple holds is ignored.
                Where the epoch is under way already (:attr:`step_in_epoch`), those that are left of it.
            description: what the progress says.
            progress: show it.
            after_step: called after every step, to write a checkpoint for instance.

        Returns:
            Means over the whole epoch, but for the images per second, which are those of this call.

        Raises:
            ValueError: there are fewer or more batches than are left of `steps_per_epoch`.
            FloatingPointError: the loss is not finite any more.
        """
        self.model.train(not self.recipe.eval_mode)
        if self.step_in_epoch == 0:
            self._seen = _Seen(self.device)
        seen, done, keep_rate = self._seen, self.step_in_epoch, 1.0
        before = seen.images
        start = time.perf_counter()

        def images_per_second() -> float:
            return (seen.images - before) / (time.perf_counter() - start)

        with Progress(description, self.steps_per_epoch - done, progress) as bar:
            for images, labels, *_ in batches:
                if done == self.steps_per_epoch:
                    raise ValueError(f"the epoch has more than the {self.steps_per_epoch} batches announced")
                images, labels = images.to(self.device), labels.to(self.device)
                keep_rate = self._set_keep_rate()
                loss, logits = self._optimize(images, labels)
                seen.add(loss, logits, labels)
                done += 1
                # Reading the loss waits for a GPU: do it now and then.
                if done % 10 == 0 or done == self.steps_per_epoch or self.device.type == "cpu":
                    self._check_finite(loss)
                    bar.step(
                        loss=f"{seen.mean_loss:.3f}",
                        accuracy=f"{seen.accuracy:.1f}%",
                        keep_rate=f"{keep_rate:.2f}",
                        images_per_second=f"{images_per_second():.0f}",
                    )
                else:
                    bar.step()
                if after_step is not None:
                    after_step()
        if done < self.steps_per_epoch:
            raise ValueError(f"the epoch has {done} batches, {self.steps_per_epoch} were announced")
        return EpochResult(seen.mean_loss, seen.accuracy, keep_rate, images_per_second())

    def state_dict(self) -> dict[str, Any]:
        """Return all that training goes on from: weights, average, optimizer, schedules, random generators.

        Of tensors and plain Python values, so that what :class:`RunCheckpoints` writes is read without
        executing anything. What the data loader's own generators and workers hold is not among it.
        """
        return {
            "model": self._unwrapped.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self._step,
            "seen": self._seen.state_dict(),
            "recipe": self.recipe.optimisation(),
            "steps_per_epoch": self.steps_per_epoch,
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of a run with another recipe or another number of steps in an epoch.
            RuntimeError: the weights do not fit the model.
        """
        expected = {**self.recipe.optimisation(), "steps_per_epoch": self.steps_per_epoch}
        came = {**state["recipe"], "steps_per_epoch": state["steps_per_epoch"]}
        different = [name for name in {**expected, **came} if expected.get(name) != came.get(name)]
        if different:
            said = ", ".join(
                f"{name} {came.get(name)!r} instead of {expected.get(name)!r}" for name in different
            )
            raise ValueError(f"the checkpoint is of another run: it has {said}")
        self._unwrapped.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]  # all that the scheduler knows; the optimizer has its learning rates
        self._seen = _Seen(self.device)
        self._seen.load_state_dict(state["seen"])
        set_random_state(state["random"])

    def _set_keep_rate(self) -> float:
        recipe = self.recipe
        if not self._reorganizes or recipe.keep_rate is None:
            blocks = reorganizing_blocks(self._unwrapped)
            return min((block.keep_rate for block in blocks), default=1.0)
        keep_rate = keep_rate_schedule(
            self._step,
            steps_per_epoch=self.steps_per_epoch,
            base_keep_rate=recipe.keep_rate,
            start_epoch=recipe.keep_rate_start_epoch,
            end_epoch=recipe.keep_rate_end_epoch,
        )
        set_keep_rate(self._unwrapped, keep_rate)
        if self.ema is not None:
            set_keep_rate(self.ema.module, keep_rate)  # an attribute, which the average does not follow
        return keep_rate

    def _optimize(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns the loss and the logits, detached."""
        inputs, targets = (images, labels) if self._mixup is None else self._mixup(images.clone(), labels)
        with autocast(self.device, self.precision, training=True):
            output = self.model(inputs)
            if self._custom_loss is not None:  # which may run another model
                loss = self._custom_loss(output, inputs, targets)
        logits = output if isinstance(output, Tensor) else output.logits
        if self._custom_loss is None:
            loss = self._loss(logits.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self._step += 1
        self.scheduler.step_update(self._step)
        if self.ema is not None:
            self.ema.update(self._unwrapped, step=self._step)
        return loss.detach(), logits.detach()

    def _check_finite(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self._step}: try a smaller learning rate than "
                f"{self.recipe.lr}"
            )


class _Seen:
    """What was seen of an epoch: sums of losses and of right answers, on the device, and the images."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch with its mean `loss`."""
        self._loss += loss.double() * len(labels)
        self._correct += (logits.argmax(dim=1) == labels).sum()
        self.images += len(labels)

    @property
    def mean_loss(self) -> float:
        """The mean over the images; waits for a GPU."""
        return self._loss.item() / self.images

    @property
    def accuracy(self) -> float:
        """In percent; waits for a GPU."""
        return 100 * self._correct.item() / self.images

    def state_dict(self) -> dict[str, float]:
        return {"loss": self._loss.item(), "correct": self._correct.item(), "images": self.images}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._loss.fill_(state["loss"])
        self._correct.fill_(state["correct"])
        self.images = int(state["images"])
