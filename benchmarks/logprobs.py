"""The benchmark of log-prob ops: for each case and kind of data a gate, then interleaved timing, then rows.

The floor of a plan is its matrix products, bare, in whole or in blocks of the vocabulary, whichever was faster, plus the bytes
that logits must travel between them (three times their size with a backward, once without) over the measured copy bandwidth.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.peers import Call, Implementation, Result, select
from benchmarks.reference import Evaluation, certified_errors, gradient_errors, output_errors, verdict, worst_row
from benchmarks.workloads import PEAKED_ENTROPIES, Case, Workload, make_workload

FIELDS = (
    *("benchmark", "case", "N", "D", "V", "dtype", "data", "implementation", "plan", "pass"),
    *("ms", "ms_p20", "ms_p80", "floor_ms", "gemm_ms", "traffic_ms", "memory_budget", "extra_mib"),
    *("error_logprob", "error_dhidden", "error_dweight", "kept_fraction"),
    *("device", "torch", "triton", "commit", "time"),
)
PRODUCTS = ("project", "dhidden", "dweight")
_VOCABULARY_BLOCKS = (32768, 8192)
# Of each product, how often a plan makes it, by its flops in NVD.
_PRODUCTS_OF = {2: (1, 0, 0), 4: (1, 1, 0), 6: (1, 1, 1), 8: (2, 1, 1)}
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}


def run(
    cases: list[Case],
    *,
    data: list[str],
    peers: str,
    device: torch.device,
    seconds: float,
    out: Path,
    commit: str | None = None,
    excluded: tuple[str, ...] = (),
    skip: int = 0,
) -> list[dict[str, Any]]:
    """Measure every case on every kind of data within about `seconds`, adding rows to `out` after each. Returns the rows.

    `skip` workloads are left out: those that an earlier process has done. Raises measure.PoisonedDevice, with `.done` workloads.
    """
    deadline = time.monotonic() + seconds
    kinds: list[tuple[str, float | None]] = [
        (kind, entropy) for kind in data for entropy in (PEAKED_ENTROPIES if kind == "peaked" else (None,))
    ]
    todo = [(case, *kind) for case in cases for kind in kinds]
    all_rows: list[dict[str, Any]] = []
    for number, (case, kind, entropy) in list(enumerate(todo))[skip:]:
        start = time.monotonic()
        common = {"benchmark": "logprobs", "case": case.name, "N": case.N, "D": case.D, "V": case.V}
        common |= {"dtype": str(case.dtype).removeprefix("torch."), "data": kind, "mean_entropy": entropy}
        common |= measure.environment(device, commit)
        implementations = select(peers, case, excluded)
        if start >= deadline:
            rows = [_row(each, name, missing="out of time") for each in implementations for name in each.passes]
        else:
            share = (deadline - start) / (len(todo) - number)
            try:
                workload = make_workload(case, kind, device, entropy)
                rows = Bench(workload, implementations).run(start + share)
                del workload
            except measure.PoisonedDevice as error:
                error.done = number
                if isinstance(error.culprit, tuple) and isinstance(error.culprit[0], int):
                    error.culprit = implementations[error.culprit[0]].name
                raise
        common |= {"load_after": measure.load()}
        rows = [{field: None for field in FIELDS} | common | row for row in rows]
        measure.append_rows(out, rows)
        all_rows += rows
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{case.name} {kind} {entropy or ''}: {len(rows)} rows in {time.monotonic() - start:.0f} s", flush=True)
    return all_rows


def _row(implementation: Implementation, pass_name: str, **values: Any) -> dict[str, Any]:
    row = {"implementation": implementation.name, "plan": implementation.plan, "pass": pass_name}
    row |= {"logits_dtype": "float32" if implementation.wide else None, "task": implementation.task}
    distribution = implementation.distribution
    return row | {"version": measure.installed(distribution) if distribution else None} | values


def invoke(
    call: Call, workload: Workload, pass_name: str, frozen_head: bool
) -> tuple[Result, tuple[Tensor | None, ...]]:
    """One pass: outputs, and the gradients of hidden and weight (None where not wanted)."""
    hidden, weight = workload.hidden.detach(), workload.weight.detach()
    if pass_name == "forward":
        with torch.no_grad():
            return call(hidden, weight, workload), (None, None)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen_head)
    result = call(hidden, weight, workload)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    gradients = torch.autograd.grad(result.roots, leaves, result.upstream)
    return result, (*gradients, *(None,) * (2 - len(gradients)))


class Bench:
    """One workload: gates, times and rows of its implementations."""

    def __init__(self, workload: Workload, implementations: list[Implementation]):
        self.workload = workload
        self.device = workload.device
        self.implementations = implementations
        self.rows: dict[tuple[int, str], dict[str, Any]] = {}
        self.calls: dict[Any, Callable[[], Any]] = {}
        self.prepared: dict[int, Call] = {}

    def run(self, deadline: float) -> list[dict[str, Any]]:
        """All rows of the workload; rounds go on until `deadline` (time.monotonic), at least a few."""
        self._gate()
        products = self._products()
        times, failed = measure.timed_rounds(
            {**self.calls, **products}, self.device, max(0.0, deadline - time.monotonic())
        )
        floors = self._floors(times)
        for key, row in self.rows.items():
            if key in failed:
                row["missing"] = failed[key]
            if key in times:
                row |= {"ms": times[key].ms, "ms_p20": times[key].ms_p20, "ms_p80": times[key].ms_p80}
                row |= {"rounds": times[key].rounds}
            implementation = self.implementations[key[0]]
            row |= floors(2 if key[1] == "forward" else implementation.flops, implementation.wide)
        bare = [
            {"implementation": "cublas" if self.device.type == "cuda" else "blas", "plan": key[1], "pass": "product"}
            | {"block": key[2], "ms": found.ms, "ms_p20": found.ms_p20, "ms_p80": found.ms_p80, "rounds": found.rounds}
            for key, found in times.items()
            if key[0] == "bare"
        ]
        return [*self.rows.values(), *bare]

    def _gate(self) -> None:
        # Fill `calls` with what may be timed and `rows` with what is known before timing.
        exact = Evaluation(self.workload, exact=True)
        plain = {
            wide: Evaluation(self.workload, exact=False, wide=wide)
            for wide in {False, *(implementation.wide for implementation in self.implementations)}
        }
        entropy = exact.statistics.entropy.mean().item()
        for task in dict.fromkeys(implementation.task for implementation in self.implementations):
            true, usual = exact.gradients(task), plain[False].gradients(task)
            budget = gradient_errors(true, usual)
            del usual
            for number, implementation in enumerate(self.implementations):
                if implementation.task != task:
                    continue
                statistics = plain[implementation.wide].statistics
                # Of the rows themselves, also where a task returns their mean: luck in averaging earns no stricter budget.
                outputs = output_errors(
                    exact.statistics, "tokens", self.workload, statistics.logprobs, statistics.entropy
                )
                for pass_name in implementation.passes:
                    row = _row(implementation, pass_name, memory_budget=implementation.budget(self.workload))
                    row |= {"measured_entropy": entropy}
                    row |= {f"plain_{name}": budget.get(name, outputs.get(name)) for name in _SHOWN}
                    self.rows[number, pass_name] = row
                    allowed = budget | outputs
                    if implementation.filter_tolerance is not None:
                        extra = certified_errors(
                            true, exact.upstream(task)[0], self.workload, implementation.filter_tolerance
                        )
                        allowed |= {name: allowed[name] + extra[name] for name in extra}
                    row |= self._check(number, pass_name, partial(_examine, exact.statistics, true, allowed))
            del true

    def _check(self, number: int, pass_name: str, examine: Callable[..., tuple[dict[str, float], str | None]]) -> dict:
        # Two runs: the first against the reference, the second against the first, its memory measured.
        implementation = self.implementations[number]
        try:
            if number not in self.prepared:
                self.prepared[number] = implementation.prepare(self.workload)
            call = partial(invoke, self.prepared[number], self.workload, pass_name, implementation.frozen_head)
            first, gradients = call()
            errors, refused = examine(implementation.task, self.workload, first, gradients)
            found: dict[str, Any] = {f"error_{name}": errors.get(name) for name in (*_SHOWN, _WORST)}
            found["kept_fraction"] = first.kept_fraction
            if refused is not None:
                return found | {"refused": refused}
            peak, (second, again) = measure.peak_bytes(call, self.device)
        except Exception as error:
            return {"missing": measure.reason(error, (number, pass_name))}
        kept = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        pairs = [
            (first.logprobs, second.logprobs),
            (first.entropy, second.entropy),
            *zip(gradients, again, strict=True),
        ]
        same = all(a is None or (b is not None and torch.equal(a, b)) for a, b in pairs)
        self.calls[number, pass_name] = call
        return found | {"extra_mib": (peak - kept) / 2**20, "bitwise": same}

    def _products(self) -> dict[Any, Callable[[], Any]]:
        """The bare products and a copy, as calls; none where their buffers do not fit."""
        w, case = self.workload, self.workload.case
        try:
            logits = torch.empty(case.N, case.V, dtype=case.dtype, device=self.device)
            dlogits = w.hidden @ w.weight.T
            for rows in range(0, case.N, 1024):
                # Values like those of a gradient: products of constants run faster.
                dlogits[rows : rows + 1024] = dlogits[rows : rows + 1024].float().softmax(-1)
            dhidden, dweight = torch.empty_like(w.hidden), torch.empty_like(w.weight)
            source = torch.randn(_COPIED_BYTES[self.device.type] // 4, device=self.device)
            target = torch.empty_like(source)
        except (RuntimeError, MemoryError) as error:
            if not measure.is_out_of_memory(error):
                raise
            return {}

        def product(name: str, block: int) -> None:
            for c0 in range(0, case.V, block):
                c1 = min(c0 + block, case.V)
                if name == "project":
                    out = logits if block >= case.V else logits.view(-1)[: case.N * (c1 - c0)].view(case.N, c1 - c0)
                    torch.mm(w.hidden, w.weight[c0:c1].T, out=out)
                elif name == "dhidden":
                    dhidden.addmm_(dlogits[:, c0:c1], w.weight[c0:c1], beta=0 if c0 == 0 else 1)
                else:
                    torch.mm(dlogits[:, c0:c1].T, w.hidden, out=dweight[c0:c1])

        blocks = [case.V, *(block for block in _VOCABULARY_BLOCKS if block < case.V)]
        calls: dict[Any, Callable[[], Any]] = {
            ("bare", name, block): partial(product, name, block) for name in PRODUCTS for block in blocks
        }
        calls["bare", "copy", source.nbytes] = partial(target.copy_, source)
        return calls

    def _floors(self, times: dict[Any, measure.Times]) -> Callable[[int, bool], dict[str, float]]:
        fastest = {
            name: min((found.ms for key, found in times.items() if key[:2] == ("bare", name)), default=None)
            for name in (*PRODUCTS, "copy")
        }
        if None in fastest.values():
            return lambda flops, wide: {}
        bytes_per_ms = 2 * _COPIED_BYTES[self.device.type] / fastest["copy"]

        def floor(flops: int, wide: bool) -> dict[str, float]:
            gemm = sum(n * fastest[name] for n, name in zip(_PRODUCTS_OF[flops], PRODUCTS, strict=True))
            narrow = self.workload.case.dtype.itemsize
            # Logits are read for the statistics; for the gradient again, which is written for the products.
            a_logit = 4 if wide else narrow
            moved = a_logit if flops == 2 else 2 * a_logit + narrow
            traffic = self.workload.case.N * self.workload.case.V * moved / bytes_per_ms
            return {"floor_ms": gemm + traffic, "gemm_ms": gemm, "traffic_ms": traffic}

        return floor


_SHOWN = ("logprob", "entropy", "dhidden", "dweight", "logprob_max", "dweight_row")
_WORST = "dweight_worst_row"


def _examine(
    exact: Any, true: Any, budget: dict[str, float], task: str, workload: Workload, found: Result, gradients: tuple
) -> tuple[dict[str, float], str | None]:
    errors = output_errors(exact, task, workload, found.logprobs, found.entropy)
    errors |= gradient_errors(true, gradients)
    dtypes = {"logprob": found.logprobs.dtype, "entropy": torch.float32}
    if found.entropy is not None:
        dtypes["entropy"] = found.entropy.dtype
    # Of a column that nothing carries the gradient is rounding alone: told, and no ground to refuse.
    worst = worst_row(true.weight, gradients[1])
    return errors | ({} if worst is None else {_WORST: worst}), verdict(errors, budget, exact, dtypes)
