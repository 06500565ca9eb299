"""The backward one response at a time: the gradient of a batch in the activation memory of its longest response.

A loss over triplets needs every log-prob of a triplet, but its gradient needs them only through one coefficient per response:

    dL/dtheta  =  sum over b, m of  (dL/dlogp_bm) dlogp_bm/dtheta  +  (dL/dentropy_bm) dentropy_bm/dtheta

So all responses are scored without gradient, autograd gives the coefficients through the same loss function as ever, and each
response is then run again on its own, forward and backward. The price is the scoring pass: about a third more time than the joint
pass over separate rows. Deliberately knows no method and no model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tspin_kernels import SequenceStats

Batch = dict[str, Tensor]


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """Each row of a `TripletCollator` batch as a batch of one group with one member, without its padding."""
    width = batch["input_ids"].shape[1]
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        mine = batch["sequence_ids"] == row
        yield {
            "input_ids": batch["input_ids"][row : row + 1, :length],
            "attention_mask": batch["attention_mask"][row : row + 1, :length],
            "rows": batch["rows"][mine] - row * width,
            "targets": batch["targets"][mine],
            "sequence_ids": torch.zeros_like(batch["sequence_ids"][mine]),
            "lengths": batch["lengths"].view(-1)[row].view(1, 1),
        }


def _weighted(sequences: SequenceStats, *coefficients: Tensor) -> Tensor:
    # [1], from the coefficients of the log-prob and the entropy; where one is 0 its factor may be infinite.
    terms = zip(coefficients, sequences[:2], strict=False)
    return torch.stack([torch.where(c == 0, 0.0, c * value[:, 0]) for c, value in terms]).sum(0)


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
        scored = [score(row, lambda s: s.logprobs[:, 0], entropy="value")[1] for row in rows]
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
