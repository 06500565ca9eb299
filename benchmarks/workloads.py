"""What is measured on: cases as data, and the tensors of a case. The recipes are fixed, seed included, so that nobody tunes them.

Random data: hidden ~ N(0, 1), weight ~ N(0, 1/D), uniform targets. Peaked data, like a language model's: a Zipf(1) prior over the
vocabulary comes in through one constant coordinate of hidden; the other coordinates are Gaussian with a scale found by
bisection so that the mean entropy of the softmax is the stated one; targets are sampled from the softmax.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ENTROPY_TOLERANCE = 0.05
PEAKED_ENTROPIES = (1.3, 2.2)
_PROBED_ROWS = 4096
_TOKENS_PER_TRIPLET = 1536


@dataclass(frozen=True)
class Case:
    """Sizes of one benchmark; `groups` are the names that stand for it in `--cases`."""

    name: str
    N: int
    D: int
    V: int
    groups: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16
    memory_budget: int | None = None  # of every plan, in place of each plan's own
    implementations: tuple[str, ...] | None = None  # only these; None: all

    @property
    def logits_bytes(self) -> int:
        return self.N * self.V * self.dtype.itemsize


_LEAN = ("naive", "trl", "tspin")
CASES = (
    Case("n4096-d4096-v128256", 4096, 4096, 128256, ("goals",)),
    Case("n8192-d4096-v151936", 8192, 4096, 151936, ("goals",)),
    Case("n16384-d2048-v248320", 16384, 2048, 248320, ("goals",)),
    Case("n8192-d896-v151936", 8192, 896, 151936, ("goals",)),
    Case(
        "n131072-d4096-v151936",
        131072,
        4096,
        151936,
        ("long",),
        memory_budget=4 * 2**30,
        implementations=("naive", "trl", "liger_flsce", "tspin:recompute", "tspin:infer", "tspin:loss"),
    ),
    # A token added to 32000.
    Case("n8192-d4096-v32001", 8192, 4096, 32001, ("odd",)),
    # Blocks of logits that stay in the L2 cache of a GPU, and such that do not.
    *(
        Case(f"n8192-d{D}-v151936-{mib}mib", 8192, D, 151936, ("l2",), torch.bfloat16, mib * 2**20, ("tspin:infer",))
        for D in (4096, 896)
        for mib in (24, 40, 256)
    ),
    *(
        Case(f"n{N}-d2048-v151936", N, 2048, 151936, ("sweep", "sweep-n"), implementations=_LEAN)
        for N in (1024, 4096, 16384, 65536)
    ),
    *(
        Case(f"n8192-d2048-v{V}", 8192, 2048, V, ("sweep", "sweep-v"), implementations=_LEAN)
        for V in (32000, 64000, 128256, 256000)
    ),
    Case("cpu-n512-d256-v32000", 512, 256, 32000, ("cpu", "cpu-sweep"), torch.float32),
    Case(
        "cpu-n4096-d256-v32000",
        4096,
        256,
        32000,
        ("cpu",),
        torch.float32,
        64 * 2**20,
        ("naive", "trl", "tspin:recompute"),
    ),
    *(
        Case(f"cpu-n{N}-d256-v32000", N, 256, 32000, ("cpu-sweep",), torch.float32, implementations=_LEAN)
        for N in (128, 2048)
    ),
    *(
        Case(f"cpu-n512-d256-v{V}", 512, 256, V, ("cpu-sweep",), torch.float32, implementations=_LEAN)
        for V in (8000, 128000)
    ),
    Case(
        "cpu-n1024-d128-v32000",
        1024,
        128,
        32000,
        ("cpu-filter",),
        torch.float32,
        implementations=("naive", "tspin:loss", "tspin:loss_filtered"),
    ),
    Case("tiny", 96, 32, 500, ("tiny",), torch.float32),
)


def select_cases(names: str) -> list[Case]:
    """Cases of a comma-separated list of names and groups, without repeats. Raises ValueError for an unknown one."""
    chosen: dict[str, Case] = {}
    for name in names.split(","):
        found = [case for case in CASES if name == case.name or name in case.groups]
        if not found:
            known = sorted({group for case in CASES for group in case.groups})
            raise ValueError(f"cases: want names of cases or of groups ({', '.join(known)}), got {name!r}")
        chosen.update({case.name: case for case in found})
    return list(chosen.values())


@dataclass(frozen=True)
class Workload:
    """The tensors of a case. A group of three sequences is a triplet; its tokens are contiguous."""

    case: Case
    data: str  # "random" or "peaked"
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N] int64
    g: Tensor  # [N] float32, upstream gradient of the log-probs
    h: Tensor  # [N] float32, of the entropies
    sequence_ids: Tensor  # [N] int64
    num_groups: int
    mean_entropy: float | None = None  # what the data was made for, nats

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def alpha(self) -> float:
        """Scale of the triplet margins: about one over a sequence's length, so that no triplet saturates."""
        return 3 * self.num_groups / self.case.N


def row_blocks(N: int, V: int, device: torch.device, itemsize: int = 8) -> Iterator[slice]:
    """Slices of rows whose [rows, V] matrix stays small beside the device's memory."""
    limit = (2**30 if device.type == "cuda" else 2**27) // itemsize
    rows = max(1, limit // V)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def make_workload(case: Case, data: str, device: torch.device, entropy: float | None = None) -> Workload:
    """The tensors of `case`; `entropy` is the mean entropy of peaked data, nats."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden, weight = normal(case.N, case.D), normal(case.V, case.D).div_(math.sqrt(case.D))
    if data == "random":
        hidden, weight = hidden.to(case.dtype), weight.to(case.dtype)
        targets = torch.randint(case.V, (case.N,), generator=generator, device=device)
    elif data == "peaked":
        assert entropy is not None
        hidden[:, 0] = 1
        hidden = hidden.to(case.dtype)
        weight = _peaked_weight(hidden, weight, entropy, case.dtype)
        targets = _sampled_targets(hidden, weight, generator)
    else:
        raise ValueError(f"data: want 'random' or 'peaked', got {data!r}")
    g, h = normal(case.N), normal(case.N)
    num_groups = max(1, case.N // _TOKENS_PER_TRIPLET)
    ids = torch.arange(case.N, device=device) * (3 * num_groups) // case.N
    return Workload(case, data, hidden, weight, targets, g, h, ids, num_groups, entropy)


def _peaked_weight(hidden: Tensor, noise: Tensor, entropy: float, dtype: torch.dtype) -> Tensor:
    # Weight [V, D] in `dtype`: the prior in its first column, `noise` times the bisected scale in the others.
    log_rank = torch.arange(1, noise.shape[0] + 1, device=noise.device, dtype=torch.float64).log()
    prior = (-log_rank - (-log_rank).logsumexp(0)).float()

    def scaled(scale: float) -> Tensor:
        weight = (noise * scale).to(dtype)
        weight[:, 0] = prior
        return weight

    low, high = 0.0, 64.0
    for _ in range(40):
        scale = (low + high) / 2
        weight = scaled(scale)
        found = mean_entropy(hidden[:_PROBED_ROWS], weight)
        if abs(found - entropy) < ENTROPY_TOLERANCE / 5:
            return weight
        low, high = (scale, high) if found > entropy else (low, scale)
    raise ValueError(f"entropy: want a mean entropy that the recipe can reach, got {entropy} nats; found {found:.3f}")


def _logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows in row_blocks(hidden.shape[0], weight.shape[0], hidden.device, itemsize=4):
        yield rows, (hidden[rows] @ weight.T).float()


def mean_entropy(hidden: Tensor, weight: Tensor) -> float:
    """Mean entropy of the rows' softmax, nats."""
    total = 0.0
    for _, logits in _logits(hidden, weight):
        log_p = logits.log_softmax(-1)
        total -= (log_p.exp() * log_p).sum().item()
    return total / hidden.shape[0]


def _sampled_targets(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    targets = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for rows, logits in _logits(hidden, weight):
        targets[rows] = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return targets
