"""What the loop hangs into transformers' Trainer: sealed checkpoints, a log that never runs ahead of them, a quiet progress bar."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback

from tspin import storage


def wait_for_everyone() -> None:
    """A barrier over all processes. Asked for anew each time: TrainingArguments resets accelerate's state."""
    PartialState().wait_for_everyone()


class Sealing(TrainerCallback):
    """Seals each checkpoint once it is whole, and keeps metrics.jsonl equal to the log up to the present step.

    Every save is preceded by a log, so that no average runs across a checkpoint; the last step is always saved.
    Old checkpoints go only after the new one is sealed, so one whole checkpoint exists at any moment.
    """

    def __init__(self, checkpoints: storage.Checkpoints, metrics: Path, limit: int | None):
        self.checkpoints, self.metrics, self.limit = checkpoints, metrics, limit
        self.saved_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            storage.write_atomic(self.metrics, storage.json_lines(state.log_history))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with open(self.metrics, "ab") as file:
                file.write(storage.json_lines(state.log_history[-1:]))

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
            self.checkpoints.seal(state.global_step, state.max_steps)
            self.checkpoints.rotate(self.limit)
        wait_for_everyone()


class Progress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, in place of every metric on a line of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")
