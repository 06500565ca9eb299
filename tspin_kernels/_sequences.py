"""Groups of sequences and a loss over them, in plain PyTorch: what is left of a preference loss once log-probs are there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tspin_kernels._inputs import HostCopy, answers_at_once


class SequenceStats(NamedTuple):
    """Sums over the tokens of each sequence, [groups, group_size]: log-probs and entropies (float32, nats; entropy None when
    not computed) and the number of tokens that count (int64)."""

    logprobs: Tensor
    entropy: Tensor | None
    lengths: Tensor


LossFn = Callable[..., Tensor]


def group_losses(loss_fn: LossFn, stats: SequenceStats, group_inputs: Sequence[Tensor]) -> Tensor:
    losses = loss_fn(stats, *group_inputs)
    groups = stats.lengths.shape[0]
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (groups,):
        came = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn: want one loss per group, shape [{groups}], got {came}; do not reduce over groups")
    return losses


def sum_sequences(values: Tensor, lengths: Tensor) -> Tensor:
    # Sums of consecutive runs of `values` [N], of the shape of `lengths`, which says how long each is. Float64 inside and always in
    # one order.
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths.reshape(-1), unsafe=True, initial=0)
    return sums.to(values.dtype).view(lengths.shape)


def run_lengths(ids: Tensor, sequences: int) -> Tensor:
    # How often each of [0, sequences) stands in the sorted `ids`; a GPU is not waited for, as by bincount.
    return torch.searchsorted(ids, torch.arange(sequences + 1, device=ids.device, dtype=ids.dtype)).diff()


def check_groups(
    sequence_ids: Tensor, N: int, group_size: int, group_inputs: Sequence[Tensor], num_groups: int | None
) -> tuple[int, Callable[[], None]]:
    # The number of groups, after looking at all that describes them; and what raises where ids are out of range: at once where
    # that costs nothing, else whenever it is called.
    if group_size < 1:
        raise ValueError(f"group_size: want at least 1, got {group_size}")
    if sequence_ids.dtype != torch.int64 or sequence_ids.numel() != N:
        raise ValueError(
            f"sequence_ids: want {N} int64, one per target, got {list(sequence_ids.shape)} {sequence_ids.dtype}"
        )
    ends = HostCopy(torch.stack(sequence_ids.aminmax())) if N else None
    if num_groups is not None:
        groups = num_groups
    elif group_inputs:
        groups = group_inputs[0].shape[0]
    else:
        groups = max(-1, ends.read()[1]) // group_size + 1 if ends else 0

    def verify() -> None:
        smallest, largest = ends.read() if ends else (0, -1)
        if smallest < 0:
            raise ValueError(f"sequence_ids: want ids from 0 on, got {smallest}; mark rows to ignore in targets")
        if largest >= groups * group_size:
            raise ValueError(
                f"sequence_ids: want ids below num_groups * group_size = {groups * group_size}, got {largest}"
            )

    if answers_at_once(sequence_ids.device):
        verify()
    for i, tensor in enumerate(group_inputs):
        if tensor.dim() == 0 or tensor.shape[0] != groups:
            raise ValueError(f"group_inputs[{i}]: want [{groups}, ...], one row per group, got {list(tensor.shape)}")
        if tensor.requires_grad:
            raise ValueError(f"group_inputs[{i}]: want a constant, got a tensor that requires grad; detach it")
    return groups, verify


def sequence_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    sequence_ids: Tensor,
    loss_fn: LossFn,
    *,
    group_size: int,
    group_inputs: Sequence[Tensor] = (),
    num_groups: int | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, SequenceStats]:
    """The second half of `linear_sequence_loss` in plain PyTorch, for log-probs that are already there.

    Args:
        logprobs, entropy: [N] per token, nats. Differentiable. `entropy` may be None.
        sequence_ids, loss_fn and the rest: as in `linear_sequence_loss`.

    Returns: (loss [], SequenceStats [num_groups, group_size], detached).
    """
    num_groups, verify = check_groups(sequence_ids, logprobs.numel(), group_size, group_inputs, num_groups)
    verify()
    ids, order = sequence_ids.reshape(-1).sort(stable=True)
    lengths = run_lengths(ids, num_groups * group_size).view(num_groups, group_size)

    def per_sequence(values: Tensor) -> Tensor:
        return sum_sequences(values.reshape(-1)[order], lengths)

    stats = SequenceStats(per_sequence(logprobs), None if entropy is None else per_sequence(entropy), lengths)
    total = group_losses(loss_fn, stats, group_inputs).sum()
    loss = total / (max(1, num_groups) if normalizer is None else normalizer)
    return loss, SequenceStats(
        stats.logprobs.detach(), None if stats.entropy is None else stats.entropy.detach(), stats.lengths
    )
