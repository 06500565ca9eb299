"""What is known of a step that went wrong, as files, and what the metrics of an iteration warn of.

Deliberately decides nothing about training: the trainer stops, this tells why. Log-probs are in nats.

B triplets of a batch, G members of a triplet.
"""

from __future__ import annotations

import logging
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from tspin.metrics import triplet_metrics
from tspin.storage import package_versions, write_json

if TYPE_CHECKING:
    from tspin.trainer import TSPINTrainer

logger = logging.getLogger(__name__)

# A warning is of means over at least so many triplets, and over all of an iteration that has fewer.
WATCHED_TRIPLETS = 64
# Share of triplets with sigmoid(-u) < 0.01 above which the current term is said to teach nothing.
SATURATED_SHARE = 0.9
# Mean length of the synthetic responses over that of the annotated ones, above which they are said to run away.
LENGTH_RATIO = 2.0

# The batch is kept beside the statistics where it takes less than this.
_BATCH_BYTES = 16 << 20
_PACKAGES = ("tspin", "torch", "transformers", "accelerate", "peft")
_KEYS = ("method", "alpha", "beta", "lam", "loss_type", "logp_reduction", "entropy_coef", "sft_coef", "drop_identical")
_KEYS += ("learning_rate", "optim", "max_grad_norm", "bf16", "fp16", "fused", "prefix_sharing", "memory_budget")


def non_finite(tensors: Any) -> dict[str, int]:
    """How many elements of the named tensors (pairs of name and tensor or None) are nan or inf, of this process's part."""
    counts = {}
    for name, tensor in tensors:
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part is not None and part.is_floating_point() and not (finite := part.isfinite()).all():
            counts[name] = int((~finite).sum())
    return counts


def write_bundle(trainer: TSPINTrainer, step: int, what: str, values: dict[str, Any]) -> str:
    """Write diagnostics/step-<step>/rank-<r>.json, and the batch as .safetensors, and return a clause that says where.

    The JSON holds what was not finite, the given values, learning rates, keys of the method, versions, the weights and
    gradients with nan or inf in them, and of each micro-batch its row ids and, for each triplet, its loss, lengths,
    log-probs, rewards, margins, gradient weights and entropies. What cannot be written is logged: it must not hide the fault.
    """
    folder, rank = Path(trainer.diagnostics) / f"step-{step}", trainer.accelerator.process_index
    try:
        named, optimizer = list(trainer.model.named_parameters()), cast(Any, trainer.optimizer)
        facts = {
            "step": step,
            "epoch": trainer.state.epoch,
            "not_finite": what,
            **values,
            "learning_rates": [group["lr"] for group in optimizer.param_groups] if optimizer else [],
            "beta_of_iteration": trainer.beta,
            "keys": {key: getattr(trainer.args, key) for key in _KEYS},
            "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
            "weights_not_finite": non_finite((name, p.detach()) for name, p in named),
            "gradients_not_finite": non_finite((name, p.grad) for name, p in named),
            "micro_batches": [_described(trainer, batch, sequences) for batch, sequences in trainer.scored],
        }
        write_json(folder / f"rank-{rank}.json", _plain(facts))
        tensors = {
            f"{i}/{name}": value.detach().cpu().contiguous()
            for i, (batch, _) in enumerate(trainer.scored)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        if tensors and sum(tensor.nbytes for tensor in tensors.values()) < _BATCH_BYTES:
            save_file(tensors, folder / f"rank-{rank}.safetensors")
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("the diagnostics of step %d cannot be written to %s: %s", step, folder, error)
        return "its diagnostics could not be written"
    return f"rows and statistics are in {folder}"


def _described(trainer: TSPINTrainer, batch: dict[str, Any], sequences: Any) -> dict[str, Any]:
    keep = trainer._kept(batch)
    references = [batch["ref_logps"]] if trainer.args.needs_references else []
    # Non-finite log-probs are what is looked for, so the loss is formed from all of them.
    with torch.no_grad():
        losses = trainer.loss_fn(sequences, keep, *references)
        columns = triplet_metrics(trainer.args, trainer.members, sequences, batch)
    described = {"rows": batch["row"]} if "row" in batch else {}
    described |= {"kept": keep, "loss": losses, "members": list(trainer.members)}
    return described | {name: numerator / denominator for name, (numerator, denominator) in columns.items()}


def _plain(value: Any) -> Any:
    """Tensors as lists, and numbers that JSON does not know as text."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Watch:
    """Warnings from the metrics of one iteration, each said once: saturation, and responses that run away in length."""

    def __init__(self):
        self.triplets, self.sums, self.said = 0, {}, set()

    def add(self, logs: dict[str, float], triplets: int, last: bool) -> list[str]:
        """What the means over all triplets so far warn of; `logs` are means over the newest `triplets`."""
        self.triplets += triplets
        for name in ("saturated", "truncated", "lengths/chosen", "lengths/rejected"):
            self.sums[name] = self.sums.get(name, 0.0) + triplets * logs.get(name, 0.0)
        if not triplets or (self.triplets < WATCHED_TRIPLETS and not last):
            return []
        mean, found = {name: total / self.triplets for name, total in self.sums.items()}, {}
        if mean["saturated"] > SATURATED_SHARE:
            found["saturated"] = (
                f"{mean['saturated']:.0%} of the triplets are saturated: sigmoid(-u) is below 0.01, so y and y' teach nothing; "
                "lower alpha, or set logp_reduction: mean with an alpha larger by about the length of a response"
            )
        if mean["lengths/rejected"] > LENGTH_RATIO * mean["lengths/chosen"]:
            found["lengths"] = (
                f"synthetic responses have {mean['lengths/rejected']:.0f} tokens in the mean, annotated ones "
                f"{mean['lengths/chosen']:.0f}, and {mean['truncated']:.0%} were cut; the loss then teaches length: set "
                "logp_reduction: mean, lower learning_rate, or train the first policy until it ends its responses"
            )
        new = [text for name, text in found.items() if name not in self.said]
        self.said |= found.keys()
        return new
