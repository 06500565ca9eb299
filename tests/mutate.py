"""Puts known bugs into a copy of tspin_kernels, one at a time, and prints which test fails first.

`python tests/mutate.py [words of a name ...]`; `--known` the table of an earlier run tries its tests first, which takes a quarter
of the hour. A bug that survives makes the exit status 1; a replacement that no longer applies, and tests that fail without any
bug, are errors. It deliberately does not generate mutations: each is a bug that a library of this kind has shipped, or a line
whose loss would be silent.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tspin_kernels"
PLAIN, TRITON, HEAD, BLOCKS = "_rows_torch.py", "_rows_triton.py", "_head.py", "_blocks.py"
RUN, OPS, SHARDS, FILTER = "_groups.py", "_token_ops.py", "_shards.py", "_filter.py"
KEPT, KEPT_TRITON = "_sparse_torch.py", "_sparse_triton.py"
TOKENS, GROUPS, SUMS = "_linear_logprobs.py", "_sequence_loss.py", "_sequences.py"
VALUES = "test_linear_logprobs.py test_properties.py test_inputs_and_masks.py"
SEQUENCES = "test_sequence_loss.py test_sequence_layout.py"
PYTEST = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull]


@dataclass(frozen=True)
class Mutation:
    """One bug: each `old` in `file` becomes `new`; `tests` are the files that must notice, `only` narrows them (-k)."""

    bug: str
    file: str
    old: str
    new: str
    tests: str = VALUES
    only: str = "not reference-cpu"


def both(bug: str, torch_edit: tuple[str, str], triton_edit: tuple[str, str], tests: str = VALUES) -> list[Mutation]:
    """The same bug in each of the twin row-kernel modules."""
    return [
        Mutation(f"{bug} (torch)", PLAIN, *torch_edit, tests, "torch-cpu"),
        Mutation(f"{bug} (triton)", TRITON, *triton_edit, tests, "triton"),
    ]


MUTATIONS = [
    # 1. Phantom vocabulary
    Mutation(
        "1 mask of the last tile removed",
        TRITON,
        'mask=in_v, other=float("-inf")',
        "mask=in_v, other=0.0",
        only="triton",
    ),
    Mutation(
        "1 mask of the last tile removed from scaled logits",
        TRITON,
        'tl.where(in_v, z, float("-inf"))',
        "z",
        only="triton",
    ),
    *both(
        "1 running maximum floored at 0",
        ("m_new = torch.maximum(m_old, z.amax(1))", "m_new = torch.maximum(m_old, z.amax(1)).clamp(min=0)"),
        ("m_new = tl.maximum(m, tl.max(z, axis=1))", "m_new = tl.maximum(tl.maximum(m, tl.max(z, axis=1)), 0.0)"),
    ),
    Mutation("1 running maximum starts at 0", BLOCKS, "torch.full((N,), -torch.inf", "torch.full((N,), 0.0"),
    # 2. Uniform upstream
    Mutation(
        "2 upstream[0] for every token",
        OPS,
        "Upstream(pick(dlogprobs), pick(dentropy), pick(dlogsumexp))",
        "Upstream(*(None if d is None else pick(d)[:1].repeat(N) for d in (dlogprobs, dentropy, dlogsumexp)))",
    ),
    Mutation(
        "2 coefficient of the first sequence for all",
        RUN,
        ".reshape(-1)[local]",
        ".reshape(-1)[local * 0]",
        SEQUENCES,
    ),
    # 3. Rounding before the subtraction
    *both(
        "3 softmax rounded before one-hot is subtracted",
        ("p = log_p.exp()\n", "p = log_p.exp().to(logits.dtype).to(m.dtype)\n"),
        ("_exp(log_p) * factor", "_exp(log_p).to(logits_ptr.dtype.element_ty).to(tl.float32) * factor"),
    ),
    # 4. Entropy at an offset
    Mutation("4 entropy as logsumexp minus the mean logit", BLOCKS, "log_s - u / s", "(m + log_s) - (m + u / s)"),
    *both(
        "4 m and ln s summed before the logit is subtracted",
        (
            "torch.sub(z, m[tile].unsqueeze(1)).sub_(log_s[tile].unsqueeze(1))",
            "torch.sub(z, (m[tile] + log_s[tile]).unsqueeze(1))",
        ),
        ("log_p = (z - m) - log_s", "log_p = z - (m + log_s)"),
    ),
    # 5. Entropy gradient
    Mutation("5 entropy gradient dropped", OPS, "pick(dentropy), pick(dlogsumexp))", "None, pick(dlogsumexp))"),
    Mutation(
        "5 entropy gradient dropped from the loss", RUN, "grads[1] if len(grads) > 1 else None", "None", SEQUENCES
    ),
    Mutation("5 H missing from the entropy gradient", PLAIN, ".add_(entropy[tile].unsqueeze(1))", "", only="torch-cpu"),
    Mutation(
        "5 entropy gradient under entropy='value'",
        RUN,
        ".requires_grad_(entropy_grad)",
        ".requires_grad_()",
        SEQUENCES,
    ),
    Mutation("5 gradient of logsumexp dropped", OPS, "pick(dentropy), pick(dlogsumexp))", "pick(dentropy), None)"),
    # 6. Offsets
    Mutation("6 int32 row offsets", TRITON, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "test_offsets.py"),
    # 7. Strides
    Mutation(
        "7 stride-0 upstream misread",
        OPS,
        "values.contiguous() if index is None",
        "values if index is None",
        only="triton",
    ),
    # 8. Ignored rows
    Mutation(
        "8 outputs of ignored rows left uninitialised",
        OPS,
        "values.new_zeros(targets.shape)",
        "values.new_full(targets.shape, 7.0)",
    ),
    Mutation(
        "8 gradients of ignored rows left uninitialised",
        OPS,
        "torch.zeros_like(hidden,",
        "torch.full_like(hidden, 7.0,",
    ),
    Mutation("8 gradients of an empty call left uninitialised", OPS, "gradient.zero_()", "gradient.fill_(torch.nan)"),
    # 9. Bias and frozen heads
    Mutation(
        "9 bias gradient of the last block of tokens only",
        BLOCKS,
        "dbias += column_sums if",
        "dbias[:] = column_sums if",
    ),
    Mutation("9 bias left out of the logits", PLAIN, "z = z + bias.to(dtype)", "pass", only="torch-cpu"),
    Mutation("9 bias gradient ignores the softcap", BLOCKS, "logits.sum(0, dtype", "logits.neg().sum(0, dtype"),
    Mutation("9 dW of a frozen head computed", TOKENS, "grad and weight.requires_grad", "grad", "test_memory.py"),
    Mutation(
        "9 dW of a frozen head computed by the loss",
        GROUPS,
        "t.requires_grad for t",
        "True for t",
        "test_memory.py test_autograd.py",
    ),
    # 10. Accumulation
    Mutation(
        "10 accumulated in the short dtype",
        BLOCKS,
        "accumulate_dtype(out.dtype) if is_sum else out.dtype",
        "out.dtype",
    ),
    Mutation(
        "10 float16 gradient not rescaled",
        BLOCKS,
        "if head.compute_dtype != torch.float16:",
        "if True:",
        "test_precision.py",
    ),
    # 11. The compiler
    Mutation(
        "11 fake result in the wrong dtype",
        OPS,
        "row = hidden.new_empty(targets.shape, dtype=accumulate_dtype(operand_dtype))",
        "row = hidden.new_empty(targets.shape, dtype=torch.float64)",
        "test_compile.py",
    ),
    Mutation(
        "11 in-place backward hides what it mutates",
        OPS,
        '(True, "_", ("products", "grad_buffer"))',
        '(True, "_", ("grad_buffer",))',
        "test_autograd.py test_compile.py",
    ),
    # 12. -inf logits
    *both(
        "12 -inf logit in the entropy: 0 * -inf",
        ("shifted.clamp_(min=torch.finfo(m.dtype).min)", "shifted"),
        ("weights * tl.maximum(shifted, _LOWEST)", "weights * shifted"),
    ),
    *both(
        "12 -inf logit in the gradient: 0 * inf",
        (".clamp_(min=_LOG_ZERO[m.dtype])", ""),
        ("tl.maximum(log_p, _LOG_ZERO)", "log_p"),
    ),
    # 13. One copy of the loss
    Mutation(
        "13 normalizer lost on the plain path",
        SUMS,
        "loss = total /",
        "loss = total if True else total /",
        SEQUENCES,
        "",
    ),
    Mutation("13 proto term evaluated at beta = 0", "_losses.py", "if beta == 0:", "if False:", "test_losses.py", ""),
    Mutation(
        "13 logistic loss overflows", "_losses.py", "F.softplus(-z)", "((-z).exp() + 1).log()", "test_losses.py", ""
    ),
    Mutation(
        "13 sign of the historical margin",
        "_losses.py",
        "(synthetic - proto)",
        "(proto - synthetic)",
        "test_losses.py",
        "",
    ),
    # The logit transform
    *both(
        "temperature dropped from the logits",
        (
            "    scale = transform.logit_scale / transform.temperature\n    return",
            "    scale = transform.logit_scale\n    return",
        ),
        ("z = z * (logit_scale / temperature)", "z = z * logit_scale"),
    ),
    *both(
        "temperature dropped from the gradient",
        (
            "        scale = transform.logit_scale / transform.temperature\n        dlogits",
            "        scale = transform.logit_scale\n        dlogits",
        ),
        ("    scale = logit_scale / temperature\n", "    scale = logit_scale\n"),
    ),
    *both(
        "temperature dropped after the softcap",
        ("tanh * (transform.softcap / transform.temperature)", "tanh * transform.softcap"),
        ("tanh * (softcap / temperature)", "tanh * softcap"),
    ),
    *both(
        "softcap derivative dropped",
        ("1 - tanh * tanh", "torch.ones_like(z)"),
        ("slope = 1.0 - tanh * tanh", "slope = 1.0 + 0.0 * tanh"),
    ),
    *both(
        "logit scale after the softcap",
        (
            "z * (transform.logit_scale / transform.softcap)",
            "z * (transform.logit_scale**0 / transform.softcap) * transform.logit_scale**2",
        ),
        ("_tanh(z * (logit_scale / softcap))", "_tanh(z / softcap)"),
    ),
    # Edges
    Mutation(
        "last column skipped",
        BLOCKS,
        "_steps(head.V, blocks.cols):\n            part",
        "_steps(head.V - 1, blocks.cols):\n            part",
    ),
    Mutation(
        "last column of a block skipped (statistics)",
        TRITON,
        'in_v = offs_v < V\n        products = tl.load(row_ptr + offs_v, mask=in_v, other=float("-inf"))',
        'in_v = offs_v < V - 1\n        products = tl.load(row_ptr + offs_v, mask=in_v, other=float("-inf"))',
        only="triton",
    ),
    Mutation(
        "last column of a block skipped (gradient)",
        TRITON,
        "in_v = offs_v < V\n    products = tl.load(row_ptr + offs_v, mask=in_v, other=0.0)",
        "in_v = offs_v < V - 1\n    products = tl.load(row_ptr + offs_v, mask=in_v, other=0.0)",
        only="triton",
    ),
    Mutation(
        "sums not rescaled to a new maximum", PLAIN, "s[tile] = s[tile] * decay", "s[tile] = s[tile]", only="torch-cpu"
    ),
    Mutation(
        "sums not rescaled to a new maximum (triton)", TRITON, "s = s * _exp(m - reference)", "s = s", only="triton"
    ),
    Mutation(
        "lanes of a row not brought to one maximum (triton)",
        TRITON,
        "tl.sum(s * _exp(m - reference), axis=0)",
        "tl.sum(s, axis=0)",
        only="triton",
    ),
    Mutation("sums of earlier blocks lost (triton)", TRITON, "s_old * _exp(m_old - reference)", "0.0", only="triton"),
    Mutation(
        "entropy sum not moved to a new maximum (triton)",
        TRITON,
        '(u + tl.where(m == float("-inf"), 0.0, m - reference) * s)',
        "u",
        only="triton",
    ),
    Mutation(
        "target in the first block of columns alone (triton)",
        TRITON,
        "(target >= start) & (target < start + BLOCK_V)",
        "target < BLOCK_V",
        only="triton",
    ),
    Mutation(
        "entropy sum not moved to a new maximum", PLAIN, "(u[tile] + moved * s[tile])", "u[tile]", only="torch-cpu"
    ),
    Mutation(
        "targets counted from the first column of all",
        BLOCKS,
        "_from_column(targets[r0:r1], head.start + c0)",
        "targets[r0:r1] - head.start",
    ),
    Mutation(
        "the same in the gradient",
        BLOCKS,
        "_from_column(targets[block], head.start + c0)",
        "targets[block] - head.start",
    ),
    Mutation("bias of another block", HEAD, "self.bias[start:stop], size", "self.bias[: stop - start], size"),
    Mutation(
        "dhidden of the last vocabulary block only",
        BLOCKS,
        "part.weight, c0 == 0,",
        "part.weight, True,",
    ),
    Mutation("dweight of the last token block only", BLOCKS, "rows, r0 == 0,", "rows, True,"),
    Mutation(
        "targets not checked",
        OPS,
        "    check_targets_in_range(counted, head.V if head.shard is None else head.shard.V)\n",
        "",
        "test_bad_input.py",
    ),
    # Autograd
    Mutation(
        "work under no_grad", TOKENS, "grad = torch.is_grad_enabled()", "grad = True", "test_memory.py test_autograd.py"
    ),
    Mutation(
        "work under no_grad by the loss",
        GROUPS,
        "grad = torch.is_grad_enabled()",
        "grad = True",
        "test_memory.py test_autograd.py",
    ),
    Mutation(
        "gradient of the forward passes for a constant",
        GROUPS,
        "if torch.is_grad_enabled():",
        "if False:",
        "test_autograd.py",
    ),
    Mutation(
        "gradient scaled in place twice",
        GROUPS,
        "grads, ctx.grads = ctx.grads, None",
        "grads = ctx.grads",
        "test_autograd.py",
    ),
    Mutation("upstream scalar dropped", GROUPS, "ctx.scale_(g, dloss)", "g", SEQUENCES),
    *both(
        "upstream scalar of one half taken for one",
        ("factor.item() == 1", "factor.item() >= 0.5"),
        ("if factor != 1.0:", "if factor != 1.0 and factor != 0.5:"),
        "test_autograd.py",
    ),
    Mutation(
        "the last block of the upstream scalar's product left out",
        TRITON,
        "range(first, size, tl.num_programs(0) * BLOCK)",
        "range(first, size - BLOCK, tl.num_programs(0) * BLOCK)",
        "test_autograd.py",
    ),
    # Sequences and groups
    Mutation(
        "rows taken in the order they come",
        RUN,
        "ids, order = torch.sort(",
        "ids, order = (lambda ids, stable: (ids, torch.arange(len(ids))))(",
        SEQUENCES,
    ),
    Mutation("group inputs not sliced", RUN, "tensor[g0:g1] for tensor", "tensor[: g1 - g0] for tensor", SEQUENCES),
    Mutation("shared hidden rows overwrite each other", RUN, "accumulate=True", "accumulate=False", SEQUENCES),
    Mutation("captured tensor accepted", RUN, "        _refuse_captured(losses, leaves)\n", "", "test_bad_input.py"),
    Mutation(
        "loss of another shape broadcast", SUMS, "tuple(losses.shape) != (groups,)", "False", "test_bad_input.py", ""
    ),
    Mutation(
        "statistics of a block's groups shifted",
        RUN,
        "rows.ids[block].long() - g0 * group_size",
        "rows.ids[block].long() % group_size",
        SEQUENCES,
    ),
    Mutation(
        "budget ignored",
        "_plan.py",
        "if sizes.total(rows, sizes.V) <= budget:",
        "if True:",
        "test_memory.py test_bad_input.py",
    ),
    Mutation(
        "narrow gradient of wide logits not counted",
        HEAD,
        "self.logits_dtype != self.compute_dtype and (dhidden or dweight)",
        "False",
        "test_memory.py",
    ),
    Mutation(
        "weight not cast to the dtype of the products",
        HEAD,
        "self.weight[start:stop].to(self.compute_dtype)",
        "self.weight[start:stop]",
        "test_precision.py",
    ),
    Mutation(
        "columns of the block before",
        BLOCKS,
        "if at != c0:",
        "if at < 0:",
    ),
    Mutation("gradient of no row left uninitialised", RUN, "grads.weight.zero_()", "pass", SEQUENCES),
    Mutation(
        "first rows added to uninitialised memory",
        RUN,
        "    fresh = True\n",
        "    fresh = False\n",
        SEQUENCES,
    ),
    # Zero coefficients, grad_buffer, process_group
    Mutation(
        "skip: zero of the log-prob alone is enough",
        RUN,
        "reduce(torch.logical_or, [",
        "(lambda f, masks: masks[0])(0, [",
        "test_zero_coefficients.py",
    ),
    Mutation("skip: nan is zero", RUN, "gradient != 0 for", "gradient.abs() > 0 for", "test_zero_coefficients.py"),
    Mutation(
        "skip: nothing is skipped", RUN, "gradient != 0 for", "gradient == gradient for", "test_zero_coefficients.py"
    ),
    Mutation(
        "skip: rows are not moved",
        PLAIN,
        "store.index_copy_(0, into",
        "store.index_copy(0, into",
        "test_zero_coefficients.py",
    ),
    Mutation(
        "skip: targets stay behind",
        RUN,
        "= targets[places], stats",
        "= targets[: len(places)], stats",
        "test_zero_coefficients.py",
    ),
    Mutation(
        "skip: dlogits move and their hidden rows stay",
        RUN,
        "selected, index = places + block.start, index[places]",
        "selected, index = places + block.start, index[:count]",
        "test_zero_coefficients.py",
    ),
    Mutation(
        "skip: a GPU is asked which rows count before dlogits are queued",
        RUN,
        "counted = HostCopy(live.sum())",
        "counted = HostCopy(live.sum())\n            counted.read()",
        "test_memory.py",
    ),
    Mutation(
        "ids out of range, told too late to be kept in range", RUN, "ids = ids.clamp(", "ids.clamp(", "test_memory.py"
    ),
    Mutation("ids out of range never told", GROUPS, "    verify_ids()\n", "", "test_memory.py"),
    Mutation("rows out of range never told", GROUPS, "    verify_rows()\n", "", "test_memory.py"),
    Mutation("grad_buffer overwritten", OPS, "fresh=new_weight_gradient", "fresh=True", "test_grad_buffer.py"),
    Mutation(
        "grad_buffer overwritten by a wide sum",
        BLOCKS,
        "if self.fresh else out.add_(total)",
        "if True else out.add_(total)",
        "test_grad_buffer.py",
    ),
    Mutation(
        "grad_buffer and autograd both get it",
        OPS,
        "new_weight_gradient = wanted[1] and grad_buffer is None",
        "new_weight_gradient = wanted[1]",
        "test_grad_buffer.py",
    ),
    Mutation(
        "grad_buffer: a shape that broadcasts",
        "_linear_logprobs.py",
        "grad_buffer.shape != weight.shape",
        "grad_buffer.dim() != weight.dim()",
        "test_grad_buffer.py",
    ),
    Mutation(
        "ranks: target offset forgotten",
        HEAD,
        "0 if self.shard is None else self.shard.start",
        "0",
        "test_process_group.py",
    ),
    Mutation(
        "ranks: entropy merged without its shift",
        SHARDS,
        "us[0] + moved.masked_fill(ms == -torch.inf, 0) * ss",
        "us[0]",
        "test_process_group.py",
    ),
    Mutation(
        "ranks: a rank of -inf alone is nan",
        SHARDS,
        "moved.masked_fill(ms == -torch.inf, 0)",
        "moved",
        "test_process_group.py",
    ),
    Mutation("ranks: sums merged without decay", SHARDS, "(decay * ss).sum(0)", "ss.sum(0)", "test_process_group.py"),
    Mutation(
        "ranks: dhidden of the loss not summed",
        RUN,
        "dhidden if head.shard is None else head.shard.sum_(dhidden)",
        "dhidden",
        "test_process_group.py",
    ),
    Mutation(
        "ranks: dhidden of the tokens not summed",
        OPS,
        "            head.shard.sum_(dhidden)",
        "            pass",
        "test_process_group.py",
    ),
    Mutation(
        "ranks: uneven shards cut evenly", SHARDS, "sum(widths[:rank])", "rank * columns", "test_process_group.py"
    ),
    # A padded vocabulary
    Mutation(
        "padding of a gradient apart is left as it was",
        BLOCKS,
        "dlogits[:, V:].zero_()",
        "pass",
        "test_inputs_and_masks.py",
    ),
    Mutation(
        "no vocabulary is padded",
        HEAD,
        "if dtype in _NARROW else columns",
        "if False else columns",
        "test_memory.py",
    ),
    Mutation("slices begin anywhere", BLOCKS, "step - step % _ALIGNED or step", "step", "test_memory.py"),
    Mutation(
        "sequence ids wrap",
        "_groups.py",
        "torch.int16 if num_groups * group_size < 2**15",
        "torch.int16 if True",
        "test_sequence_layout.py",
    ),
    Mutation(
        "padding of a block is taken for columns",
        BLOCKS,
        "logits[:, : part.V],\n",
        "logits,\n",
        "test_linear_logprobs.py",
    ),
    Mutation(
        "rows moved by their old order",
        "_rows_torch.py",
        "order[places].split(step)",
        "places.split(step)",
        "test_zero_coefficients.py",
    ),
    Mutation(
        "triton rows moved by their old order",
        "_rows_triton.py",
        "store_ptr + origin * stride",
        "store_ptr + row * stride",
        "test_zero_coefficients.py",
    ),
    # Filtering
    Mutation("filter: nothing is looked at", KEPT, "listed) <= limit\n", "listed) <= limit + 9\n", "test_filter.py"),
    Mutation(
        "filter: what is small is not summed",
        KEPT,
        "small = torch.where(is_small, share, 0.0).sum(1)",
        "small = 0 * limit",
        "test_filter.py",
    ),
    Mutation(
        "filter: threshold on single columns",
        KEPT,
        "small + _sums(torch.where(is_left, share, 0.0), listed)",
        "small + _sums(torch.where(is_left, share, 0.0), listed) / 9",
        "test_filter.py",
    ),
    Mutation(
        "filter: tolerance relative to one", FILTER, "(limit * size).nan", "(limit + 0 * size).nan", "test_filter.py"
    ),
    Mutation("filter: temperature forgotten", FILTER, " / head.transform.temperature", "", "test_filter.py"),
    Mutation("filter: logit_scale forgotten", FILTER, " * abs(head.transform.logit_scale)", "", "test_filter.py"),
    Mutation(
        "filter: entropy's coefficient forgotten",
        FILTER,
        "for gradient in upstream if gradient is not None]).sum(0)",
        "for gradient in upstream[:1]]).sum(0)",
        "test_filter.py",
    ),
    Mutation("filter: targets not kept", KEPT, " | (column == target[row])", "", "test_filter.py"),
    Mutation(
        "filter: small targets not kept",
        KEPT,
        "is_small.gather(1, local).squeeze(1)",
        "(target < 0)",
        "test_filter.py",
    ),
    Mutation(
        "filter: a nan goes",
        KEPT,
        "is_kept = ~(share <= (limit * fractions[low])[row])",
        "is_kept = share > (limit * fractions[low])[row]",
        "test_filter.py",
    ),
    Mutation(
        "filter: rows without a coefficient kept", FILTER, "torch.where(live, lengths, 0)", "lengths", "test_filter.py"
    ),
    Mutation(
        "filter: rows without a coefficient in the bias",
        FILTER,
        ".masked_fill_(~live.unsqueeze(1), 0)",
        "",
        "test_filter.py",
    ),
    Mutation("filter: dense rows left out", FILTER, "store[:n].to", "(0 * store[:n]).to", "test_filter.py"),
    Mutation(
        "filter: dense rows' products of others",
        FILTER,
        "to_front(is_dense, n, store",
        "to_front(is_dense, n, None",
        "test_filter.py",
    ),
    Mutation(
        "filter: bias' gradient left out",
        FILTER,
        "add_column_sums(grads.bias",
        "add_column_sums(None",
        "test_filter.py",
    ),
    Mutation(
        "filter: float16 not scaled back in dhidden",
        FILTER,
        "head.weight, unscale, True",
        "head.weight, None, True",
        "test_filter.py",
    ),
    Mutation(
        "filter: float16 not scaled back in dweight",
        FILTER,
        "hidden, unscale, fresh",
        "hidden, None, fresh",
        "test_filter.py",
    ),
    Mutation(
        "filter: what kept rows add to the weight replaces that of dense ones",
        FILTER,
        "fresh and not n)",
        "fresh)",
        "test_filter.py",
    ),
    Mutation(
        "filter: a later block of rows replaces the weight's sum",
        FILTER,
        "fresh and not n)",
        "not n)",
        "test_filter.py",
    ),
    Mutation(
        "filter: values in the order of rows beside columns in theirs",
        FILTER,
        "values[order], hidden",
        "values, hidden",
        "test_filter.py",
    ),
    Mutation("filter: every rank drops the whole tolerance", FILTER, " / ranks\n", "\n", "test_process_group.py"),
    Mutation(
        "filter: the report counts dense rows as filtered",
        FILTER,
        "report.count(rows, n, n * V",
        "report.count(rows, n, 0 * V",
        "test_filter.py",
    ),
    Mutation(
        "filter: sums begin uninitialised",
        KEPT,
        "out.copy_(sums) if fresh else out.add_(sums)",
        "out.add_(sums)",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: a signed sum", KEPT_TRITON, "share = tl.abs(tl.load(", "share = (tl.load(", "test_filter.py"
    ),
    Mutation(
        "triton filter: what is small is not summed",
        KEPT_TRITON,
        "fits = small + tl.sum",
        "fits = tl.sum",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: what is listed is not summed",
        KEPT_TRITON,
        "small + tl.sum(left_out, axis=0) <= limit",
        "small <= limit",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: a nan goes",
        KEPT_TRITON,
        "| ~(tl.abs(value) <= threshold)",
        "| (tl.abs(value) > threshold)",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: targets not kept",
        KEPT_TRITON,
        "target_ptr + row)",
        "target_ptr + row) * 0 - 1",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: small targets not kept",
        KEPT_TRITON,
        "1 - tl.sum(is_listed, axis=0), 0)",
        "0, 0)",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: all of a chunk for its first column",
        KEPT_TRITON,
        "into, first + column,",
        "into, first,",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: a row that keeps as many as it may is dense",
        KEPT_TRITON,
        "if total <= most:",
        "if total < most:",
        "test_filter.py",
    ),
    Mutation(
        "triton filter: segments read on", KEPT_TRITON, "in_e = entry < last", "in_e = entry >= 0", "test_filter.py"
    ),
    Mutation(
        "triton filter: a sum is not added",
        KEPT_TRITON,
        "        if not FRESH:\n",
        "        if False:\n",
        "test_filter.py",
    ),
    # What an audit found
    Mutation(
        "audit: float16 scaled to one",
        BLOCKS,
        "torch.frexp(largest)[1] - 10",
        "torch.frexp(largest)[1]",
        "test_precision.py",
    ),
    Mutation(
        "audit: float16 scaled without the transform's factor",
        BLOCKS,
        "largest = slope * torch.stack",
        "largest = torch.stack",
        "test_precision.py",
    ),
    Mutation(
        "audit: the gradient of hidden rows not counted",
        HEAD,
        "scattered=dhidden.itemsize if scattered and dhidden else 0",
        "scattered=0",
        "test_memory.py",
    ),
    Mutation("audit: gathered rows not counted", HEAD, "copied if gathered or", "copied if", "test_memory.py"),
    Mutation(
        "audit: a second backward behind hooks",
        OPS,
        "ctx.is_spent = in_place and ctx.stores",
        "ctx.is_spent = False",
        "test_autograd.py",
    ),
    Mutation(
        "audit: a tangent lost", "_inputs.py", "if forward_ad._current_level >= 0:", "if False:", "test_autograd.py"
    ),
    Mutation(
        "audit: a constant's derivative lost",
        "_inputs.py",
        "isinstance(value, Tensor) and value.requires_grad",
        "False",
        "test_bad_input.py",
    ),
    Mutation(
        "audit: tanh by a difference alone (triton)",
        TRITON,
        "tl.where(y < 0.0625, small,",
        "tl.where(y < 0.0, small,",
        "test_precision.py",
        "triton",
    ),
    Mutation(
        "audit: strided operands (triton)",
        KEPT_TRITON,
        "operand = operand.contiguous()",
        "pass",
        "test_filter.py",
        "triton",
    ),
    Mutation(
        "audit: a captured tensor beside nothing trained",
        RUN,
        "_refuse_captured(losses, [])",
        "pass",
        "test_bad_input.py",
    ),
]


# Under Triton's interpreter a kernel that reads past its memory ends the process.
CRASH = "(the process crashes)"


def failing_test(mutation: Mutation | None, tests: list[str], only: str = "") -> str:
    """The first of `tests` that fails on a copy of the package with the bug put in, '' when none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in (PACKAGE, "tests/kernels"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation:
            path = copy / PACKAGE / mutation.file
            text = path.read_text()
            if mutation.old not in text:
                raise SystemExit(f"{mutation.bug}: {mutation.file} has no {mutation.old!r}")
            path.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, *PYTEST]
        switches = {
            "PYTHONPATH": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
        }
        environment = os.environ | switches
        command += [f"--rootdir={copy}", *tests, "-k", only]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        return CRASH
    failed = re.search(r"^(?:FAILED|ERROR) (tests/kernels/.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2) or (done.returncode and not failed):
        raise SystemExit(f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1] if failed else ""


def first_failure(mutation: Mutation, known: dict[str, str]) -> str:
    """The test that finds the bug; it must pass where the bug is not. One that is known to is asked first."""
    found = failing_test(mutation, [f"tests/kernels/{known[mutation.bug]}"]) if mutation.bug in known else ""
    if not found:
        found = failing_test(mutation, [f"tests/kernels/{name}" for name in mutation.tests.split()], mutation.only)
    if found not in ("", CRASH) and failing_test(None, [found]):
        raise SystemExit(f"{mutation.bug}: {found} fails without the bug, too; mend that first")
    return found.removeprefix("tests/kernels/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only bugs whose name holds one of these")
    parser.add_argument("--known", type=Path, help="what an earlier run printed: its tests are tried first")
    options = parser.parse_args()
    words, table = options.words, options.known.read_text() if options.known else ""
    known = dict(re.findall(r"^\| (.*) \| `(.*)` \|$", table, re.MULTILINE))
    chosen = [m for m in MUTATIONS if not words or any(word in m.bug for word in words)]
    survivors = 0
    print("| bug | first test that fails |\n|---|---|", flush=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for mutation, failed in zip(chosen, pool.map(partial(first_failure, known=known), chosen), strict=True):
            survivors += not failed
            print(f"| {mutation.bug} | {f'`{failed}`' if failed else '**none: the bug survives**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} bugs found", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
