"""Cases of linear_sequence_loss: rows of several sequences in any order, and one call with its gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tspin_kernels import SequenceStats

from .oracle import EPS, Case, least_budget, make_case, plain_sequence_loss


@dataclass(frozen=True)
class Sequences:
    """The inputs of one call; `rows` indexes hidden where given."""

    case: Case
    sequence_ids: torch.Tensor  # [N] int64
    group_size: int
    num_groups: int
    group_inputs: tuple[torch.Tensor, ...] = ()
    rows: torch.Tensor | None = None


def make_sequences(
    group_size: int,
    num_groups: int = 3,
    *,
    V: int = 150,
    D: int = 8,
    longest: int = 5,
    shuffle: bool = True,
    reference: bool = False,
    seed: int = 0,
    **case: Any,
) -> Sequences:
    """Sequences of 1 to `longest` tokens, rows shuffled; group_inputs hold reference log-probs when asked for."""
    g = torch.Generator().manual_seed(seed)
    S = group_size * num_groups
    ids = torch.repeat_interleave(torch.arange(S), torch.randint(1, longest + 1, (S,), generator=g))
    if shuffle:
        ids = ids[torch.randperm(len(ids), generator=g)]
    ref = (torch.randn(num_groups, group_size, generator=g) - 4.0,) if reference else ()
    return Sequences(make_case(len(ids), V, D, seed=seed, **case), ids, group_size, num_groups, ref)


UPSTREAM = -1.7
# In multiples of the least budget: all groups in one block, several, about one, and a group larger than the budget.
BUDGETS = [None, 4, 2, 1]


def budget_options(
    function: Callable[..., tuple[torch.Tensor, SequenceStats]],
    sequences: Sequences,
    loss_fn: Callable[..., torch.Tensor],
    multiple: float | None,
    **options: Any,
) -> dict[str, int]:
    """memory_budget as a multiple of the least that the torch backend accepts on the CPU; the default for None."""
    if multiple is None:
        return {}
    call = partial(evaluate_loss, function, sequences, loss_fn, **options, backend="torch")
    least = least_budget(lambda budget: call(memory_budget=budget))
    return {"memory_budget": int(multiple * least)}


def evaluate_loss(
    function: Callable[..., tuple[torch.Tensor, SequenceStats]],
    sequences: Sequences,
    loss_fn: Callable[..., torch.Tensor],
    *,
    device: str = "cpu",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradients times UPSTREAM of one call, in float64 on the CPU."""
    case = sequences.case.to(device)
    leaves = [case.hidden, case.weight] + ([] if case.bias is None else [case.bias])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    rows = None if sequences.rows is None else sequences.rows.to(device)
    inputs = tuple(t.to(device) for t in sequences.group_inputs)
    loss, stats = function(
        leaves[0],
        leaves[1],
        case.targets,
        sequences.sequence_ids.to(device),
        loss_fn,
        *leaves[2:],
        group_size=sequences.group_size,
        num_groups=sequences.num_groups,
        group_inputs=inputs,
        rows=rows,
        **options,
    )
    (loss * UPSTREAM).backward()
    named = (
        {"loss": loss}
        | stats._asdict()
        | dict(zip(("dhidden", "dweight", "dbias"), (leaf.grad for leaf in leaves), strict=False))
    )
    return {name: t.detach().double().cpu() for name, t in named.items() if t is not None}


def assert_loss_matches_oracle(
    function: Callable[..., tuple[torch.Tensor, SequenceStats]],
    sequences: Sequences,
    loss_fn: Callable[..., torch.Tensor],
    *,
    device: str,
    budget: float | None = None,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """`function` agrees with float64 over all groups at once, within a few times plain PyTorch's own error."""
    call = dict(call or {})
    call |= budget_options(function, sequences, loss_fn, budget, **options, **call)
    double = replace(
        sequences, case=sequences.case.to(torch.float64), group_inputs=tuple(t.double() for t in sequences.group_inputs)
    )
    exact = evaluate_loss(plain_sequence_loss, double, loss_fn, **options)
    plain = evaluate_loss(plain_sequence_loss, sequences, loss_fn, **options)
    got = evaluate_loss(function, sequences, loss_fn, device=device, **options, **call)
    rounding = max(64 * EPS, 2 * torch.finfo(sequences.case.hidden.dtype).eps)
    for name, truth in exact.items():
        if name == "entropy" and name not in got:
            continue
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
        size = max(truth.abs().max().item(), 1.0 if name in ("loss", "logprobs", "entropy") else 0.0)
        allowed = 4.0 * (plain[name] - truth).abs().max().item() + rounding * size
        error = (got[name] - truth).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, size {size:.3g}"
