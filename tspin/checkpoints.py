"""Checkpoints of a training that count only once they are whole, and the callbacks that make them so.

It knows of files and of the trainer's events, and deliberately nothing of the loop's stages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from tspin.storage import hash_json, json_lines, read_seal, remove_sealed, seal, write_atomic

logger = logging.getLogger(__name__)

# Pickled for readers that a resumed training is not among; a checkpoint holds nothing that must be trusted to be loaded.
_PICKLED = "training_args.bin"


def wait_for_everyone() -> None:
    """A barrier over all processes. Asked for anew each time: TrainingArguments resets accelerate's state."""
    PartialState().wait_for_everyone()


class Checkpoints:
    """The directories checkpoint-<step> of one training; those that are sealed count.

    origin: all that determines the training (settings, data, processes), None for any; stored in the seals, and a final checkpoint
        of another is none.
    """

    def __init__(self, directory: str | os.PathLike, origin: Mapping[str, Any] | None = None):
        self.directory = Path(directory)
        self.origin = origin

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("checkpoint-") for path in self.directory.glob("checkpoint-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def at(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"

    def _is_own(self, facts: Mapping[str, Any]) -> bool:
        return self.origin is None or facts["origin"] == hash_json(self.origin)

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        return next((self.at(step) for step in reversed(self._steps()) if read_seal(self.at(step))), None)

    def final(self) -> Path | None:
        """The whole checkpoint of the last step of training, or None while training is not finished."""
        for step in reversed(self._steps()):
            facts = read_seal(self.at(step))
            if facts is not None and step >= facts["max_steps"] and self._is_own(facts):
                return self.at(step)
        return None

    def seal(self, step: int, max_steps: int) -> None:
        """Mark the checkpoint of `step` as whole."""
        seal(self.at(step), max_steps=max_steps, origin=hash_json(self.origin))

    def rotate(self, limit: int | None) -> None:
        """Delete all but the newest `limit` checkpoints (at least one; None keeps all)."""
        for step in self._steps()[: 0 if limit is None else -max(1, limit)]:
            remove_sealed(self.at(step))

    def remove_unusable(self) -> None:
        """Delete what a kill left incomplete, and checkpoints of another origin."""
        for step in self._steps():
            facts = read_seal(self.at(step))
            if facts is None:
                logger.warning("%s is incomplete; training goes on from an earlier one", self.at(step))
            elif not self._is_own(facts):
                logger.warning("%s was made with other settings, data or processes; deleting it", self.at(step))
            else:
                continue
            remove_sealed(self.at(step))


class Sealing(TrainerCallback):
    """Seals each checkpoint once it is whole, and keeps metrics.jsonl equal to the log up to the present step.

    Every save is preceded by a log, so that no average runs across a checkpoint; the last step is always saved.
    Old checkpoints go only after the new one is sealed, so one whole checkpoint exists at any moment.
    """

    def __init__(self, checkpoints: Checkpoints, metrics: Path, limit: int | None):
        self.checkpoints, self.metrics, self.limit = checkpoints, metrics, limit
        self.saved_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomic(self.metrics, json_lines(state.log_history))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with open(self.metrics, "ab") as file:
                file.write(json_lines(state.log_history[-1:]))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step >= state.max_steps
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save &= state.global_step != self.saved_step
        control.should_log |= control.should_save

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        wait_for_everyone()
        if state.is_world_process_zero:
            (self.checkpoints.at(state.global_step) / _PICKLED).unlink(missing_ok=True)
            self.checkpoints.seal(state.global_step, state.max_steps)
            self.checkpoints.rotate(self.limit)
        wait_for_everyone()


class Progress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, in place of every metric on a line of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


class TensorBoard(TensorBoardCallback):
    """Trainer's, in one directory that outlives the checkpoints: a resumed training takes back what came after its checkpoint."""

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def on_train_begin(self, args, state, control, **kwargs):
        # A directory of the environment's stays as transformers has it.
        if self.logging_dir is None and state.is_world_process_zero:
            self.logging_dir = str(self.directory)
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)
