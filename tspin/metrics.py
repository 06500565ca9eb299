"""What is logged about training: the metrics of a batch of triplets, and their sums over micro-batches and ranks.

Deliberately writes nothing anywhere: the trainer takes the means at each logging step. Log-probs are in nats.

B triplets of a batch, G members of a triplet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tspin_kernels import SequenceStats

if TYPE_CHECKING:
    from tspin.training_args import TSPINConfig

Batch = dict[str, Any]


def reduced(args: TSPINConfig, sequences: SequenceStats, ref_logps: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log-probs [B, G] and references [B, G] as sums or means over tokens, as the loss sees them."""
    if args.logp_reduction == "sum":
        return sequences.logprobs, ref_logps
    lengths = sequences.lengths.clamp(min=1)
    return sequences.logprobs / lengths, None if ref_logps is None else ref_logps / lengths


def rewards(args: TSPINConfig, sequences: SequenceStats, ref_logps: Tensor | None) -> Tensor:
    """[B, G]: scaled log-probs, less the reference's where the method has one."""
    logps, refs = reduced(args, sequences, ref_logps)
    return (args.lam if args.method == "spin" else args.alpha) * (logps if refs is None else logps - refs)


def triplet_metrics(
    args: TSPINConfig, members: tuple[str, ...], sequences: SequenceStats, batch: Batch
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is logged about a batch: name -> (numerators [B], denominators [B]), both to be summed and then divided.

    logps are sums over tokens. u and v, the margins of the rewards, are the arguments of the two losses. Shares of triplets
    leave out those whose y' is y.
    """
    refs = batch.get("ref_logps") if args.needs_references else None
    (logps, _), gains = reduced(args, sequences, refs), rewards(args, sequences, refs)
    entropy: Any = sequences.entropy
    one, distinct = torch.ones_like(batch["identical"]), ~batch["identical"]
    metrics = {"truncated": (batch["truncated"], one), "identical": (batch["identical"], one)}
    for m, member in enumerate(members):
        metrics[f"logps/{member}"] = (sequences.logprobs[:, m], one)
        metrics[f"entropy/{member}"] = (entropy[:, m], sequences.lengths[:, m])
        metrics[f"lengths/{member}"] = (sequences.lengths[:, m], one)
        if len(members) > 1:
            metrics[f"rewards/{member}"] = (gains[:, m], one)
    if len(members) > 1:
        u = gains[:, 0] - gains[:, 1]
        misaligned = (u > 0) & (logps[:, 0] < logps[:, 1])
        metrics["rewards/margins"] = (u, one)
        metrics["rewards/accuracies"] = ((u > 0) & distinct, distinct)
        metrics["misaligned"] = (misaligned & distinct, distinct)
        metrics["weights/current"] = (torch.sigmoid(-u), one)
        metrics["saturated"] = ((torch.sigmoid(-u) < 0.01) & distinct, distinct)
    if len(members) > 2:
        v = gains[:, 1] - gains[:, 2]
        metrics["rewards/history_margins"] = (v, one)
        metrics["weights/history"] = (torch.sigmoid(-v), one)
    counted = batch["counted"]
    return {name: (torch.where(counted, a, 0), torch.where(counted, b, 0)) for name, (a, b) in metrics.items()}


class Meter:
    """Numerators and denominators summed on the device; summed over ranks and divided when the means are taken."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, pair in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.stack([x.detach().double().sum() for x in pair])

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        sums: Any = accelerator.reduce(torch.stack(list(self.sums.values())), "sum")
        names, self.sums = list(self.sums), {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
