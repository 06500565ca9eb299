"""Any loss of sequence log-probs, with its gradient formed in the forward: no logits are kept and none are made twice.

A preference loss sees the network through per-sequence sums of token log-probs (and entropies), and couples only the
sequences of one group: a triplet, a pair. So a block of whole groups is projected, its sums go through the loss as plain
PyTorch, autograd gives one coefficient per sequence, and the block of logits becomes its own gradient at once:
6NVD flops, 4NVD with a frozen head. A group that does not fit the budget costs a second projection (8NVD).
The backward only multiplies by the upstream scalar.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tspin_kernels._filter import FilterReport
from tspin_kernels._groups import Call, Rows, check_rows, run_groups, select_rows
from tspin_kernels._head import Head, rows_module
from tspin_kernels._inputs import (
    LogitTransform,
    check_budget,
    check_devices,
    check_inputs,
    check_targets_in_range,
    refuse_lost_derivatives,
)
from tspin_kernels._linear_logprobs import product_dtypes, refuse_with_reference
from tspin_kernels._losses import tspin_loss
from tspin_kernels._plan import DEFAULT_BUDGET
from tspin_kernels._reference import linear_logprobs_reference
from tspin_kernels._sequences import LossFn, SequenceStats, check_groups, sequence_loss
from tspin_kernels._shards import gather_widths, place_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _SequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rows: Rows,
        call: Call,
        wanted: list[bool],
    ):
        loss, sequences, grads = run_groups(head, hidden, rows, call, wanted)
        ctx.grads, ctx.scale_ = grads, head.rows.scale_
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.mark_non_differentiable(*(t for t in sequences if t is not None))
        ctx.set_materialize_grads(False)
        return loss, *sequences

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_sequence_loss: its gradient is formed in the forward and has no derivative of its own; "
                "call backward without create_graph=True, or use backend='reference'"
            )
        if ctx.grads is None:
            raise RuntimeError(
                "linear_sequence_loss: backward was called twice; the first call handed its gradients over. "
                "Call it once on the sum of the losses, or use backend='reference'"
            )
        grads, ctx.grads = ctx.grads, None
        if dloss is None:
            return (None,) * 7
        pairs = zip(grads, ctx.dtypes, strict=True)
        scaled = [None if g is None else ctx.scale_(g, dloss).to(dtype) for g, dtype in pairs]
        return *scaled, None, None, None, None


@torch.compiler.disable
def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    loss_fn: LossFn,
    bias: Tensor | None = None,
    *,
    group_size: int,
    group_inputs: Sequence[Tensor] = (),
    num_groups: int | None = None,
    normalizer: float | Tensor | None = None,
    rows: Tensor | None = None,
    entropy: str | bool = "value",
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    logits_dtype: torch.dtype | None = None,
    process_group: "ProcessGroup | None" = None,
    filter_tolerance: float | None = None,
    filter_report: FilterReport | None = None,
) -> tuple[Tensor, SequenceStats]:
    """A loss of per-sequence log-probs straight from hidden states, its gradient formed in the same pass.

    Sequence s belongs to group `s // group_size` as its member `s % group_size`. Rows come in any order; sequences may be empty.

    Args:
        hidden: [..., D]. Differentiable. Logits, dtypes and transform as in `linear_logprobs`.
        weight, bias: [V, D], [V]. Differentiable; what does not require grad costs nothing in the backward.
        targets: [N] int64 (any shape of N elements), `ignore_index` where a row does not count.
        sequence_ids: [N] int64 in [0, num_groups * group_size).
        loss_fn: `loss_fn(sequences, *group_inputs) -> [g]`, called on blocks of g whole groups under autograd. `sequences` is a
            SequenceStats of [g, group_size]. Groups must be independent. Tensors captured by the closure are constants.
        group_inputs: tensors [num_groups, ...] sliced along with the groups: reference log-probs, weights. Constants.
        num_groups: by default the length of the first group input, else what `sequence_ids` reaches, for which a GPU is waited for.
        normalizer: what the sum of the losses is divided by, the number of groups by default; a number or a tensor [].
        rows: [N] int64 into the flattened hidden, by default its rows in order; repeats are allowed, so that one hidden row can
            predict the first token of several responses.
        entropy: "value" passes entropies as constants, "grad" also differentiates the loss in them, False leaves them out.
        memory_budget: bytes for the logits of the groups in flight and for accumulators (2 GiB). A group beyond it costs a second
            projection. float16 also holds its gradients in float32 until the upstream scale is known.
        backend: as in `linear_logprobs`; "reference" is plain PyTorch with an ordinary graph.
        process_group: as in `linear_logprobs`; `loss_fn` is evaluated on every rank, on the same bits.
        filter_tolerance: tau, 0 to 1: the gradient of each row may leave out vocabulary columns that carry at most tau of its
            probability; None is exact. With g and h a row's upstream gradients of log-prob and entropy, e = tau (|g| + |h|)
            logit_scale / temperature bounds its sum of |dlogits| left out; the error of its dhidden is at most e times the longest
            row of `weight`, that of dweight (Frobenius) at most the sum over rows of e times the length of the hidden row.
            The bound is summed up for each row, and a row that cannot meet it with few columns (on a GPU a 128th of them) is exact,
            as are the loss, the statistics, the gradient of `bias` and groups beyond the budget. A column that no row keeps gets
            no gradient in `weight`. Peaked distributions gain time, flat ones lose a little.
        filter_report: a `FilterReport` to which this call adds what it kept.

    Returns:
        (loss [] float32, SequenceStats [num_groups, group_size], detached). The loss is differentiable once and its backward runs
        once: `create_graph=True` and a second backward raise RuntimeError.

    Raises:
        ValueError: wrong shapes, dtypes, devices, constants; a loss of the wrong shape, or one that captures a tensor that
            requires grad; a budget too small for one block; ids or rows out of range, told by a GPU once its work is queued.
    """
    if backend != "reference":
        constants = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        refuse_lost_derivatives(hidden, weight, bias, **constants)
    transform = LogitTransform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
    check_inputs(hidden, weight, targets, bias, transform, entropy, empty_weight=process_group is not None)
    flat, targets, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), sequence_ids.reshape(-1)
    N = targets.shape[0]
    if rows is None and flat.shape[0] != N:
        raise ValueError(
            f"targets: want {flat.shape[0]}, one per row of hidden, got {N}; or pass rows, [{N}] indices into hidden"
        )
    if rows is not None:
        rows = rows.reshape(-1)
        if rows.dtype != torch.int64 or rows.shape[0] != N:
            raise ValueError(f"rows: want {N} int64, one per target, got {list(rows.shape)} {rows.dtype}")
    if isinstance(group_inputs, Tensor):
        raise ValueError("group_inputs: want a sequence of tensors, got a tensor; pass (tensor,)")
    others = {f"group_inputs[{i}]": tensor for i, tensor in enumerate(group_inputs)}
    check_devices(hidden, sequence_ids=sequence_ids, rows=rows, **others)
    verify_rows = check_rows(rows, flat.shape[0])
    num_groups, verify_ids = check_groups(ids, N, group_size, group_inputs, num_groups)
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad:
            raise ValueError("normalizer: want a constant, got a tensor that requires grad; detach it")
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: want a number or a tensor [], got {list(normalizer.shape)}")
        normalizer = normalizer.reshape(()).to(hidden.device)
    if filter_tolerance is not None and not 0 <= filter_tolerance <= 1:
        raise ValueError(f"filter_tolerance: want a number from 0 to 1, or None, got {filter_tolerance}")
    if filter_report is not None and filter_tolerance is None:
        raise ValueError(
            "filter_report: want a filter_tolerance with it, got None; pass one, or leave filter_report out"
        )
    if backend == "reference":
        refuse_with_reference(
            process_group=process_group, filter_tolerance=filter_tolerance, filter_report=filter_report
        )
        keep = slice(None) if ignore_index is None else targets != ignore_index
        tokens = linear_logprobs_reference(
            flat[keep] if rows is None else flat[rows[keep]],
            weight,
            targets[keep],
            bias,
            ignore_index=None,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            entropy=entropy,
            logits_dtype=logits_dtype,
        )
        return sequence_loss(
            tokens.logprobs,
            tokens.entropy,
            ids[keep],
            loss_fn,
            group_size=group_size,
            group_inputs=group_inputs,
            num_groups=num_groups,
            normalizer=normalizer,
        )
    dtypes = product_dtypes(hidden, weight, logits_dtype, backend)
    budget = check_budget(memory_budget, DEFAULT_BUDGET)
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (flat, weight, bias)]
    shard = None
    if process_group is not None:
        # What decides how often the ranks meet: who differs here would wait for the others for ever.
        shared = {"hidden": flat.shape[0], "targets": N, "num_groups": num_groups, "memory_budget": budget}
        shared |= {
            "entropy": entropy is not False,
            "filter_tolerance": filter_tolerance is not None,
            "hidden, weight or bias: requires_grad": sum(wanted),
        }
        shard = place_shard(process_group, gather_widths(process_group, weight.shape[0], flat.device, shared))
    head = Head(
        weight.detach(),
        None if bias is None else bias.detach().contiguous(),
        transform,
        *dtypes,
        rows_module(backend, hidden.device),
        shard,
    )
    selected = select_rows(targets, ids, rows, ignore_index, num_groups, group_size, flat.shape[0])
    check_targets_in_range(selected.targets, head.V if shard is None else shard.V)
    call = Call(
        loss_fn,
        group_inputs,
        max(1, num_groups) if normalizer is None else normalizer,
        entropy,
        budget,
        grad,
        filter_tolerance,
        filter_report,
    )
    loss, *sequences = _SequenceLoss.apply(flat, weight, bias, head, selected, call, wanted)
    # A GPU has all its work by now.
    verify_rows()
    verify_ids()
    return loss, SequenceStats(*sequences)


def linear_tspin_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "logistic",
    **options: Any,
) -> tuple[Tensor, SequenceStats]:
    """`linear_sequence_loss` with `tspin_loss`: groups are triplets whose members are real, synthetic and proto, in this order.

    `options` are those of `linear_sequence_loss`, among them `filter_tolerance`, `filter_report` and `process_group`;
    `group_size=2`, without proto, is for beta=0.
    """
    group_size = options.pop("group_size", 3)
    if group_size not in (2, 3) or (group_size == 2 and beta != 0):
        raise ValueError(
            f"group_size: want 3 (real, synthetic, proto), or 2 at beta=0, got {group_size} at beta={beta}"
        )

    def loss_fn(sequences: SequenceStats) -> Tensor:
        return tspin_loss(*sequences.logprobs.unbind(1), alpha=alpha, beta=beta, loss_type=loss_type)

    return linear_sequence_loss(
        hidden,
        weight,  # pyright: ignore[reportCallIssue]
        targets,
        sequence_ids,
        loss_fn,
        bias,
        group_size=group_size,
        **options,
    )
