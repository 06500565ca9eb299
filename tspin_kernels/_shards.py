"""A vocabulary cut into consecutive ranges of columns, one on each rank of a process group: what the ranks tell each other.

Only statistics of rows and the gradient in the hidden rows travel. Hidden rows and targets are the same on every rank; whether
they are is not looked at.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """The columns [start, stop) of this rank, out of V; `widest` is the most that a rank has."""

    group: "ProcessGroup"
    start: int
    stop: int
    V: int
    widest: int

    @property
    def ranks(self) -> int:
        return self.group.size()

    def merge(
        self, m: Tensor, s: Tensor, u: Tensor | None, target_logit: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Statistics of the rows over all columns, from those over this rank's; `targets` [N] are counted from `start`.

        They are gathered and merged in the order of the ranks, so that every rank has the same bits: the loss, its
        coefficients and which sequences are skipped follow from them on each rank alone.
        """
        mine = (targets >= 0) & (targets < self.stop - self.start)
        known = (targets >= -self.start) & (targets < self.V - self.start)
        sent = torch.stack([m, s, *([] if u is None else [u]), torch.where(mine, target_logit, 0)])
        parts = [torch.empty_like(sent) for _ in range(self.group.size())]
        dist.all_gather(parts, sent, group=self.group)
        ms, ss, *us, logits = torch.stack(parts, 1)
        m = ms.amax(0)
        # Rows of -inf alone so far: any finite reference will do.
        moved = ms - m.masked_fill(m == -torch.inf, 0)
        decay = moved.exp()
        if us:
            u = (decay * (us[0] + moved.masked_fill(ms == -torch.inf, 0) * ss)).sum(0)
        # One rank sent the target's logit and the others zero.
        return m, (decay * ss).sum(0), u, torch.where(known, logits.sum(0), torch.nan)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values


def gather_widths(group: "ProcessGroup", columns: int, device: torch.device, shared: dict[str, int]) -> list[int]:
    """How many columns each rank has. Every rank must call; raises ValueError, on all of them, where one has none or `shared`
    differs."""
    sent = torch.tensor([columns, *shared.values()], device=device)
    parts = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(parts, sent, group=group)
    widths, *others = torch.stack(parts, 1).tolist()
    if min(widths) == 0:
        raise ValueError(f"weight: want at least one row on every rank of process_group, got {widths}")
    for name, values in zip(shared, others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{name}: want the same on every rank of process_group, got {values}")
    return widths


def place_shard(group: "ProcessGroup", widths: list[int]) -> Shard:
    """This rank's place in the vocabulary."""
    rank = group.rank()
    start = sum(widths[:rank])
    return Shard(group, start, start + widths[rank], sum(widths), max(widths))
