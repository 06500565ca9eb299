"""One adapter for each implementation: how it is called, and in one line what it computes. Peers are imported when asked for.

An adapter's `load` gives `call(hidden, weight, workload) -> Result`. Tasks, by what is differentiated: "tokens" log-prob and
entropy of each token with random upstream gradients, "nll" log-prob of each token, "mean" the mean NLL, a scalar,
"sequences" the T-SPIN loss. No peer shifts: `targets[i]` is what `hidden[i]` predicts, and every target counts.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference import BETA
from benchmarks.workloads import Case, Workload
from tspin_kernels import FilterReport, linear_logprobs, linear_tspin_loss

BOTH = ("forward", "forward+backward")


class Result(NamedTuple):
    """Outputs to check, and what to differentiate with which upstream gradients (None: one)."""

    logprobs: Tensor
    entropy: Tensor | None
    roots: tuple[Tensor, ...]
    upstream: tuple[Tensor | None, ...]
    kept_fraction: float | None = None  # of the backward's products, where columns were filtered


Call = Callable[[Tensor, Tensor, Workload], Result]


@dataclass(frozen=True)
class Implementation:
    """`flops`: of the matrix products of forward and backward, in NVD; `wide`: products leave the multiplication in float32."""

    name: str
    computes: str
    task: str
    load: Callable[..., Call]  # of a workload, and of the options that `options` gives
    flops: int
    distribution: str | None = None
    plan: str | None = None
    passes: tuple[str, ...] = BOTH
    frozen_head: bool = False
    wide: bool = False
    memory_budget: Callable[[Workload], int] | None = None
    filter_tolerance: float | None = None

    @property
    def key(self) -> str:
        """What `--peers` and a case's list of implementations call it."""
        return self.name if self.plan is None else f"{self.name}:{self.plan}"

    def budget(self, workload: Workload) -> int | None:
        """Bytes that ours may use: the case's, else the plan's."""
        return None if self.memory_budget is None else workload.case.memory_budget or self.memory_budget(workload)

    def prepare(self, workload: Workload) -> Call:
        """Import what it needs. Raises ImportError and whatever else keeps a peer from running here."""
        if self.plan is None:
            return self.load(workload)
        options: dict[str, Any] = {"memory_budget": self.budget(workload)}
        options["logits_dtype"] = torch.float32 if self.wide else None
        if self.filter_tolerance is not None:
            options["filter_tolerance"] = self.filter_tolerance
        return self.load(workload, options)


def _tokens(logprobs: Tensor, entropy: Tensor, workload: Workload) -> Result:
    return Result(logprobs, entropy, (logprobs, entropy), (workload.g, workload.h))


def _negated(nll: Tensor, entropy: Tensor | None, workload: Workload) -> Result:
    # Of a per-token NLL: the log-prob's upstream gradient changes its sign instead of the output.
    if entropy is None:
        return Result(-nll.detach(), None, (nll,), (-workload.g.to(nll.dtype),))
    upstream = (-workload.g.to(nll.dtype), workload.h.to(entropy.dtype))
    return Result(-nll.detach(), entropy.detach(), (nll, entropy), upstream)


def _scalar(loss: Tensor) -> Result:
    return Result(-loss.detach(), None, (loss,), (None,))


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token from stored logits, float32 after the product."""
    log_softmax = F.linear(hidden, weight).float().log_softmax(-1)
    logprobs = log_softmax.gather(-1, targets[:, None])[:, 0]
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def _load_naive(_: Workload) -> Call:
    return lambda hidden, weight, w: _tokens(*plain_logprobs(hidden, weight, w.targets), w)


def _load_compile(_: Workload) -> Call:
    torch._dynamo.reset()
    compiled = torch.compile(plain_logprobs, dynamic=False)
    return lambda hidden, weight, w: _tokens(*compiled(hidden, weight, w.targets), w)


def _load_torch_lce(_: Workload) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        return _negated(F.linear_cross_entropy(hidden, weight, w.targets, reduction="none", options=options), None, w)

    return call


def _load_trl(_: Workload) -> Call:
    from trl.kernels import ChunkedLogProbFunction

    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size
    except ImportError:  # its trainers want more than its kernels
        chunk_size = 32768

    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        # bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        arguments = (None, w.targets, 1.0, chunk_size, None, 1.0, ("entropy",))
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, *arguments)
        return _tokens(logprobs, entropy, w)

    return call


def _load_liger_flce(_: Workload) -> Call:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # It returns (loss, z_loss, token_accuracy, predicted_tokens); the defaults are reduction "mean", no bias, no softcap.
    return lambda hidden, weight, w: _scalar(LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, w.targets)[0])


def _load_liger_flsce(w: Workload) -> Call:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    if w.device.type == "cuda" and torch.cuda.get_device_capability(w.device) == (9, 0):
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        # temperature, ignore_index, m_tiles_per_cluster, return_entropy
        arguments = (1.0, -100, 1, True)
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, w.targets, *arguments)
        return _negated(nll, entropy, w)

    return call


def _load_cce(filter_eps: str | None) -> Callable[[Workload], Call]:
    def load(_: Workload) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
            options = {"reduction": "none", "shift": False, "filter_eps": filter_eps}
            return _negated(linear_cross_entropy(hidden, weight, w.targets, **options), None, w)

        return call

    return load


def _load_quack(w: Workload) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # 0.6.4 refuses chunks of as many rows as a row has elements.
    chunk_size = 4096 if w.case.D != 4096 else 8192 if w.case.N >= 8192 else 2048
    return lambda hidden, weight, w: _scalar(
        chunked_linear_cross_entropy(hidden, weight, w.targets, chunk_size=chunk_size, reduction="mean")
    )


def _load_verl(w: Workload) -> Call:
    if w.device.type != "cuda":
        raise ImportError("verl's kernel asserts that its inputs are on a GPU")
    try:
        verl_op = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    except ImportError:
        # Its kernel needs none of what importing the trainer pulls in (ray, tensordict, omegaconf).
        for name in ("verl", "verl.utils"):
            _import_bare(name)
        verl_op = importlib.import_module("verl.utils.kernel.linear_cross_entropy")

    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        # temperature, reduction, process group; it returns log-probs, not NLLs, and takes contiguous upstream gradients
        logprobs, entropy = verl_op.linear_cross_entropy(hidden, weight, w.targets, 1.0, "none", None)
        return _tokens(logprobs, entropy, w)

    return call


def _import_bare(name: str) -> None:
    # Make a package importable without running its __init__.
    for loaded in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
        del sys.modules[loaded]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"No module named {name!r}")
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = module


def store_budget(workload: Workload) -> int:
    """Bytes that hold the logits of the call and the copies that a block makes, with a margin."""
    case, itemsize = workload.case, workload.case.dtype.itemsize
    padded_weight = (case.V + 8) * case.D * itemsize if case.V % 8 else 0
    return (case.logits_bytes + 2 * case.N * case.D * itemsize + padded_weight) * 33 // 32 + 2**20


def recompute_budget(workload: Workload) -> int:
    """The op's default, or less than the logits where these would fit and be stored, which is another plan."""
    return min(2 * 2**30, workload.case.logits_bytes * 3 // 4)


def wide_store_budget(workload: Workload) -> int:
    """`store_budget` for logits in float32, whose gradient lies beside them in the inputs' dtype."""
    return store_budget(workload) + 4 * workload.case.N * workload.case.V


def filtered_budget(workload: Workload) -> int:
    """`store_budget`, what rows keep, and dweight in float32, twice where PyTorch sums."""
    case = workload.case
    return store_budget(workload) + 8 * case.V * case.D + case.logits_bytes * 2 + 2**26


def _load_tspin_tokens(_: Workload, options: dict[str, Any]) -> Call:
    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        found = linear_logprobs(hidden, weight, w.targets, ignore_index=None, **options)
        assert found.entropy is not None
        return _tokens(found.logprobs, found.entropy, w)

    return call


def _load_tspin_loss(workload: Workload, options: dict[str, Any]) -> Call:
    loss_options = {"alpha": workload.alpha, "beta": BETA, "num_groups": workload.num_groups, "ignore_index": None}

    def call(hidden: Tensor, weight: Tensor, w: Workload) -> Result:
        report = FilterReport() if "filter_tolerance" in options else None
        loss, found = linear_tspin_loss(
            hidden, weight, w.targets, w.sequence_ids, **loss_options, **options, filter_report=report
        )
        logprobs = found.logprobs / found.lengths
        return Result(logprobs, None, (loss,), (None,), None if report is None else report.kept_fraction)

    return call


_TOKENS = "log-prob and differentiable entropy of each token"
_FULL = ("forward+backward",)
IMPLEMENTATIONS = (
    Implementation("naive", f"{_TOKENS}; logits stored, float32 after the product", "tokens", _load_naive, 6, "torch"),
    Implementation("compile", "torch.compile of naive", "tokens", _load_compile, 6, "torch"),
    Implementation(
        "torch_lce",
        "F.linear_cross_entropy: NLL of each token in the inputs' dtype",
        "nll",
        _load_torch_lce,
        8,
        "torch",
    ),
    Implementation("trl", f"ChunkedLogProbFunction: {_TOKENS}, always recomputes", "tokens", _load_trl, 8, "trl"),
    Implementation(
        "liger_flce",
        "mean NLL, a scalar; gradient in the forward, dweight summed in the inputs' dtype",
        "mean",
        _load_liger_flce,
        6,
        "liger-kernel",
    ),
    Implementation(
        "liger_flsce",
        f"{_TOKENS}, entropy in bfloat16; CuTe on sm_90, torch in chunks of 512 elsewhere",
        "tokens",
        _load_liger_flsce,
        8,
        "liger-kernel",
    ),
    Implementation(
        "cce",
        "NLL of each token, small gradients dropped (the default)",
        "nll",
        _load_cce("high"),
        8,
        "cut-cross-entropy",
    ),
    Implementation("cce_exact", "NLL of each token, no filter", "nll", _load_cce(None), 8, "cut-cross-entropy"),
    Implementation(
        "quack",
        "mean NLL, a scalar; gradient in the forward, chunks of 4096 where it can",
        "mean",
        _load_quack,
        6,
        "quack-kernels",
    ),
    Implementation("verl", f"linear_cross_entropy: {_TOKENS}", "tokens", _load_verl, 8, "verl"),
    *(
        Implementation(
            "tspin",
            f"linear_logprobs: {_TOKENS}",
            "tokens",
            _load_tspin_tokens,
            flops,
            plan=plan,
            passes=("forward",) if plan == "infer" else ("forward+backward",),
            wide=wide,
            memory_budget=budget,
        )
        for plan, flops, wide, budget in (
            ("recompute", 8, False, recompute_budget),
            ("recompute", 8, True, recompute_budget),
            ("store", 6, False, store_budget),
            ("infer", 2, False, recompute_budget),
            ("infer", 2, True, recompute_budget),
        )
    ),
    *(
        Implementation(
            "tspin",
            "linear_tspin_loss, gradient in the forward, entropy as value",
            "sequences",
            _load_tspin_loss,
            flops,
            plan=plan,
            passes=("forward+backward",),
            frozen_head=flops == 4,
            wide=wide,
            memory_budget=budget,
            filter_tolerance=tolerance,
        )
        for plan, flops, wide, budget, tolerance in (
            ("loss", 6, False, store_budget, None),
            ("loss", 6, True, wide_store_budget, None),
            ("loss_frozen_head", 4, False, store_budget, None),
            ("loss_filtered", 6, False, filtered_budget, 1e-3),
        )
    ),
)


def select(peers: str, case: Case, excluded: tuple[str, ...] = ()) -> list[Implementation]:
    """Ours, naive, and the peers asked for ("all", "none" or names) that the case lists. Raises ValueError for an unknown one."""
    only, dtype = case.implementations, case.dtype
    names = {implementation.name for implementation in IMPLEMENTATIONS if implementation.plan is None}
    wanted = names if peers == "all" else set() if peers == "none" else set(peers.split(","))
    wanted = wanted | {"naive"}
    if unknown := wanted - names:
        raise ValueError(f"peers: want all, none or names of {sorted(names)}, got {sorted(unknown)}")
    return [
        implementation
        for implementation in IMPLEMENTATIONS
        if (implementation.plan is not None or implementation.name in wanted)
        and (only is None or implementation.name in only or implementation.key in only)
        and implementation.name not in excluded
        and not (implementation.wide and dtype == torch.float32)
    ]
