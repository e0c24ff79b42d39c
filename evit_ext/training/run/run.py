"""A run of ``evit train``: from a configuration to a trained model, whatever happens in between."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm.data
from timm.utils.model import unwrap_model

from evit_ext._util.files import replacing
from evit_ext._util.memory import peak_memory
from evit_ext._util.messages import shown
from evit_ext._util.randomness import derive_seed, seeded
from evit_ext.data.listing import Listing
from evit_ext.patching.keep_rates import keep_rates
from evit_ext.training.building import build_model, build_objective, gmacs_of_run, load_initial
from evit_ext.training.compiling import allow_recompiles, programs_of_run
from evit_ext.training.config import TrainConfig
from evit_ext.training.evaluation import evaluate
from evit_ext.training.loaders import Batch, Loaders
from evit_ext.training.precision import choose_precision
from evit_ext.training.ranks import Ranks
from evit_ext.training.run import folder as run_folder
from evit_ext.training.run.checkpoints import RunCheckpoints
from evit_ext.training.run.clock import RunClock
from evit_ext.training.run.introduction import in_short, introduce
from evit_ext.training.run.lock import FolderLock
from evit_ext.training.run.metrics import Metrics
from evit_ext.training.run.results import Results
from evit_ext.training.run.stopping import Stopped, StoppedWaiting, StopSignals
from evit_ext.training.run.summary import RunSummary
from evit_ext.training.run.unreadable import UnreadableImages
from evit_ext.training.sharding import distribute, share_buffers
from evit_ext.training.trainer import Trainer
from evit_ext.training.waiting import Watch, told

_WEIGHTS_STREAM = 2  # of the random numbers that the first weights are drawn from


class Run:
    """A training run in a folder.

    The folder gets ``config.yaml`` (all fields as resolved), ``checkpoints``, ``metrics.csv``,
    ``classes.txt`` (the names of the classes, in the order of the logits), ``tensorboard`` if that package is
    installed, ``unreadable.csv`` if images could not be read, and ``summary.json``. Weights to use are in
    ``best.safetensors`` (the evaluation with the highest top-1, of the model or its moving average),
    ``last.safetensors`` and ``last_ema.safetensors``. All processes must see the same folder; the first one
    writes.

    Args:
        config: what to do.
        folder: for the run; created if necessary.
        ranks: the processes.
        resume: "auto" resumes from the folder's newest checkpoint; "never" refuses a folder that has one.
        progress: show progress on the first process.
        tensorboard: "auto" writes TensorBoard's events if its package is installed; True insists, False does
            not write them.
        wandb: project of Weights & Biases to write the figures to; None for none.
        recipe: where the configuration comes from, for the first lines; "" says nothing.
        listings: of folders of images that have been listed already, by their paths.

    Raises:
        ValueError: the configuration contradicts itself, or the folder belongs to another run.
        OSError: the folder cannot be created or written to.

    A refused run leaves the folder as it was, and creates none.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: str | os.PathLike[str],
        ranks: Ranks,
        resume: str = "auto",
        progress: bool = True,
        tensorboard: bool | str = "auto",
        wandb: str | None = None,
        recipe: str = "",
        listings: dict[str, Listing] | None = None,
    ) -> None:
        if resume not in ("auto", "never"):
            raise ValueError(f"resume must be 'auto' or 'never', got {shown(resume)}")
        self.config, self.folder, self.ranks = config, Path(folder), ranks
        self._progress, self._recipe = progress, recipe
        self._checkpoints = RunCheckpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self._unreadable = UnreadableImages(self.folder, ranks, config.max_unreadable)
        self._results = Results(self.folder, ranks, config.model)
        self._clock = RunClock()
        self._watch = Watch()
        self._stop = StopSignals(self._watch, self.advice)
        self._lock = FolderLock(self.folder, ranks)
        try:
            run_folder.check_folder(
                self.folder, config, self._checkpoints.steps(), ranks, may_resume=resume == "auto"
            )
            self._build(listings)
            resumed = self._load()
            # From here on there is a run, which writes: what is refused leaves the folder as it was.
            self._metrics = Metrics(self.folder, tensorboard, ranks.is_first, resumed, wandb)
            self._unreadable.begin()
            if ranks.is_first:
                run_folder.with_absolute_paths(config).save(self.folder / "config.yaml")
                if self._loaders.classes:
                    with replacing(self.folder / run_folder.CLASSES_FILE) as file:
                        file.writelines(f"{name}\n" for name in self._loaders.classes)
        except BaseException:
            self._lock.discard()
            raise

    def _build(self, listings: dict[str, Listing] | None) -> None:
        config, ranks = self.config, self.ranks
        if not config.val_split:
            raise ValueError("val_split is empty: a run needs images to evaluate on")
        micro_batch, accumulation = config.micro_batches(ranks.world_size)
        self._loaders = Loaders(config, ranks, micro_batch, accumulation, listings=listings)
        goes_on = bool(self._checkpoints.steps())
        if goes_on:
            run_folder.check_classes(self.folder, self._loaders.classes)
        self._results.classes = self._loaders.classes
        with seeded(derive_seed(config.seed, _WEIGHTS_STREAM)), told(f"the weights of {config.model}"):
            start = dataclasses.replace(config, pretrained=False) if goes_on else config
            model = build_model(start, self._loaders.num_classes).to(ranks.device)
        embed: Any = model.patch_embed
        self._loaders.image = timm.data.resolve_model_data_config(model, {"img_size": embed.img_size[0]})
        self._loaders.patch_grid = embed.grid_size
        self._loaders.check_shared_memory()
        objective = build_objective(config, model, ranks.device)
        if not goes_on:
            loaded = load_initial(config, model)
            if loaded is not None:
                self._say(str(loaded))
            objective.initialize(model)
        model, ema = distribute(model, ranks, config.sharding, config.ema_decay, config.compile)
        self.precision = choose_precision(ranks.device, config.precision)
        self.trainer = Trainer(
            model,
            config,
            self._loaders.steps_per_epoch,
            self._loaders.num_classes,
            self.precision,
            objective,
            ranks=ranks,
            accumulation=accumulation,
            seed=config.seed,
            ema=ema,
        )

    def _load(self) -> int | None:
        """Go on from the newest checkpoint; returns its step, None where there is none."""
        found = self._checkpoints.load_latest()
        steps = self.ranks.gather(None if found is None else found[1])
        if any(step != steps[0] for step in steps):
            raise ValueError(f"the processes read different checkpoints in {self.folder}: of steps {steps}")
        if found is None:
            return None
        state, step = found
        self.trainer.load_state_dict(state)
        self._results.load_state(state["results"])
        self._clock.load_state(state)
        self._unreadable.load_state(state["unreadable"])
        self._say(f"goes on from {self._checkpoints.path(step)}")
        return step

    def train(self) -> RunSummary:
        """Train to the end of the last epoch, and evaluate on the way.

        Raises:
            Stopped: a signal asked for it; the checkpoint of the step has been written.
            FloatingPointError: the loss is no longer finite; the checkpoints contain earlier, finite states.
            TooManyUnreadable: more images than `max_unreadable` cannot be read.
            OSError: a file cannot be written.
            RuntimeError: another process ended.
        """
        trainer = self.trainer
        self._clock.start()
        self._introduce()
        embed: Any = unwrap_model(trainer.model).patch_embed
        programs = programs_of_run(self.config, embed.num_patches, self._say)
        with self._stop, allow_recompiles(programs):
            try:
                self._train_epochs()
            except StoppedWaiting as waiting:
                if trainer.step not in self._checkpoints.steps():
                    self._save()
                said = f"{waiting}: {self.advice()}; the same command goes on from it"
                waiting.with_traceback(None)  # its frames hold the loader and its workers
                self._watch.leave()
                raise Stopped(said, self._stop.number) from None
        return self._finish()

    def _train_epochs(self) -> None:
        trainer, config = self.trainer, self.config
        for epoch in range(trainer.step // trainer.steps_per_epoch, config.epochs):
            if trainer.step_in_epoch == 0:
                self._evaluate_if_due(epoch)
            name = f"epoch {epoch + 1}/{config.epochs}"
            with self._clock.training():
                batches = self._watched(self._loaders.train(epoch, trainer.step_in_epoch))
                result = trainer.train_one_epoch(
                    batches, name, self._progress and self.ranks.is_first, self._after_step
                )
            self._write(
                "epoch",
                loss=result.loss,
                top1=result.accuracy,
                keep_rate=result.keep_rate,
                images_per_second=result.images_per_second,
                memory=peak_memory(self.ranks.device),
                unreadable=len(self._unreadable),
            )
            self._save()
        self._evaluate_if_due(config.epochs)

    def _introduce(self) -> None:
        text = introduce(self.config, self._loaders, self.trainer.model, self.precision, self.ranks)
        recipe = f"recipe {self._recipe}\n" if self._recipe else ""
        self._say(f"{recipe}{text}\nthe run is in {self.folder}")

    def advice(self) -> str:
        """Return what to do after a failure."""
        steps = self._checkpoints.steps()
        if not steps:
            return "there is no checkpoint to go on from"
        return f"the newest checkpoint is {self._checkpoints.path(steps[-1])}"

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in self._waited_for(batches):
            self._unreadable.add(batch.unreadable)
            self._watch.begin(f"step {self.trainer.step + 1}")
            yield batch

    def _waited_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # Several processes stop at the same step, so none may leave while it waits.
        alone = self.ranks.world_size == 1
        return self._watch.waited_for(batches, self._loaders.described, interruptible=alone)

    def _after_step(self) -> None:
        trainer, config = self.trainer, self.config
        self._watch.begin(f"what follows step {trainer.step}")
        # What must happen on all processes at the same step is agreed in one message.
        with self._watch.waiting("the other processes"):
            stop, unreadable = self.ranks.sum([bool(self._stop.number), self._unreadable.unshared])
        if unreadable:
            self._unreadable.share()
        if trainer.step % config.log_every == 0:
            self._log()
        if trainer.step_in_epoch == 0:
            return  # the end of an epoch has a checkpoint of its own
        due = config.checkpoint_every is not None and trainer.step % config.checkpoint_every == 0
        if stop or due:
            self._save()
        if stop:
            self._raise_stopped()

    def _save(self) -> None:
        """Write a checkpoint; where the first process cannot, all of them stop."""
        state = {
            **self.trainer.state_dict(),
            "results": self._results.state(),
            **self._clock.state(),
            "unreadable": self._unreadable.state(),
            "classes": self._loaders.classes,
        }
        self._watch.begin("")  # a large file takes as long as it takes
        failure: OSError | None = None
        if self.ranks.is_first:
            try:
                # First: a power failure must not take lines of steps that are not done again.
                self._metrics.sync()
                self._checkpoints.save(state, self.trainer.step)
            except OSError as error:
                failure = error
        (failed,) = self.ranks.sum([failure is not None])
        self._watch.begin(f"what follows step {self.trainer.step}")
        if failure is not None:
            raise failure
        if failed:
            raise OSError("the first process could not write its checkpoint; its message says why")

    def _stop_if_asked(self) -> None:
        """Stop where any process was asked to; every process must call it, at a step that is saved."""
        (stop,) = self.ranks.sum([bool(self._stop.number)])
        if stop:
            self._raise_stopped()

    def _raise_stopped(self) -> None:
        step = self.trainer.step
        raise Stopped(
            f"asked to stop: the checkpoint of step {step} is written; the same command goes on from it",
            self._stop.number,
        )

    def _evaluate_if_due(self, epochs_done: int) -> None:
        """Evaluate after so many epochs, if the configuration says so and it has not been done."""
        config = self.config
        due = epochs_done > 0 and (epochs_done % config.eval_every == 0 or epochs_done == config.epochs)
        if epochs_done > 0:
            self._stop_if_asked()  # the end of the epoch has been saved
        if not due or self._results.has(epochs_done):
            return
        models = {"model": unwrap_model(self.trainer.model)}
        if self.trainer.ema is not None:
            models["ema"] = self.trainer.ema.module
        found = {}
        for name, model in models.items():
            share_buffers(model, self.ranks)
            found[name] = evaluate(
                model,
                self._interruptible(self._loaders.val()),
                self.precision,
                self.ranks,
                self._progress,
                self._loaders.val_batches,
                {"model": "evaluate", "ema": "evaluate the moving average"}[name],
            )
            self._stop_if_asked()  # what was found is of a part of the images, then
            self._unreadable.add(found[name].unreadable if self.ranks.is_first else ())
            self._unreadable.share()
            self._write(
                "val" if name == "model" else "ema",
                loss=found[name].loss,
                top1=found[name].top1,
                top5=found[name].top5,
                keep_rate=self._keep_rate(),
                images_per_second=found[name].images_per_second,
                tokens_kept=found[name].tokens_kept,
            )
        self._say(
            f"epoch {epochs_done}: "
            + "; ".join(f"{name} {in_short(one, self._loaders.num_classes)}" for name, one in found.items())
        )
        self._watch.begin("")  # large files take as long as they take
        self._results.add(epochs_done, self._keep_rate(), found, models)

    def _interruptible(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches until a signal asks to stop: the processes then meet at the end of the evaluation."""
        for batch in self._waited_for(batches):
            self._watch.begin("the evaluation")
            yield batch
            if self._stop.number:
                return

    def _finish(self) -> RunSummary:
        """Write what came of the run."""
        trainer, config, model = self.trainer, self.config, unwrap_model(self.trainer.model)
        images = trainer.step * config.batch_size
        summary = RunSummary(
            model=config.model,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            keep_rate=self._keep_rate(),
            gmacs=gmacs_of_run(config, self._loaders.num_classes),
            gmacs_dense=gmacs_of_run(config, self._loaders.num_classes, dense=True),
            best=self._results.best("model"),
            last=self._results.last("model"),
            best_ema=self._results.best("ema"),
            last_ema=self._results.last("ema"),
            epochs=config.epochs,
            steps=trainer.step,
            images=images,
            processes=self.ranks.world_size,
            seconds=self._clock.seconds,
            images_per_second=images / self._clock.training_seconds,
            peak_memory=peak_memory(self.ranks.device),
            unreadable=len(self._unreadable),
            checkpoints=str(self._checkpoints.folder),
            classes=self._loaders.num_classes,
        )
        self._metrics.close()
        if self.ranks.is_first:
            summary.save(self.folder / "summary.json")
        self._lock.release()
        return summary

    def _keep_rate(self) -> float | None:
        """Return the lowest of the model's stages, now; None where its rule has none."""
        return min(keep_rates(unwrap_model(self.trainer.model)), default=None)

    def _log(self) -> None:
        """Write what the step showed; over several processes, the mean of their losses."""
        last = self.trainer.last
        assert last is not None
        (loss,) = self.ranks.sum([last.loss.item() / self.ranks.world_size])
        self._write("train", loss=loss, grad_norm=last.grad_norm.item(), lr=last.lr, keep_rate=last.keep_rate)

    def _write(self, kind: str, **figures: float | None) -> None:
        epoch = (self.trainer.step - 1) // self.trainer.steps_per_epoch + 1
        self._metrics.write(self.trainer.step, epoch, kind, **figures)

    def _say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)
