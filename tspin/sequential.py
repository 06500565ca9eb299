"""The backward one response at a time: the gradient of a batch in the activation memory of its longest response.

A loss over triplets needs every log-prob of a triplet, but its gradient needs them only through one coefficient per response:

    dL/dtheta  =  sum over b, m of  (dL/dlogp_bm) dlogp_bm/dtheta  +  (dL/dentropy_bm) dentropy_bm/dtheta

So all responses are scored without gradient, those that share a prompt in one row; autograd gives the coefficients through the
same loss function as ever; and each response is then run again on its own, forward and backward. The price is the scoring pass:
about a third more time than the joint pass over separate rows. Deliberately knows no method and no model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tspin.prefix import PrefixLayout
from tspin_kernels import SequenceStats

Batch = dict[str, Any]


def _rows(batch: Batch) -> Iterator[Tensor]:
    """[1, P + L] ids of the prompt and each response, without padding."""
    ids, layout = batch["input_ids"], batch.get("prefix_layout")
    if layout is None:
        for row, length in zip(ids, batch["attention_mask"].sum(1).tolist(), strict=True):
            yield row[None, :length]
    else:
        for prompt, own in layout.responses():
            yield torch.cat([ids[:, prompt], ids[:, own]], 1)


def one_by_one(batch: Batch, *, packed: bool | None = None) -> Iterator[Batch]:
    """Each response of a `TripletCollator` batch, after its prompt, as a batch of one group with one member.

    packed: whether these batches carry a layout, for the attention of `tspin.prefix`; default as the batch does.
    """
    packed = "prefix_layout" in batch if packed is None else packed
    lengths = batch["lengths"].view(-1)
    targets = batch["targets"].split(lengths.tolist())
    for row, target, length in zip(_rows(batch), targets, lengths, strict=True):
        T, L = row.shape[1], len(target)
        yield {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "rows": torch.arange(T - L - 1, T - 1, device=row.device),
            "targets": target,
            "sequence_ids": torch.zeros_like(target),
            "lengths": length.view(1, 1),
            **({"prefix_layout": PrefixLayout(((T - L, (L,)),))} if packed else {}),
        }


def group_by_group(batch: Batch) -> Iterator[Batch]:
    """Each triplet of a packed batch as a packed batch."""
    start = token = 0
    for g, (P, lengths) in enumerate(batch["prefix_layout"].groups):
        stop, N = start + P + sum(lengths), sum(lengths)
        mine = slice(token, token + N)
        yield {
            "input_ids": batch["input_ids"][:, start:stop],
            "attention_mask": batch["attention_mask"][:, start:stop],
            "rows": batch["rows"][mine] - start,
            "targets": batch["targets"][mine],
            "sequence_ids": batch["sequence_ids"][mine] - g * len(lengths),
            "lengths": batch["lengths"][g : g + 1],
            "prefix_layout": PrefixLayout(((P, lengths),)),
        }
        start, token = stop, token + N


def _weighted(sequences: SequenceStats, *coefficients: Tensor) -> Tensor:
    # [1], from the coefficients of the log-prob and the entropy; where one is 0 its factor may be infinite.
    sums: Any = sequences[:2]
    return torch.stack([torch.where(c == 0, 0.0, c * value[:, 0]) for c, value in zip(coefficients, sums)]).sum(0)


def backward_one_by_one(
    score: Callable[..., tuple[Tensor, SequenceStats]],
    backward: Callable[[Tensor], None],
    batch: Batch,
    loss_fn: Callable[..., Tensor],
    *,
    group_inputs: tuple[Tensor, ...] = (),
    normalizer: Any = 1.0,
    entropy: Any = "value",
    unsynced: Callable[[], AbstractContextManager] = nullcontext,
    skip_zeros: bool = True,
) -> tuple[Tensor, SequenceStats]:
    """The gradient of the mean of `loss_fn` over the groups of a batch, all of it but the last response's.

    The caller runs the last backward, on the loss that is returned; so a wrapper that does something after a step's last backward
    needs to know of nothing, and there is a backward even where every coefficient is 0.

    Args:
        score: `score(batch, loss_fn, group_inputs=..., normalizer=..., entropy=...) -> (loss, SequenceStats)` with gradient;
            called under no_grad first. As `tspin.model.score_batch` with its model.
        backward: adds the gradient of a loss to the parameters; called for all rows but the last.
        batch: of a `TripletCollator`: B groups of G members.
        loss_fn, group_inputs, normalizer, entropy: as in `linear_sequence_loss`.
        unsynced: a context for each forward and backward but the last, as DistributedDataParallel's no_sync.
        skip_zeros: leave out responses whose coefficients are exactly 0. False where all ranks must run alike.
    Returns:
        (loss [] float32, SequenceStats [B, G], detached). The loss has the value of the whole batch and the gradient of its last
        response.
    """
    rows = list(one_by_one(batch))
    with torch.no_grad():
        parts = group_by_group(batch) if "prefix_layout" in batch else rows
        scored = [score(part, lambda s: s.logprobs[:, 0], entropy="value")[1] for part in parts]
    logprobs, entropies = (
        torch.cat(values).view(batch["lengths"].shape) for values in list(zip(*scored, strict=True))[:2]
    )
    sequences = SequenceStats(logprobs, entropies, batch["lengths"])
    wanted = [logprobs.requires_grad_()] + ([entropies.requires_grad_()] if entropy == "grad" else [])
    with torch.enable_grad():
        loss = loss_fn(sequences, *group_inputs).sum() / normalizer
    coefficients = torch.autograd.grad(loss, wanted, materialize_grads=True)
    of_rows = list(zip(*(c.view(-1, 1) for c in coefficients), strict=True))
    is_zero = torch.stack([(c == 0).view(-1) for c in coefficients]).all(0).tolist()
    last: Any = None
    for r, (row, mine) in enumerate(zip(rows, of_rows, strict=True)):
        run = partial(score, row, _weighted, group_inputs=mine, normalizer=1.0, entropy=entropy == "grad" and "grad")
        if r == len(rows) - 1:
            last, _ = run()
        elif not (skip_zeros and is_zero[r]):
            with unsynced():
                backward(run()[0])
    return last + (loss - last).detach(), SequenceStats(logprobs.detach(), entropies.detach(), batch["lengths"])
