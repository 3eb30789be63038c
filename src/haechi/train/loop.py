"""One loop over stages: accelerate for devices and precision, atomic checkpoints, early stopping, a progress line."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from haechi.errors import ConfigError
from haechi.store import read_json, write_json
from haechi.template import CATEGORY, NOT_SUPERVISED, TEXT, VERDICT, Batch, Row, pack, visible
from haechi.train.average import Average, mixed
from haechi.train.config import Stage, TrainConfig
from haechi.train.data import Source
from haechi.train.model import Base, NarrowHead

log = logging.getLogger(__name__)

_KINDS = {"verdict": VERDICT, "category": CATEGORY, "text": TEXT}


class Loop:
    """Trains one stage after another; its position survives a kill."""

    def __init__(self, config: TrainConfig, load: Callable[[], Base], report: Callable[[str], None]) -> None:
        """`load` makes the model the first stage starts from."""
        self.config, self._load, self._report = config, load, report
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            log_with="tensorboard",
            project_dir=str(config.output),
            cpu=not torch.cuda.is_available(),
        )
        if self.accelerator.is_main_process:
            self._claim()
        # A base without a language-model head gets a random one.
        set_seed(config.seed)
        with self.first():
            self.base = load()
        set_seed(config.seed + self.accelerator.process_index)
        self.accelerator.init_trackers("tensorboard")
        self.attention = self.base.template.settings.attention
        self.model = self.base.model
        self._average = Average()
        self.accelerator.register_for_checkpointing(self._average)
        self._saved = config.output / "checkpoint"
        self._progress = self._read_progress()

    def first(self) -> AbstractContextManager[None]:
        """Inside it the main process goes first: what it learns and caches the others read."""
        manager: AbstractContextManager[None] = self.accelerator.main_process_first()
        return manager

    def _claim(self) -> None:
        """Write down the configuration. Raises ConfigError when the folder holds an unfinished run of another one."""
        file, ours = self.config.output / "config.json", self.config.model_dump(mode="json")
        if file.exists() and self.config.output.joinpath("checkpoint").exists():
            theirs = read_json(file)
            if changed := sorted(key for key in ours if ours[key] != theirs.get(key)):
                raise ConfigError(
                    f"{self.config.output} holds an unfinished run with other {', '.join(changed)}: "
                    "finish it as it was, choose another output, or delete the folder"
                )
        write_json(file, ours)

    def measured(self, stage: Stage) -> dict[str, Any] | None:
        """What a stage measured that an earlier, killed run had finished."""
        done: dict[str, Any] | None = self._progress["done"].get(stage.name)
        return done

    def run(self, index: int, stage: Stage, train: Source, valid: Source | None) -> dict[str, Any]:
        """Train one stage, or what is left of it. Returns what it measured."""
        # A killed run is here with the same weights: those of the base or of the last finished stage.
        before = self._weights() if stage.keep else {}
        optimizer = torch.optim.AdamW(_groups(self.base.model, stage.weight_decay), lr=stage.lr, fused=True)
        # accelerate would prepare the same module again for each stage; start every stage from the bare model.
        self.model, prepared = self.accelerator.prepare(self.base.model, optimizer)
        self._average.start(self.base.model, stage.average)
        state = self._resume(index)
        steps = len(train)
        self._head = NarrowHead(self.base.model)
        self._vocabulary = self.base.model.get_output_embeddings().weight.shape[0]
        # What is often predicted is always scored: the model's mass lies there, and only the tail is left to chance.
        self._frequent = np.argsort(-train.targets(self._vocabulary), kind="stable")[: stage.vocabulary_sample // 2]
        with self._bar(stage, steps, state["step"]) as show:
            while state["step"] < steps and not state["stopped"]:
                self._step(stage, train, state["step"], steps, prepared, show)
                state["step"] += 1
                if stage.validate_every and valid and state["step"] % stage.validate_every == 0:
                    self._validate(stage, valid, state)
                if state["step"] % self.config.checkpoint_every == 0:
                    self._checkpoint(index, state)
        if valid and (not state["history"] or state["history"][-1]["step"] < state["step"]):
            self._validate(stage, valid, state)
        self._head.free()
        return self._finish(stage, state, before)

    def end(self) -> None:
        """Close the log and drop the checkpoint of a finished run."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            shutil.rmtree(self._saved, ignore_errors=True)

    # One step

    def _step(
        self,
        stage: Stage,
        train: Source,
        step: int,
        steps: int,
        optimizer: Any,
        show: Callable[[float, int], None],
    ) -> None:
        rate = learning_rate(stage, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        passes = train.passes(step)
        scale = self._scale(stage, passes)
        total = 0.0
        for number, rows in enumerate(passes):
            batch, counts = self._share(rows)
            candidates = self._sample(stage, batch, step, number)
            each, kinds = self._losses(batch, candidates, stage.smoothing)
            loss = (each * self._tensor(scale[kinds] * counts)).sum()
            self.accelerator.backward(loss)
            total += float(loss.detach())
        tokens = sum(row.tokens for rows in passes for row in rows)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._average.update()
        show(total, tokens)
        self.accelerator.log({f"{stage.name}/loss": total, f"{stage.name}/lr": rate}, step=step)

    def _share(self, rows: list[Row]) -> tuple[Batch, bool]:
        """This process's rows of a pass, and whether they count: where rows are fewer than processes some compute a
        row of another's for nothing, so that none waits for their gradients."""
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        return pack(own or rows[:1], align=False), bool(own)

    def _scale(self, stage: Stage, passes: list[list[Row]]) -> np.ndarray:
        """What one token of each kind counts, so that a kind's loss is a mean over the step however it is cut."""
        kinds = [kind for rows in passes for row in rows for branch in row.branches for kind in branch.kinds]
        counts = np.bincount(kinds, minlength=len(_KINDS) + 1)
        scale = np.zeros(len(counts), np.float32)
        for name, kind in _KINDS.items():
            # accelerate averages gradients over the processes; these are parts of one sum.
            scale[kind] = getattr(stage.weights, name) / max(1, counts[kind]) * self.accelerator.num_processes
        return scale

    def _losses(
        self, batch: Batch, candidates: np.ndarray | None = None, smoothing: float = 0.0
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The loss [positions] of every supervised position, and what kind each is."""
        places = np.flatnonzero(batch.kinds)
        kinds, labels = batch.kinds.ravel()[places], batch.labels.ravel()[places]
        # Of the two labels the other one; where there is no verdict any id will do, it does not count.
        others = np.where(kinds == VERDICT, sum(self.base.template.labels) - labels, labels)
        if candidates is not None:
            labels, others = np.searchsorted(candidates, labels), np.searchsorted(candidates, others)
        self._head.positions = self._tensor(places)
        logits = self.model(
            input_ids=self._tensor(batch.ids),
            attention_mask=self._tensor(visible(batch.segments, self.attention)[:, None]),
            position_ids=self._tensor(batch.positions),
            use_cache=False,
        ).logits
        logits = logits.float()
        each = F.cross_entropy(logits, self._tensor(labels), reduction="none")
        if smoothing:
            other = F.cross_entropy(logits, self._tensor(others), reduction="none")
            each = each + smoothing * (other - each)
        return each, kinds

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.accelerator.device)

    # The sampled softmax

    def _sample(self, stage: Stage, batch: Batch, *place: int) -> np.ndarray | None:
        """Narrows the head to `vocabulary_sample` ids, sorted: the batch's own targets, the stage's most frequent ones
        and random others."""
        if not stage.vocabulary_sample:
            return None
        size = min(self._vocabulary, stage.vocabulary_sample)
        own = np.union1d(batch.labels[batch.kinds != NOT_SUPERVISED], self.base.template.labels)
        frequent = self._frequent[~np.isin(self._frequent, own)]
        own = np.concatenate([own, frequent[: max(0, size - len(own))]])
        others = np.random.default_rng([self.config.seed, *place]).permutation(self._vocabulary)
        others = others[~np.isin(others, own)]
        drawn = others[: max(0, size - len(own))]
        candidates = np.concatenate([own, drawn])
        offsets = np.zeros(len(candidates), np.float32)
        if len(drawn):
            offsets[len(own) :] = math.log(len(others) / len(drawn))
        order = np.argsort(candidates)
        self._head.candidates, self._head.offsets = self._tensor(candidates[order]), self._tensor(offsets[order])
        return np.asarray(candidates[order])

    # Validation and early stopping

    def _validate(self, stage: Stage, valid: Source, state: dict[str, Any]) -> None:
        with self._average.applied(), torch.no_grad():
            self._measure(stage, valid, state)

    def _measure(self, stage: Stage, valid: Source, state: dict[str, Any]) -> None:
        self._head.candidates = None
        self.model.eval()
        sums = dict.fromkeys(_KINDS, 0.0)
        counts = dict.fromkeys(_KINDS, 0)
        for rows in (rows for step in range(len(valid)) for rows in valid.passes(step)):
            with self.accelerator.autocast():
                each, kinds = self._losses(pack(rows, align=False))
            for name, kind in _KINDS.items():
                sums[name] += float(each.cpu().numpy()[kinds == kind].sum())
                counts[name] += int((kinds == kind).sum())
        means = {name: sums[name] / counts[name] for name in _KINDS if counts[name]}
        loss = sum(getattr(stage.weights, name) * value for name, value in means.items())
        self.accelerator.log({f"{stage.name}/valid_{name}": value for name, value in means.items()}, step=state["step"])
        better = loss < state["best"]
        state["history"].append({"step": state["step"], "loss": loss, **means})
        self._report(
            f"{stage.name} step {state['step']}: validation "
            + "  ".join(f"{name} {value:.4f}" for name, value in {"loss": loss, **means}.items())
            + ("  best" if better else "")
        )
        if better:
            state.update(best=loss, bad=0)
            if stage.patience:
                self._save_best(stage)
        else:
            state["bad"] += 1
            state["stopped"] = bool(stage.patience and state["bad"] >= stage.patience)

    def _best(self, stage: Stage) -> Path:
        return self.config.output / "best" / f"{stage.name}.pt"

    def _save_best(self, stage: Stage) -> None:
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            path = self._best(stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        self.accelerator.wait_for_everyone()

    # Position on disk

    def _read_progress(self) -> dict[str, Any]:
        file = self._saved / "progress.json"
        previous = self._saved.with_suffix(".old")
        if not file.exists() and (previous / "progress.json").exists():
            # Killed between the two renames of `_write`: the previous checkpoint is whole.
            os.replace(previous, self._saved)
        progress: dict[str, Any] = read_json(file) if file.exists() else {"stage": -1, "state": None, "done": {}}
        return progress

    def _resume(self, index: int) -> dict[str, Any]:
        if self._progress["stage"] == index:
            self.accelerator.load_state(str(self._saved))
            self._report(f"going on from step {self._progress['state']['step']}")
            state: dict[str, Any] = self._progress["state"]
            return state
        return {"step": 0, "best": math.inf, "bad": 0, "stopped": False, "history": []}

    def load_finished(self) -> bool:
        """Load the weights that the last finished stage left, if a killed run stopped between stages or in one."""
        file = self._saved / "stage.pt"
        if not file.exists():
            return False
        self.base.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return True

    def _checkpoint(self, index: int, state: dict[str, Any]) -> None:
        self._progress.update(stage=index, state=state)
        self._write(lambda folder: self.accelerator.save_state(str(folder), safe_serialization=False))

    def _finish(self, stage: Stage, state: dict[str, Any], before: dict[str, torch.Tensor]) -> dict[str, Any]:
        measured = {"steps": state["step"], "validation": state["history"]}
        self._progress.update(stage=-1, state=None)
        self._progress["done"][stage.name] = measured
        with self._average.applied():
            weights = self.accelerator.get_state_dict(self.model)
            if stage.patience and state["history"]:
                weights = torch.load(self._best(stage), map_location="cpu", weights_only=True)
            if stage.keep:
                weights = mixed(before, weights, stage.keep)
            self._write(lambda folder: self.accelerator.save(weights, folder / "stage.pt"))
        self.accelerator.free_memory()
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # Its model is in pieces; the next stage starts from a whole one.
            self.base = self._load()
        self.load_finished()
        return measured

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().cpu().clone() for name, weight in self.base.model.state_dict().items()}

    def _write(self, save: Callable[[Path], object]) -> None:
        """Replace the checkpoint by a new one in a way a kill at any moment survives; every process calls `save`."""
        fresh, old = self._saved.with_suffix(".new"), self._saved.with_suffix(".old")
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save(fresh)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            stage = self._saved / "stage.pt"
            if stage.exists() and not (fresh / "stage.pt").exists():
                os.link(stage, fresh / "stage.pt")
            write_json(fresh / "progress.json", self._progress)
            shutil.rmtree(old, ignore_errors=True)
            if self._saved.exists():
                os.replace(self._saved, old)
            os.replace(fresh, self._saved)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    # What a person sees

    @contextmanager
    def _bar(self, stage: Stage, steps: int, start: int) -> Iterator[Callable[[float, int], None]]:
        """A progress bar on a terminal, a line every 50 steps elsewhere: loss, tokens/s, time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s  left"),
            TimeRemainingColumn(),
        )
        began, seen, steps_seen, smooth = time.monotonic(), 0, 0, math.nan
        with Progress(*columns, console=Console(stderr=True), disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(stage.name, total=steps, completed=start, loss=math.nan, speed=0.0)

            def show(loss: float, tokens: int) -> None:
                nonlocal seen, steps_seen, smooth
                seen, steps_seen = seen + tokens, steps_seen + 1
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                elapsed = time.monotonic() - began
                progress.update(task, advance=1, loss=smooth, speed=seen / elapsed)
                if not progress.console.is_terminal and steps_seen % 50 == 0:
                    left = elapsed / steps_seen * (steps - start - steps_seen)
                    self._report(
                        f"{stage.name} step {start + steps_seen}/{steps}  loss {smooth:.3f}  "
                        f"{seen / elapsed:,.0f} tokens/s  {left / 60:.0f} min left"
                    )

            yield show


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    warm = max(1, round(stage.warmup * steps))
    if step < warm:
        return stage.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return stage.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _groups(model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
