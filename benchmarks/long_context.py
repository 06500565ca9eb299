"""The benchmarks `memory` (the longest triplet that fits, peak against length) and `train_step` (time and peak of a step).

Rows are those of benchmarks.training's implementations; a context that does not fit is a row too. On the CPU nothing runs out of
memory: a length fits there when the profiler's peak is below the cap.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.training import IMPLEMENTATIONS, MEMBERS, Arms, make_triplets

FIELDS = (
    *("benchmark", "device", "model", "implementation", "method", "cap_gib", "prompt_per_response"),
    *("prompt", "response", "triplets", "tokens", "longest", "ms", "ms_p20", "ms_p80", "rounds"),
    *("peak_gib", "above_gib", "refused", "missing"),
    *("torch", "triton", "transformers", "trl", "commit", "time"),
)
_GATE = (96, 24)
_RESOLUTION = 0.03
_LEAST, _STRIDE, _WORTH_IT = 256, 8, 1.2


class _Tried(NamedTuple):
    """A length that fitted."""

    prompt: int
    peak: int  # of the backward: that of the optimizer's step does not grow with the length
    seconds: float


def _common(benchmark: str, device: torch.device, commit: str | None, **values: Any) -> dict[str, Any]:
    versions = {name: measure.installed(name) for name in ("transformers", "trl")}
    row = dict.fromkeys(FIELDS) | {"benchmark": benchmark} | measure.environment(device, commit) | versions
    return row | values


def _lengths(prompt: int, response: int, triplets: int = 1) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response": response,
        "triplets": triplets,
        "tokens": prompt + MEMBERS * response,
        "prompt_per_response": round(prompt / response, 3),
    }


def _sizes(arms: Arms, peak: int | None) -> dict[str, Any]:
    if peak is None:
        return {}
    above = peak - arms.resident() - arms.gradients()
    return {"peak_gib": peak / 2**30, "above_gib": above / 2**30}


def _warm(arms: Arms) -> None:
    # So that optimizer states are there.
    arms.step("tspin", make_triplets(*_GATE, arms.vocab, arms.device))


def _set_cap(device: torch.device, cap_gib: float | None) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib or total) * 2**30 / total), device.index)


def train_step(
    cells: list[tuple[str, str]],
    lengths: list[tuple[int, int, int]],
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    *,
    device: torch.device,
    seconds: float,
    out: Path,
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """Time and peak of a step of each (model, method) at each of `lengths`. Rows are appended to `out` and returned.

    lengths: tokens of a prompt, tokens of a response, triplets of a step.
    """
    deadline, rows = time.monotonic() + seconds, []
    for number, (model, method) in enumerate(cells):
        arms = Arms(model, method, device)
        refused = arms.gate(make_triplets(*_GATE, arms.vocab, device, 2))
        _warm(arms)
        for at, (prompt, response, count) in enumerate(lengths):
            left = (len(cells) - number) * len(lengths) - at
            until = time.monotonic() + max(0.0, deadline - time.monotonic()) / left
            triplets, found = make_triplets(prompt, response, arms.vocab, device, count), {}
            for name in implementations:
                row = _common("train_step", device, commit, model=model, method=method, implementation=name)
                found[name] = row | _lengths(prompt, response, count) | {"refused": refused.get(name)}
                if name not in refused:
                    peak = arms.peak(name, triplets)
                    found[name] |= {"missing": peak} if isinstance(peak, str) else _sizes(arms, peak[0])
            able = [name for name, row in found.items() if not row["refused"] and not row["missing"]]
            calls = {name: partial(arms.step, name, triplets) for name in able}
            times, failed = measure.timed_rounds(calls, device, max(0.0, until - time.monotonic()))
            for name, row in found.items():
                row |= times[name]._asdict() if name in times else {"missing": failed.get(name, row["missing"])}  # type: ignore
            measure.append_rows(out, list(found.values()))
            rows += found.values()
            arms.clear()
        del arms
        _clear(device)
    return rows


def memory(
    cells: list[tuple[str, str]],
    ratios: list[float],
    caps: list[float | None],
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    *,
    device: torch.device,
    seconds: float,
    out: Path,
    commit: str | None = None,
    most: int = 2**20,
) -> list[dict[str, Any]]:
    """The longest triplet of each (model, method) under each cap (GiB, None: the whole GPU), with the peak of every length tried.

    ratios: tokens of the prompt by tokens of each response. Raises ValueError for a CPU without a cap.
    """
    if device.type != "cuda" and None in caps:
        raise ValueError("caps: want a number of GiB on the CPU, where nothing runs out of memory; got none")
    deadline, rows = time.monotonic() + seconds, []
    for number, (model, method) in enumerate(cells):
        arms = Arms(model, method, device)
        refused = arms.gate(make_triplets(*_GATE, arms.vocab, device, 2))
        _warm(arms)
        searches = [(cap, ratio, name) for cap in caps for ratio in ratios for name in implementations]
        for at, (cap, ratio, name) in enumerate(searches):
            left = (len(cells) - number) * len(searches) - at
            until = time.monotonic() + (deadline - time.monotonic()) / left
            row = _common("memory", device, commit, model=model, method=method, implementation=name, cap_gib=cap)
            row |= {"prompt_per_response": ratio, "refused": refused.get(name)}
            found: Iterable[dict[str, Any]] = [row]
            if time.monotonic() > deadline:
                row["missing"] = "out of time"
            elif name not in refused:
                _set_cap(device, cap)
                found = (row | tried for tried in _search(arms, name, ratio, cap, until, most))
            for each in found:
                measure.append_rows(out, [each])
                rows.append(each)
            _set_cap(device, None)
        del arms
        _clear(device)
    return rows


def _search(
    arms: Arms, name: str, ratio: float, cap: float | None, deadline: float, most: int
) -> Iterator[dict[str, Any]]:
    """A row for every length tried, then one for the longest that fitted.

    Memory grows with the tokens and time with no more than their square, so each length is guessed from those before it, and one
    that would not end before the deadline is not begun.
    """
    usable = _usable(arms.device, cap)
    fitted: list[_Tried] = []  # of growing length
    high, best, cut, bracketed = None, {}, None, 0
    while True:
        prompt = _guess(fitted, high, usable, bracketed > 2)
        if prompt is None:
            break
        left, prompt = deadline - time.monotonic(), min(prompt, most)
        longest = _longest_in(left, fitted)
        if longest < prompt:
            cut, prompt = "out of time: a lower bound", longest
            if prompt < _WORTH_IT * (fitted[-1].prompt if fitted else _LEAST):
                break
        begun, response = time.monotonic(), max(1, round(prompt / ratio))
        peak = arms.peak(name, make_triplets(prompt, response, arms.vocab, arms.device))
        if isinstance(peak, str):
            if peak != "out of memory":
                cut = peak
                break
            fits, tried = False, _lengths(prompt, response) | {"missing": peak}
        else:
            fits = arms.device.type == "cuda" or peak[0] <= usable
            tried = _lengths(prompt, response) | _sizes(arms, peak[0])
            tried["missing"] = None if fits else "above the cap"
        yield tried | {"prompt_per_response": ratio}
        if fits:
            fitted.append(_Tried(prompt, peak[1], time.monotonic() - begun))
            best = tried
        else:
            high = prompt
        bracketed += high is not None
        if cut:
            break
        if fits and prompt >= most:
            cut = "the search ends here: a lower bound"
            break
    yield best | {"prompt_per_response": ratio, "longest": best.get("tokens", 0), "missing": cut}


def _usable(device: torch.device, cap_gib: float | None) -> int:
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**62
    return total if cap_gib is None else min(total, int(cap_gib * 2**30))


def _guess(fitted: list[_Tried], high: int | None, usable: int, halve: bool) -> int | None:
    """The prompt to try next, by a line through the longest two that fitted. None at the end of a search."""
    if not fitted:
        return _LEAST if high is None else high // 2 or None
    low = fitted[-1].prompt
    if high is not None and high - low <= max(1, _RESOLUTION * low):
        return None
    meets = None  # where the line meets what is usable
    if len(fitted) > 1 and fitted[-1].peak > fitted[-2].peak:
        slope = (fitted[-1].peak - fitted[-2].peak) / (low - fitted[-2].prompt)
        meets = low + int((usable - fitted[-1].peak) / slope)
    end = _STRIDE * low if high is None else high
    if meets is not None and not halve:
        # Just below it fits, just above it does not: where the line is right, two tries end the search.
        below, above = int((1 - _RESOLUTION / 2) * meets), max(meets + 1, int((1 + _RESOLUTION) * low))
        if high is None or below <= (1 + _RESOLUTION) * low:
            below = above
        if low < below < end:
            return below
    return end if high is None else (low + high) // 2


def _longest_in(seconds: float, fitted: list[_Tried]) -> int:
    """The prompt whose step would take no longer: a constant, and a square through the last one. The first may have compiled."""
    if len(fitted) < 2:
        return 2**62 if seconds > 0 else 0
    last, constant = fitted[-1], min(tried.seconds for tried in fitted)
    if seconds <= last.seconds:
        return 0
    grows = last.seconds - constant
    return int(last.prompt * ((seconds - constant) / grows) ** 0.5) if grows > 0 else _STRIDE * last.prompt


def _clear(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
