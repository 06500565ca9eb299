"""Any loss of sequence log-probs, with its gradient formed in the forward: no logits are kept and none are made twice.

A preference loss sees the network through per-sequence sums of token log-probs (and entropies), and couples only the
sequences of one group: a triplet, a pair. So a block of whole groups is projected, its sums go through the loss as plain
PyTorch, autograd gives one coefficient per sequence, and the block of logits becomes its own gradient at once:
6NVD flops, 4NVD with a frozen head. A group that does not fit the budget costs a second projection (8NVD).
The backward only multiplies by the upstream scalar.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tspin_kernels._blocks import Gradients, Head, Upstream, compute_gradients, compute_stats, rows_module
from tspin_kernels._inputs import LogitTransform, accumulate_dtype, check_inputs, check_targets_in_range
from tspin_kernels._linear_logprobs import product_dtypes
from tspin_kernels._losses import tspin_loss
from tspin_kernels._plan import DEFAULT_BUDGET, Blocks, plan_blocks
from tspin_kernels._reference import linear_logprobs_reference
from tspin_kernels._sequences import LossFn, SequenceStats, check_groups, group_losses, sequence_loss, sum_sequences


def _coefficients(
    loss_fn: LossFn, stats: SequenceStats, group_inputs: Sequence[Tensor], entropy_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    # Losses [g] and their derivatives in the log-probs and entropies [g, group_size], by autograd through the user's function.
    with torch.enable_grad():
        logprobs = stats.logprobs.detach().requires_grad_()
        entropy = stats.entropy
        if entropy is not None:
            entropy = entropy.detach().requires_grad_(entropy_grad)
        losses = group_losses(loss_fn, SequenceStats(logprobs, entropy, stats.lengths), group_inputs)
        leaves = [logprobs] + ([entropy] if entropy is not None and entropy_grad else [])
        _refuse_captured(losses, leaves)
        if not losses.requires_grad:
            return losses, torch.zeros_like(logprobs), None
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    dlogprobs = torch.zeros_like(logprobs) if grads[0] is None else grads[0]
    return losses.detach(), dlogprobs, grads[1] if len(grads) > 1 else None


def _refuse_captured(losses: Tensor, leaves: list[Tensor]) -> None:
    # Every leaf of the loss' little graph must be ours: one captured by the closure would get no gradient.
    nodes, seen = [losses.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"loss_fn: want a function of its arguments and constants, got one that captures a tensor {list(variable.shape)} "
                "that requires grad; detach it, or add its term to the loss outside"
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)


class _Rows(NamedTuple):
    """The rows that count, ordered by sequence."""

    index: Tensor  # [N] into hidden
    may_repeat: bool  # whether several of them may be one row of hidden
    targets: Tensor  # [N]
    ids: Tensor  # [N] sequence of each row
    lengths: Tensor  # [G, group_size]
    per_group: list[int]


class _Call(NamedTuple):
    """The constants of one call."""

    loss_fn: LossFn
    group_inputs: Sequence[Tensor]
    normalizer: float | Tensor
    entropy: str | bool
    budget: int


def _select(
    targets: Tensor, ids: Tensor, rows: Tensor | None, ignore_index: int | None, num_groups: int, group_size: int
) -> _Rows:
    order = torch.sort(ids, stable=True).indices
    if ignore_index is not None:
        order = order[targets[order] != ignore_index]
    ids = ids[order]
    lengths = torch.bincount(ids, minlength=num_groups * group_size).view(num_groups, group_size)
    index = order if rows is None else rows[order]
    return _Rows(index, rows is not None, targets[order], ids, lengths, lengths.sum(1).tolist())


class _HiddenGradient:
    """The gradient in all hidden rows; where several targets share a row, their parts are summed in float32."""

    def __init__(self, hidden: Tensor, rows: _Rows, dtype: torch.dtype):
        self.total = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        self.may_repeat = rows.may_repeat
        self.slots: Tensor | None = None
        if rows.may_repeat and dtype in (torch.float16, torch.bfloat16):
            unique, inverse, counts = torch.unique(rows.index, return_inverse=True, return_counts=True)
            is_shared = counts > 1
            self.shared_rows = unique[is_shared]
            self.shared = hidden.new_zeros(len(self.shared_rows), hidden.shape[1], dtype=torch.float32)
            # Of each selected row, its place among the shared ones, or -1.
            self.slots = torch.where(is_shared, is_shared.cumsum(0) - 1, -1)[inverse]

    def add(self, block: slice, index: Tensor, part: Tensor) -> None:
        """Add the gradients `part` of the selected rows `block`, which are the hidden rows `index`."""
        if not self.may_repeat:
            self.total.index_copy_(0, index, part)
        elif self.slots is None:
            self.total.index_put_((index,), part, accumulate=True)
        else:
            slots = self.slots[block]
            alone, several = (slots < 0).nonzero().squeeze(1), (slots >= 0).nonzero().squeeze(1)
            self.total.index_copy_(0, index[alone], part[alone])
            self.shared.index_put_((slots[several],), part[several].float(), accumulate=True)

    def result(self) -> Tensor:
        if self.slots is not None:
            self.total.index_copy_(0, self.shared_rows, self.shared.to(self.total.dtype))
        return self.total


def _pack(per_group: list[int], max_rows: int) -> list[tuple[int, int]] | None:
    # Ranges of groups of at most `max_rows` rows, None where one group alone has more.
    ranges, start, used = [], 0, 0
    for group, rows in enumerate(per_group):
        if rows > max_rows:
            return None
        if used + rows > max_rows:
            ranges.append((start, group))
            start, used = group, 0
        used += rows
    ranges.append((start, len(per_group)))
    return ranges


def _group_blocks(
    head: Head, hidden: Tensor, rows: _Rows, wanted: list[bool], budget: int
) -> list[tuple[int, int]] | None:
    # Ranges of groups whose logits fit, None where a group is too large and the call takes two passes.
    sizes = partial(head.sizes, hidden=hidden, gathered=True, dhidden=wanted[0], dweight=wanted[1])
    N = rows.index.shape[0]
    if sizes(N).total(N, head.V) <= budget:
        return [(0, len(rows.per_group))]
    D, one = head.weight.shape[1], sizes(1)
    # Several blocks sum the weight's gradient in float32, taken a few columns at a time.
    accumulator = 4 * D * head.V if one.dweight == "narrow" else 0
    return _pack(rows.per_group, (budget - accumulator) // max(1, head.V * one.logit_bytes + one.row_bytes))


def _run(
    head: Head, hidden: Tensor, rows: _Rows, call: _Call, wanted: list[bool]
) -> tuple[Tensor, SequenceStats, Gradients]:
    # Loss, statistics and gradients; the gradients of `hidden` rows are summed where a row serves several targets.
    with_entropy = call.entropy is not False
    ranges = _group_blocks(head, hidden, rows, wanted, call.budget) if any(wanted) else None
    (V, D), group_size = head.weight.shape, rows.lengths.shape[1]
    dtype = accumulate_dtype(head.compute_dtype)
    # Several blocks, or a float16 gradient that waits for its scale, are summed in float32.
    wide = dtype if head.compute_dtype == torch.float16 or (ranges is not None and len(ranges) > 1) else None
    hidden_dtype = dtype if head.compute_dtype == torch.float16 else hidden.dtype
    hidden_gradient = _HiddenGradient(hidden, rows, hidden_dtype) if wanted[0] else None
    grads = Gradients(
        None,
        torch.zeros(V, D, dtype=wide or head.weight.dtype, device=hidden.device) if wanted[1] else None,
        hidden.new_zeros(V, dtype=dtype) if wanted[2] else None,
    )
    parts: list[tuple[Tensor, SequenceStats]] = []
    one_pass = ranges is not None
    start = 0
    for g0, g1 in ranges or [(0, len(rows.per_group))]:
        n = sum(rows.per_group[g0:g1])
        block = slice(start, start + n)
        start += n
        index, targets = rows.index[block], rows.targets[block]
        store = hidden.new_empty(n, V, dtype=head.logits_dtype) if one_pass else None
        sizes = head.sizes(n, hidden, gathered=True, dhidden=wanted[0], dweight=wanted[1])
        blocks = Blocks(max(1, n), V) if one_pass else plan_blocks(sizes, call.budget)
        stats = compute_stats(head, hidden, index, targets, blocks, with_entropy, store)
        lengths = rows.lengths[g0:g1]
        sums = [
            None if t is None else sum_sequences(t, lengths.reshape(-1)).view(-1, group_size)
            for t in (stats.logprobs, stats.entropy)
        ]
        sequences = SequenceStats(sums[0], sums[1], lengths)
        inputs = [tensor[g0:g1] for tensor in call.group_inputs]
        if not any(wanted):
            parts.append((group_losses(call.loss_fn, sequences, inputs), sequences))
            continue
        losses, dlogprobs, dentropy = _coefficients(call.loss_fn, sequences, inputs, call.entropy == "grad")
        parts.append((losses, sequences))
        if n == 0:
            continue
        local = rows.ids[block] - g0 * group_size
        upstream = Upstream(
            *(None if d is None else (d / call.normalizer).reshape(-1)[local].to(dtype) for d in (dlogprobs, dentropy))
        )
        dhidden = hidden.new_empty(n, D, dtype=hidden_dtype) if hidden_gradient else None
        compute_gradients(
            head,
            hidden,
            index,
            targets,
            stats,
            upstream,
            blocks,
            Gradients(dhidden, grads.weight, grads.bias),
            fresh=block.start == 0,
            store=store,
        )
        if hidden_gradient is not None and dhidden is not None:
            hidden_gradient.add(block, index, dhidden)
    losses = torch.cat([losses for losses, _ in parts])
    loss = losses.double().sum().to(dtype) / call.normalizer
    sums, entropies, lengths = zip(*(sequences for _, sequences in parts), strict=True)
    stats = SequenceStats(torch.cat(sums), None if entropies[0] is None else torch.cat(entropies), torch.cat(lengths))
    return loss, stats, grads._replace(hidden=hidden_gradient.result() if hidden_gradient else None)


class _SequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rows: _Rows,
        call: _Call,
        wanted: list[bool],
    ):
        loss, sequences, grads = _run(head, hidden, rows, call, wanted)
        ctx.grads = grads
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
        scaled = [None if g is None else g.mul_(dloss).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
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
        num_groups: by default the length of the first group input, else what `sequence_ids` reaches.
        normalizer: what the sum of the losses is divided by, the number of groups by default; a number or a tensor [].
        rows: [N] int64 into the flattened hidden, by default its rows in order; repeats are allowed, so that one hidden row can
            predict the first token of several responses.
        entropy: "value" passes entropies as constants, "grad" also differentiates the loss in them, False leaves them out.
        memory_budget: bytes for the logits of the groups in flight and for accumulators (2 GiB). A group beyond it costs a second
            projection. float16 also holds its gradients in float32 until the upstream scale is known.
        backend: as in `linear_logprobs`; "reference" is plain PyTorch with an ordinary graph.

    Returns:
        (loss [] float32, SequenceStats [num_groups, group_size], detached). The loss is differentiable once and its backward runs
        once: `create_graph=True` and a second backward raise RuntimeError.

    Raises:
        ValueError: wrong shapes, dtypes, devices, constants; a loss of the wrong shape, or one that captures a tensor that
            requires grad; a budget too small for one block.
    """
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    check_inputs(hidden, weight, targets, bias, transform, entropy)
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
        if N and rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= flat.shape[0]):
            raise ValueError(f"rows: want indices in [0, {flat.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
    num_groups = check_groups(ids, N, group_size, group_inputs, num_groups)
    if isinstance(normalizer, Tensor) and normalizer.requires_grad:
        raise ValueError("normalizer: want a constant, got a tensor that requires grad; detach it")
    if backend == "reference":
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
    head = Head(
        weight.detach(),
        None if bias is None else bias.detach().contiguous(),
        transform,
        *dtypes,
        rows_module(backend, hidden.device),
    )
    selected = _select(targets, ids, rows, ignore_index, num_groups, group_size)
    check_targets_in_range(selected.targets, head.V)
    call = _Call(
        loss_fn,
        group_inputs,
        max(1, num_groups) if normalizer is None else normalizer,
        entropy,
        DEFAULT_BUDGET if memory_budget is None else memory_budget,
    )
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (flat, weight, bias)]
    loss, *sequences = _SequenceLoss.apply(flat, weight, bias, head, selected, call, wanted)
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

    `options` are those of `linear_sequence_loss`; `group_size=2`, without proto, is for beta=0.
    """
    group_size = options.pop("group_size", 3)
    if group_size not in (2, 3) or (group_size == 2 and beta != 0):
        raise ValueError(
            f"group_size: want 3 (real, synthetic, proto), or 2 at beta=0, got {group_size} at beta={beta}"
        )

    def loss_fn(sequences: SequenceStats) -> Tensor:
        return tspin_loss(*sequences.logprobs.unbind(1), alpha=alpha, beta=beta, loss_type=loss_type)

    return linear_sequence_loss(hidden, weight, targets, sequence_ids, loss_fn, bias, group_size=group_size, **options)
