"""What is right, and how far plain PyTorch is from it: the gate that an implementation passes before it is timed.

Reference and plain PyTorch are one blockwise evaluation, written out here without autograd and without a line of the packages
but the loss of a triplet: in float64 on the same device, or in the inputs' dtype with float32 row work, as anyone would write it.

With z the logits, p their softmax and H its entropy, upstream gradients g of the log-prob and h of the entropy give
`dz = g (1[y] - p) - h p (ln p + H)`, `dhidden = dz weight`, `dweight = dz^T hidden`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import Workload, row_blocks
from tspin_kernels import tspin_loss

BETA = 0.1
# A wrong formula is off by far more than this many times plain PyTorch's own error, rounding in an unlucky order by less.
MULTIPLE = 16.0


class Statistics(NamedTuple):
    """Of each row [N], nats; float64, or float32 for plain PyTorch."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


class Gradients(NamedTuple):
    """[N, D] and [V, D]."""

    hidden: Tensor
    weight: Tensor


class Evaluation:
    """Statistics and gradients of a workload: `exact` in float64, else plain PyTorch in the inputs' dtype.

    `wide`: plain products leave the matrix multiplication in float32 instead of the inputs' dtype.
    """

    def __init__(self, workload: Workload, exact: bool, wide: bool = False):
        self.workload = workload
        self.operand = torch.float64 if exact else workload.hidden.dtype
        self.accumulate = torch.float64 if exact else torch.float32
        self.wide = wide
        self.weight = workload.weight.to(self.operand)
        self.statistics = self._statistics()

    def _product(self, a: Tensor, b: Tensor, wide: bool) -> Tensor:
        # a @ b in the operands' dtype, or in the accumulator's.
        if not wide or self.operand in (torch.float32, torch.float64):
            return (a @ b).to(self.accumulate) if wide else a @ b
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()

    def _logits(self, rows: slice) -> Tensor:
        hidden = self.workload.hidden[rows].to(self.operand)
        return self._product(hidden, self.weight.T, self.wide).to(self.accumulate)

    def _statistics(self) -> Statistics:
        w = self.workload
        found = Statistics(*(torch.empty(w.case.N, dtype=self.accumulate, device=w.device) for _ in range(3)))
        for rows in row_blocks(w.case.N, w.case.V, w.device):
            z = self._logits(rows)
            found.logsumexp[rows] = z.logsumexp(-1)
            log_p = z.log_softmax(-1)
            found.logprobs[rows] = log_p.gather(1, w.targets[rows, None])[:, 0]
            found.entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        return found

    def upstream(self, task: str) -> tuple[Tensor, Tensor | None]:
        """Gradients of the task's loss in each row's log-prob and entropy, [N]."""
        w = self.workload
        if task == "tokens":
            return w.g, w.h
        if task == "nll":
            return w.g, None
        if task == "mean":
            return torch.full_like(w.g, -1 / w.case.N), None
        assert task == "sequences"
        with torch.enable_grad():
            logprobs = self.statistics.logprobs.detach().requires_grad_()
            loss = tspin_loss(*sequence_sums(logprobs, w).T, alpha=w.alpha, beta=BETA).mean()
        return torch.autograd.grad(loss, logprobs)[0], None

    def gradients(self, task: str) -> Gradients:
        """dhidden and dweight of a task, in float64 or rounded to the inputs' dtype."""
        w = self.workload
        g, h = self.upstream(task)
        dhidden = torch.empty(w.case.N, w.case.D, dtype=self.operand, device=w.device)
        dweight = torch.zeros(w.case.V, w.case.D, dtype=self.accumulate, device=w.device)
        for rows in row_blocks(w.case.N, w.case.V, w.device):
            z = self._logits(rows)
            log_p = z.sub_(self.statistics.logsumexp[rows, None])
            p = log_p.exp()
            factor = -g[rows, None].to(p.dtype)
            if h is not None:
                factor = factor - h[rows, None] * (log_p + self.statistics.entropy[rows, None])
            dz = p.mul_(factor).scatter_add_(1, w.targets[rows, None], g[rows, None].to(p.dtype)).to(self.operand)
            dhidden[rows] = self._product(dz, self.weight, wide=False)
            dweight += self._product(dz.T, w.hidden[rows].to(self.operand), wide=True)
        return Gradients(dhidden, dweight.to(self.operand))


def sequence_sums(logprobs: Tensor, workload: Workload) -> Tensor:
    """Log-probs of the sequences, [groups, 3]."""
    sums = logprobs.new_zeros(3 * workload.num_groups).index_add(0, workload.sequence_ids, logprobs)
    return sums.view(-1, 3)


def reduced(logprobs: Tensor, task: str, workload: Workload) -> Tensor:
    """What a task returns of the rows' log-probs: themselves, their mean [], or the mean over each sequence [groups, 3]."""
    if task == "mean":
        return logprobs.mean()
    if task == "sequences":
        return sequence_sums(logprobs, workload) / sequence_sums(torch.ones_like(logprobs), workload)
    return logprobs


def output_errors(
    exact: Statistics, task: str, workload: Workload, logprobs: Tensor, entropy: Tensor | None
) -> dict[str, float]:
    """Root mean square and largest error of what an implementation returned, nats."""
    errors = {}
    pairs = [("logprob", logprobs, reduced(exact.logprobs, task, workload)), ("entropy", entropy, exact.entropy)]
    for name, got, truth in pairs:
        if got is None:
            continue
        if got.shape != truth.shape:
            raise ValueError(f"{name}: want {list(truth.shape)}, got {list(got.shape)}")
        difference = got.double() - truth
        errors[name] = difference.square().mean().sqrt().item()
        errors[f"{name}_max"] = difference.abs().max().item()
    return errors


def gradient_errors(exact: Gradients, got: tuple[Tensor | None, Tensor | None]) -> dict[str, float]:
    """Frobenius norm of the error over that of the truth; `_row`: the worst row's error over the mean square row of the truth."""
    errors = {}
    for name, truth, gradient in (("dhidden", exact.hidden, got[0]), ("dweight", exact.weight, got[1])):
        if gradient is None:
            continue
        blocks = list(row_blocks(truth.shape[0], truth.shape[1], truth.device))
        wrong = torch.cat([(gradient[rows].double() - truth[rows]).square().sum(1) for rows in blocks])
        size = torch.cat([truth[rows].square().sum(1) for rows in blocks])
        errors[name] = (wrong.sum() / size.sum()).sqrt().item()
        errors[f"{name}_row"] = (wrong.max() / size.mean()).sqrt().item()
    return errors


def worst_row(truth: Tensor, got: Tensor | None) -> float | None:
    """The largest error of a row over that row's own size; inf where a row of zeros is not one."""
    if got is None:
        return None
    worst = 0.0
    for rows in row_blocks(truth.shape[0], truth.shape[1], truth.device):
        wrong, size = (got[rows].double() - truth[rows]).norm(dim=1), truth[rows].double().norm(dim=1)
        worst = max(worst, torch.where(wrong > 0, wrong / size, 0.0).max().item())
    return worst


def certified_errors(exact: Gradients, upstream: Tensor, workload: Workload, tolerance: float) -> dict[str, float]:
    """What filtering within `tolerance` may add to each of `gradient_errors`, by its documented bounds."""
    e = tolerance * upstream.abs().double()
    longest = workload.weight.float().norm(dim=1).max().item()
    spread = (e * workload.hidden.float().norm(dim=1)).sum().item()
    errors = {}
    for name, truth, norm, row in (
        ("dhidden", exact.hidden, e.norm().item() * longest, e.max().item() * longest),
        ("dweight", exact.weight, spread, spread),
    ):
        size = truth.norm().item()
        errors[name] = norm / size
        errors[f"{name}_row"] = row * math.sqrt(truth.shape[0]) / size
    return errors


def verdict(
    errors: dict[str, float],
    plain: dict[str, float],
    exact: Statistics,
    output_dtypes: dict[str, torch.dtype],
    multiple: float = MULTIPLE,
) -> str | None:
    """Why an implementation may not be timed, or None. Its budget is `multiple` times plain PyTorch's own error.

    Outputs may also be off by float32 rounding of a logsumexp, and by one rounding to the dtype they come in.
    """
    size = max(1.0, exact.logsumexp.abs().max().item(), exact.logprobs.abs().max().item())
    for name, error in errors.items():
        allowed = multiple * plain[name]
        if name.startswith(("logprob", "entropy")):
            rounding = torch.finfo(output_dtypes[name.removesuffix("_max")]).eps / 2
            allowed += size * max(rounding, 8 * torch.finfo(torch.float32).eps)
        if not error <= allowed:
            return f"{name} error {error:.3g}, at most {allowed:.3g} allowed"
    return None
