"""Attention of one layer over a triplet with one prompt, forward and backward: which calls are fastest on a GPU.

`separate`: PyTorch's own choice of kernel on three rows. The others are plans of tspin.attention: `merged` has all responses attend
to the prompt in a call of their own and merges it with what each part makes of itself; `copied` is one call, the prompt's keys and
values copied for each response; `apart` is `copied`, but the prompt attends to itself by PyTorch's choice of kernel. All are
compared with float64 before they are timed.

P prompt tokens, L of each of G responses, T = P + G L; H query heads, H_kv key heads of width d.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from tspin.attention import attend, plan_calls
from tspin.prefix import PrefixLayout

G = 3
HEADS = {"qwen2.5-1.5b": (12, 2, 128), "llama-3.1-8b": (32, 8, 128)}
LENGTHS = ((512, 512), (2048, 512), (16384, 512), (16384, 2048))
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def separate(q: Tensor, k: Tensor, v: Tensor, P: int) -> Tensor:
    """[1, H, T, d], [1, H_kv, T, d] -> [T, H, d]."""
    rows = [_as_rows(x, P) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
    return torch.cat([out[0, :P], out[:, P:].flatten(0, 1)])


def _as_rows(x: Tensor, P: int) -> Tensor:
    prompt, responses = x[:, :, :P], x[0, :, P:].unflatten(1, (G, -1)).transpose(0, 1)
    return torch.cat([prompt.expand(G, -1, -1, -1), responses], 2)


def _by_plan(copies: bool, long: int | None, q: Tensor, k: Tensor, v: Tensor, P: int) -> Tensor:
    layout = PrefixLayout(((P, ((q.shape[2] - P) // G,) * G),))
    return attend(q, k, v, plan_calls(layout, None, copies, long), q.shape[-1] ** -0.5)[0]


IMPLEMENTATIONS: dict[str, Attention] = {
    "separate": separate,
    "merged": partial(_by_plan, False, None),
    "copied": partial(_by_plan, True, None),
    "apart": partial(_by_plan, True, 0),
}


def exact(q: Tensor, k: Tensor, v: Tensor, P: int) -> Tensor:
    """The same in float64, a run of queries at a time."""
    q, k, v = (x[0].double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    T = q.shape[1]
    at = torch.arange(T, device=q.device)
    part = torch.where(at < P, 0, 1 + (at - P) // max(1, (T - P) // G))
    outputs = []
    for rows in at.split(1024):
        sees = (at <= rows[:, None]) & ((part == 0) | (part == part[rows][:, None]))
        scores = (q[:, rows] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1)


def _call(attention: Attention, inputs: list[Tensor], grad: Tensor, P: int) -> tuple[Tensor, ...]:
    out = attention(*inputs, P)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def _cell(model: str, P: int, L: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    H, H_kv, d = HEADS[model]
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    # As a model leaves them: [1, T, heads, d], seen with the heads first.
    inputs = [draw(1, P + G * L, heads, d).transpose(1, 2).requires_grad_() for heads in (H, H_kv, H_kv)]
    grad = draw(P + G * L, H, d)
    rows, calls, truth = {}, {}, None
    if P + G * L <= 4096:  # what float64 has room for
        truth = _call(exact, inputs, grad.double(), P)
    for name, attention in IMPLEMENTATIONS.items():
        rows[name] = {"model": model, "prompt": P, "response": L, "implementation": name, "missing": None}
        try:
            found = _call(attention, inputs, grad, P)
        except Exception as error:
            rows[name]["missing"] = measure.reason(error, name)
            continue
        if truth is not None:
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]
            rows[name] |= dict(zip(("error", "error_dq", "error_dk", "error_dv"), errors, strict=True))
            if not max(errors) < 2e-2:
                rows[name]["missing"] = "another result than float64"
                continue
        calls[name] = partial(_call, attention, inputs, grad, P)
    times, failed = measure.timed_rounds(calls, device, seconds)
    for name, row in rows.items():
        row |= times[name]._asdict() if name in times else {"missing": failed.get(name, row["missing"])}
    return list(rows.values())


def run(device: torch.device, seconds: float, out: Path, commit: str | None = None) -> list[dict[str, Any]]:
    """Check and time every cell within about `seconds`, adding rows to `out`. Returns the rows."""
    deadline, rows = time.monotonic() + seconds, []
    cells = [(model, *lengths) for model in HEADS for lengths in LENGTHS]
    for number, cell in enumerate(cells):
        share = max(0.0, deadline - time.monotonic()) / (len(cells) - number)
        common = {"benchmark": "attention"} | measure.environment(device, commit)
        found = [common | row for row in _cell(*cell, device, share)]
        measure.append_rows(out, found)
        rows += found
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each implementation of each cell, its time over that of three rows."""
    lines, base = [], None
    for row in rows:
        base = row.get("ms") if row["implementation"] == "separate" else base
        start = f"{row['model']:14} {row['prompt']:6} + {G} x {row['response']:5} {row['implementation']:9}"
        ms = row.get("ms")
        shown = f"{ms:9.3f} ms {ms / base if base else 1:6.2f}" if ms else f"  {row['missing']}"
        lines.append(f"{start} {shown}" + (f"  error {row['error']:.1e}" if "error" in row else ""))
    return "\n".join(lines)
