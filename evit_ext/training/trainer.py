"""The training loop around timm's optimizer, scheduler, mixup and EMA, with a keep rate that falls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple, cast

import timm.optim
import torch
from timm.data.mixup import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from evit_ext._util.messages import shown
from evit_ext._util.randomness import derive_seed, random_state, seeded, set_random_state
from evit_ext.patching.keep_rates import keep_rates, set_keep_rate
from evit_ext.tokens.schedule import keep_rate_schedule
from evit_ext.tokens.stage import find_stages
from evit_ext.training.epoch_sums import EpochResult, EpochSums
from evit_ext.training.objectives import Classification, Objective, build_criterion
from evit_ext.training.precision import (
    Precision,
    attention_for_training,
    autocast,
    choose_precision,
)
from evit_ext.training.progress import Progress
from evit_ext.training.ranks import ALONE, Ranks
from evit_ext.training.recipe import Recipe
from evit_ext.training.sharding import (
    gradients_stay,
    is_sharded,
    load_whole_optimizer_state,
    load_whole_state,
    whole_optimizer_state,
    whole_state,
)

# Reading a figure waits for a GPU, so there finiteness is checked only every so many steps.
_STEPS_BETWEEN_CHECKS = 10
# The scale begins at 65536 and is halved when a gradient overflows; below this, all have overflowed for long.
_SMALLEST_SCALE = 2.0**-14
_MODEL_STREAM = 1  # of the random numbers that mixup, drop path and dropout draw


class StepResult(NamedTuple):
    """An optimizer step: of this process' images the mean `loss`, and the norm of the whole gradient.

    Both are scalars on the device; `grad_norm` is that before clipping. `keep_rate` is None where the model's
    rule has none.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    keep_rate: float | None


class Trainer:
    """Trains a model by a recipe, epoch by epoch, alone or together with other processes.

    Random numbers in a step depend on the seed, the step and the micro-batch only. A batch consists of M
    micro-batches, of which the process of rank r takes numbers r, r + world size and so on. So one process
    that accumulates the gradients of three micro-batches trains the same as three processes with one each,
    and the same as a run that was interrupted. The global random generators are left as they were.

    Args:
        model: on its device; the objective calls it. The keep rate of an EViT follows the recipe's schedule.
            With several processes, what :func:`evit_ext.training.distribute` returned.
        recipe: see :class:`Recipe`.
        steps_per_epoch: optimizer steps that an epoch has.
        num_classes: needed for mixup and CutMix; by default ``model.num_classes``.
        precision: by default chosen for the model's device. float16 comes with a gradient scaler.
        objective: what is minimised; by default the cross-entropy of the logits, with the recipe's label
            smoothing, of targets mixed as the recipe says.
        ranks: the processes.
        accumulation: micro-batches of this process in an optimizer step.
        seed: of what is random in training, see above. The weights are the caller's.
        ema: the moving average, if :func:`distribute` has made one; by default it is made here if the recipe
            asks for it.

    Attributes:
        model: what is trained.
        ema: timm's moving average of it, or None; evaluate ``ema.module``.
        last: the last step's :class:`StepResult`, or None.

    Raises:
        ValueError: timm does not know the optimizer, an epoch has no step, or arguments contradict each
            other.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        num_classes: int | None = None,
        precision: Precision | None = None,
        objective: Objective | None = None,
        *,
        ranks: Ranks = ALONE,
        accumulation: int = 1,
        seed: int = 0,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        for name, value in (("steps_per_epoch", steps_per_epoch), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if recipe.optimizer not in timm.optim.list_optimizers():
            raise ValueError(
                f"timm {timm.__version__} has no optimizer {shown(recipe.optimizer)}; "
                "timm.optim.list_optimizers() lists what it has, and a newer timm may have more"
            )
        self.model = model
        # A wrapper (DistributedDataParallel, torch.compile) hides names, blocks and the number of classes.
        self._unwrapped: nn.Module = unwrap_model(model)
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        self.precision = precision or choose_precision(self.device)
        if is_sharded(model) and (recipe.optimizer == "muon" or self.precision.dtype == torch.float16):
            raise ValueError(
                "a model in parts (fsdp) trains without muon, which needs whole matrices, and without "
                f"float16, got optimizer {shown(recipe.optimizer)} and precision {self.precision}"
            )
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
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.dtype == torch.float16)
        if ema is None and recipe.ema_decay is not None:
            ema = ModelEmaV3(self._unwrapped, decay=recipe.ema_decay)
        self.ema = ema
        self.last: StepResult | None = None
        self._ranks, self._accumulation, self._seed = ranks, accumulation, seed
        self._step = 0
        self._sums = EpochSums(self.device)
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        stages = find_stages(self._unwrapped)
        self._has_schedule = bool(stages) and all(
            stage.keep_rate is not None and stage.rule.has_schedule for stage in stages
        )
        embed: Any = getattr(self._unwrapped, "patch_embed", None)
        self._num_patches: int | None = getattr(embed, "num_patches", None)
        self._mixup = self._make_mixup(num_classes)
        self._objective = objective or Classification(build_criterion(recipe))

    def _make_mixup(self, num_classes: int | None) -> Mixup | None:
        recipe = self.recipe
        if recipe.mixup == 0 and recipe.cutmix == 0:
            return None
        if num_classes is None:
            num_classes = int(self._unwrapped.num_classes)  # type: ignore[arg-type]
        return Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mix_prob,
            switch_prob=recipe.cutmix_share,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of training."""
        return self._step

    @property
    def step_in_epoch(self) -> int:
        """Steps done in the current epoch; 0 between epochs."""
        return self._step % self.steps_per_epoch

    def train_one_epoch(
        self,
        batches: Iterable[Any],
        description: str = "train",
        progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> EpochResult:
        """Train on an epoch's micro-batches of this process: `accumulation` for each of `steps_per_epoch`.

        Args:
            batches: tuples that begin with images float [B, C, H, W] and labels int64 [B]. If a tuple has an
                attribute ``token_labels``, the objective gets it; other entries are ignored. In an epoch that
                is resumed (:attr:`step_in_epoch`), the remaining batches.
            description: for the progress bar.
            progress: show a progress bar.
            after_step: called after every step, for instance to write a checkpoint.

        Returns:
            Means over the whole epoch and all processes. Images per second are those of this call, over all
            processes.

        Raises:
            ValueError: there are fewer or more batches than are left of `steps_per_epoch`.
            FloatingPointError: the loss or the gradient is no longer finite; raised on all processes at the
                same step.
        """
        self.model.train(not self.recipe.eval_mode)
        if self.step_in_epoch == 0:
            self._sums = EpochSums(self.device)
        sums, done = self._sums, self.step_in_epoch
        trained, start = 0, time.perf_counter()

        def images_per_second() -> float:
            return trained * self._ranks.world_size / (time.perf_counter() - start)

        remaining = iter(batches)
        with Progress(description, self.steps_per_epoch, progress, start=done) as bar:
            while step := list(islice(remaining, self._accumulation)):
                if done == self.steps_per_epoch:
                    raise ValueError(f"the epoch has more than the {self.steps_per_epoch} steps announced")
                if len(step) < self._accumulation:
                    raise ValueError(
                        f"the last step has {len(step)} micro-batches, {self._accumulation} were announced"
                    )
                trained += self._optimize(step)
                done += 1
                assert self.last is not None
                if self._reads_figures(done):
                    self._check_finite()
                    rate = self.last.keep_rate
                    said = {"loss": f"{sums.mean_loss:.3f}", "top1": f"{sums.accuracy:.1f}%"}
                    said |= {} if rate is None else {"keep": f"{rate:.2f}"}
                    bar.step(**said, speed=f"{images_per_second():.0f}/s")
                else:
                    bar.step()
                if after_step is not None:
                    after_step()
        if done < self.steps_per_epoch:
            raise ValueError(f"the epoch has {done} steps, {self.steps_per_epoch} were announced")
        keep_rate = 1.0 if self.last is None else self.last.keep_rate
        self._set_keep_rate()  # for the evaluation that follows; at the end, the recipe's own
        return sums.result(self._ranks, keep_rate, images_per_second())

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to resume: weights, average, optimizer, scaler, schedules, generators.

        It contains tensors and plain Python values only, so that reading what :class:`RunCheckpoints` writes
        executes nothing. Every process must call it; of a sharded model, the first process gets the whole.

        Raises:
            FloatingPointError: the loss or the gradient was not finite since the last call, so the state is
                not worth saving.
        """
        self._check_finite()
        return {
            "model": whole_state(self.model),
            "model_ema": None if self.ema is None else whole_state(self.ema.module),
            "optimizer": whole_optimizer_state(self.model, self.optimizer),
            "scaler": self._scaler.state_dict(),
            "step": self._step,
            "seen": self._sums.state_dict(self._ranks),
            "recipe": self.recipe.optimisation(),
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self._seed,
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of a run with another recipe, seed or number of steps in an epoch.
            RuntimeError: the weights do not fit the model.
        """
        expected = {
            **self.recipe.optimisation(),
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self._seed,
        }
        came = {**state["recipe"], "steps_per_epoch": state["steps_per_epoch"], "seed": state["seed"]}
        different = [name for name in {**expected, **came} if expected.get(name) != came.get(name)]
        if different:
            said = ", ".join(
                f"{name} {shown(came.get(name))} instead of {shown(expected.get(name))}" for name in different
            )
            raise ValueError(f"the checkpoint is of another run: it has {said}")
        load_whole_state(self.model, state["model"])
        if self.ema is not None:
            load_whole_state(self.ema.module, state["model_ema"])
        load_whole_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._step = state["step"]  # the scheduler needs no more; the optimizer has its learning rates
        self._sums = EpochSums(self.device)
        self._sums.load_state_dict(state["seen"], self._ranks)
        self._set_keep_rate()
        set_random_state(state["random"])

    def _set_keep_rate(self) -> float | None:
        recipe = self.recipe
        if not self._has_schedule or recipe.keep_rate is None:
            return min(keep_rates(self._unwrapped), default=None)
        keep_rate = keep_rate_schedule(
            self._step,
            steps_per_epoch=self.steps_per_epoch,
            base_keep_rate=recipe.keep_rate,
            start_epoch=recipe.keep_rate_start_epoch,
            end_epoch=recipe.keep_rate_end_epoch,
            num_patches=self._num_patches,
            token_step=recipe.keep_rate_token_step,
        )
        set_keep_rate(self._unwrapped, keep_rate)
        if self.ema is not None:
            set_keep_rate(self.ema.module, keep_rate)  # an attribute, which is not averaged
        return keep_rate

    def _optimize(self, batches: list[Any]) -> int:
        """One step on this process' micro-batches; returns how many images they have."""
        keep_rate = self._set_keep_rate()
        losses, images_seen = [], 0
        self.optimizer.zero_grad()
        for number, batch in enumerate(batches):
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch[:2])
            micro_batch = number * self._ranks.world_size + self._ranks.rank
            key = derive_seed(self._seed, _MODEL_STREAM, self._step, micro_batch)
            with (
                seeded(key, self.device),
                gradients_stay(self.model, number + 1 < len(batches)),
                attention_for_training(self.device, self.precision),
                self._objective.step(self.model),
            ):
                loss, logits = self._forward(images, labels, getattr(batch, "token_labels", None))
                self._scaler.scale(loss / len(batches)).backward()
            self._sums.add(loss.detach(), logits.detach(), labels)
            losses.append(loss.detach())
            images_seen += len(labels)
        grad_norm = self._step_optimizer()
        loss = torch.stack(losses).mean()
        self._finite &= loss.isfinite()
        if not self._scaler.is_enabled():  # the scaler skips steps with infinite gradients
            self._finite &= grad_norm.isfinite()
        self.last = StepResult(loss, grad_norm, self.optimizer.param_groups[0]["lr"], keep_rate)
        self._step += 1
        self.scheduler.step_update(self._step)
        if self.ema is not None:
            self.ema.update(self._unwrapped, step=self._step)
        return images_seen

    def _forward(self, images: Tensor, labels: Tensor, token_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits of a micro-batch."""
        targets = labels
        if self._mixup is not None:
            if len(images) % 2:
                raise ValueError(
                    f"mixup and CutMix mix pairs of images: a micro-batch must be even, got {len(images)}"
                )
            images, targets = self._mixup(images.clone(), labels)  # mixup changes them in place
        if token_labels is not None:
            token_labels = token_labels.to(self.device, non_blocking=True)
        with autocast(self.device, self.precision):
            return self._objective(self.model, images, targets, token_labels)

    def _step_optimizer(self) -> Tensor:
        """Return the norm of the gradient as it was before clipping."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm: Any = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if hasattr(norm, "full_tensor"):  # of a model in parts
            norm = norm.full_tensor()
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_grad, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return norm.detach()

    def _reads_figures(self, done: int) -> bool:
        """Return whether figures are read after this step of the epoch; on a GPU, reading takes time."""
        every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS
        return done % every == 0 or done == self.steps_per_epoch

    def _check_finite(self) -> None:
        if self._scaler.is_enabled() and self._scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(
                f"no gradient fits float16 at step {self._step}: the scaler is down to "
                f"{self._scaler.get_scale():g}; try bfloat16, float32 or a smaller learning rate"
            )
        (bad,) = self._ranks.sum([not self._finite.item()])
        if bad and self.last is not None:
            raise FloatingPointError(
                f"the loss or the gradient is not finite at step {self._step} (on {bad:.0f} of "
                f"{self._ranks.world_size} processes; here loss {self.last.loss.item():g}, gradient norm "
                f"{self.last.grad_norm.item():g}): try a smaller learning rate than {self.recipe.lr}, or a "
                "limit for the gradient (clip_grad)"
            )
