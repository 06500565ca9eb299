"""The oracle: the op in plain PyTorch, in float64 for the truth and in the working dtype for the error budget.

It deliberately shares no line with the package, its reference included.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tspin_kernels import SequenceStats

EPS = torch.finfo(torch.float32).eps
OUTPUTS = ("logprobs", "entropy", "logsumexp")
GRADIENTS = ("dhidden", "dweight", "dbias")


@dataclass(frozen=True)
class Case:
    """Inputs of one call, already rounded to their dtype, and the upstream gradient of each output."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [N] int64
    bias: torch.Tensor | None  # [V]
    upstream: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [N] each: logprobs, entropy, logsumexp

    def to(self, *args: Any) -> "Case":
        bias = None if self.bias is None else self.bias.to(*args)
        upstream = tuple(u.to(args[0]) if isinstance(args[0], str) else u for u in self.upstream)
        targets = self.targets.to(args[0]) if isinstance(args[0], str) else self.targets
        return replace(
            self,
            hidden=self.hidden.to(*args),
            weight=self.weight.to(*args),
            targets=targets,
            bias=bias,
            upstream=upstream,
        )


def make_case(
    N: int,
    V: int,
    D: int = 8,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    offset: float = 0.0,
    spread: float = 2.0,
    ignored: float = 0.0,
    ignore_index: int = -100,
) -> Case:
    """Normal logits of deviation about `spread`, moved by `offset` in the bias; a share `ignored` is ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * spread / math.sqrt(D)
    targets = torch.randint(V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < ignored] = ignore_index
    shift = torch.randn(V, generator=g, dtype=torch.float64) + offset if bias else None
    upstream = tuple(torch.randn(N, generator=g) for _ in range(3))
    case = Case(hidden, weight, targets, shift, upstream)
    return case.to(dtype)


def plain_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: str = "grad",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What anyone would write: project in the dtype of the inputs, then float32 (float64 for float64)."""
    keep = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    z = F.linear(hidden[keep], weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = z.log_softmax(-1)
    values = (
        logp.gather(-1, targets[keep][:, None])[:, 0],
        -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1),
        torch.logsumexp(z, -1),
    )
    where = keep.nonzero()[:, 0]
    logprobs, h, lse = (torch.zeros(targets.shape, dtype=z.dtype).index_put((where,), v) for v in values)
    return logprobs, h, lse


def evaluate(
    function: Callable[..., Any], case: Case, *, device: str = "cpu", **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call with the case's upstream gradients, in float64 on the CPU."""
    case = case.to(device)
    leaves = [case.hidden, case.weight] + ([] if case.bias is None else [case.bias])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(leaves[0], leaves[1], case.targets, *leaves[2:], **options)
    pairs = [
        (o, u.to(o.dtype)) for o, u in zip(outputs, case.upstream, strict=True) if o is not None and o.requires_grad
    ]
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [u for _, u in pairs])
    named = dict(zip(OUTPUTS, outputs, strict=True)) | dict(zip(GRADIENTS, grads, strict=False))
    return {name: t.detach().double().cpu() for name, t in named.items() if t is not None}


def logit_rounding(case: Case, *, temperature: float = 1.0, logit_scale: float = 1.0, **_: Any) -> float:
    """What rounding the largest logit once to the inputs' dtype (16 times to float32) can do to an output, nats."""
    exact = case.to(torch.float64)
    logits = F.linear(exact.hidden, exact.weight, exact.bias)
    size = max(1.0, logits[logits.isfinite()].abs().max().item() * logit_scale / temperature) if logits.numel() else 1.0
    return size * max(16 * EPS, torch.finfo(case.hidden.dtype).eps / 2)


def assert_within_budget(
    got: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    rounding: float,
    *,
    multiple: float = 4.0,
) -> None:
    """The largest error of each tensor is at most `multiple` times plain PyTorch's own plus `rounding`.

    For gradients `rounding` is relative to the largest entry.
    """
    assert got.keys() >= exact.keys(), f"missing: {exact.keys() - got.keys()}"
    for name, truth in exact.items():
        if not truth.numel():
            assert got[name].shape == truth.shape
            continue
        assert torch.isfinite(got[name]).all(), f"{name} is not finite: {got[name]}"
        floor = rounding if name in OUTPUTS else rounding * truth.abs().max().item()
        allowed = multiple * (plain[name] - truth).abs().max().item() + floor
        error = (got[name] - truth).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, size {truth.abs().max():.3g}"


def assert_matches_oracle(
    function: Callable[..., Any], case: Case, *, device: str, call: dict[str, Any] | None = None, **options: Any
) -> None:
    """`function` called with `options` and `call` agrees with the oracle called with `options`."""
    transform = {k: v for k, v in options.items() if k != "softcap"}
    exact = evaluate(plain_logprobs, case.to(torch.float64), **options)
    plain = evaluate(plain_logprobs, case, **options)
    got = evaluate(function, case, device=device, **options, **(call or {}))
    assert_within_budget(got, plain, exact, logit_rounding(case, **transform))


def least_budget(call: Callable[[int], Any]) -> int:
    """The smallest memory_budget that `call` accepts, as its errors name it: the most blocks along both axes."""
    budget = 1
    while True:
        try:
            call(budget)
        except ValueError as error:
            named = re.search(r"memory_budget: want at least (\d+) bytes", str(error))
            assert named and int(named[1]) > budget, error
            budget = int(named[1])
        else:
            return budget


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the error over that of the truth."""
    exact = exact.detach().double().cpu()
    return ((got.detach().double().cpu() - exact).norm() / exact.norm()).item()


def plain_sequence_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    loss_fn: Callable[..., torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    num_groups: int,
    group_inputs: tuple[torch.Tensor, ...] = (),
    normalizer: float | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int | None = -100,
    **transform: Any,
) -> tuple[torch.Tensor, SequenceStats]:
    """Log-probs of all tokens at once, summed per sequence, one call of the loss over all groups."""
    hidden = hidden.flatten(0, -2)
    tokens = plain_logprobs(
        hidden if rows is None else hidden[rows], weight, targets, bias, ignore_index=ignore_index, **transform
    )
    counts = torch.ones_like(targets) if ignore_index is None else (targets != ignore_index).long()

    def sums(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(num_groups * group_size, dtype=values.dtype)
        return zeros.index_add(0, sequence_ids, values).view(num_groups, group_size)

    sequences = SequenceStats(sums(tokens[0]), sums(tokens[1]), sums(counts))
    return loss_fn(sequences, *group_inputs).sum() / (num_groups if normalizer is None else normalizer), sequences
