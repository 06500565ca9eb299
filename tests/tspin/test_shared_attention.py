"""Attention of shared prompts against a plain masked softmax: values, gradients, memory, and what is handed to CUDA's kernels."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from varlen import stand_in

from tspin import attention
from tspin.attention import has_kernel, shared_prompt_attention
from tspin.prefix import PrefixLayout

lengths = st.integers(1, 9)
layouts = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=3)
windows = st.none() | st.integers(1, 20)
LAYOUT = PrefixLayout(((9, (5, 7, 3)), (4, (12, 1, 6))))


def plain(query, key, value, layout, scale, window=None, sinks=None):
    """[1, T, H, d], from one [T, T] mask built token by token."""
    at = layout.position_ids()[0].tolist()
    group = [g for g, (P, Ls) in enumerate(layout.groups) for _ in range(P + sum(Ls))]
    part = [m for P, Ls in layout.groups for m, n in enumerate((P, *Ls)) for _ in range(n)]
    near = lambda i, j: window is None or at[i] - at[j] < window
    sees = lambda i, j: j <= i and group[i] == group[j] and part[j] in (0, part[i]) and near(i, j)
    T, repeats = query.shape[2], query.shape[1] // key.shape[1]
    mask = torch.tensor([[sees(i, j) for j in range(T)] for i in range(T)])
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(-1, -1, T, 1)], -1)
    weights = scores.softmax(-1)[..., :T]
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


def tensors(layout, H=4, H_kv=2, d=8, dtype=torch.float64, seed=0):
    generator, T = torch.Generator().manual_seed(seed), sum(P + sum(Ls) for P, Ls in layout.groups)
    draw = lambda heads: torch.randn(1, T, heads, d, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
    return [draw(H), draw(H_kv), draw(H_kv)]


def outputs_and_gradients(attention, inputs, layout, scale=0.3, window=None):
    out = attention(*inputs[:3], layout, scale, window, *inputs[3:])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, inputs, weight)]


@settings(max_examples=80, deadline=None)
@given(layouts, st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([8, 5]), windows, st.booleans())
def test_values_and_gradients_are_those_of_a_masked_softmax(groups, heads, d, window, with_sinks):
    layout = PrefixLayout(tuple(groups))
    inputs = tensors(layout, *heads, d) + [torch.randn(heads[0], dtype=torch.float64, requires_grad=True)] * with_sinks
    runs = (outputs_and_gradients(f, inputs, layout, window=window) for f in (shared_prompt_attention, plain))
    pairs = zip(*runs, strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_scores_of_a_hundred_nats_do_not_overflow():
    inputs = tensors(LAYOUT, dtype=torch.float32)
    pairs = zip(
        *(outputs_and_gradients(f, inputs, LAYOUT, 30.0) for f in (shared_prompt_attention, plain)), strict=True
    )
    assert all((got - want).abs().max() < 1e-4 * want.abs().max() for got, want in pairs)


def test_bf16_is_as_near_as_one_kernel_is():
    exact = outputs_and_gradients(plain, tensors(LAYOUT), LAYOUT)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors(LAYOUT)]
    for got, want in zip(outputs_and_gradients(shared_prompt_attention, half, LAYOUT), exact, strict=True):
        assert (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("long", [1, 200, 10**9])
def test_a_gpus_kernels_are_as_near(monkeypatch, long, window, with_sinks):
    """The calls themselves, where the tests above have stand-ins; by root mean squares, since a GPU's tiles are larger."""
    monkeypatch.setattr(attention, "_LONG", long)
    layout = PrefixLayout(((150, (70, 1, 130)), (300, (33,)), (257, (64, 64, 64))))
    exact = tensors(layout, d=64) + [torch.randn(4, dtype=torch.float64, requires_grad=True)] * with_sinks
    half = [x.detach().bfloat16().cuda().requires_grad_() for x in exact]
    runs = (
        outputs_and_gradients(plain, exact, layout, window=window),
        outputs_and_gradients(shared_prompt_attention, half, layout, window=window),
    )
    for want, got in zip(*runs, strict=True):
        assert (got.cpu().double() - want).norm() < 0.02 * want.norm()


def test_nothing_is_kept_for_the_backward_but_one_row():
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = tensors(LAYOUT, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        shared_prompt_attention(q, k, v, LAYOUT, 1.0)
    T, H, H_kv, d = LAYOUT.position_ids().shape[1], 4, 2, 8
    assert sum(kept.values()) == 4 * T * (2 * H * d + 2 * H_kv * d + H)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 6, 11, 15])
@pytest.mark.parametrize("layout", [LAYOUT, PrefixLayout(((1, (1,)), (7, (9, 9))))])
@pytest.mark.parametrize("long, keys", [(1, 10**9), (5, 30), (100, 10**9), (100, 25), (100, 1)])
def test_a_gpus_calls_mean_the_same(monkeypatch, layout, window, long, keys, with_sinks):
    """By stand-ins for the varlen kernels; prompts of `long` tokens or more go apart, a backward takes `keys` at once."""
    stand_in(monkeypatch)
    monkeypatch.setattr(attention, "_LONG", long)
    monkeypatch.setattr(attention, "_KEYS", keys)
    inputs = tensors(layout) + [torch.randn(4, dtype=torch.float64, requires_grad=True)] * with_sinks
    runs = (outputs_and_gradients(f, inputs, layout, window=window) for f in (shared_prompt_attention, plain))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window, long, calls", [(None, None, 1), (None, 5, 2), (None, 4, 3), (6, 4, 1)])
def test_how_many_calls_a_gpu_gets(monkeypatch, window, long, calls):
    """One of the varlen kernel, whatever the window, and one of PyTorch's choice for each long prompt."""
    made = []
    stand_in(monkeypatch, made)
    whole = F.scaled_dot_product_attention
    counted = lambda *args, **options: made.append("apart") or whole(*args, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(attention, "_LONG", long)
    shared_prompt_attention(*tensors(LAYOUT), LAYOUT, 0.3, window)
    assert made == ["apart"] * (calls - 1) + ["forward"]


@pytest.mark.parametrize("keys, pieces", [(None, [8]), (40, [3, 4, 1]), (1, [1] * 8)])
def test_a_backward_takes_no_more_keys_at_once_than_it_may(keys, pieces):
    """Or those of one run; LAYOUT has 8 of them, with 9, 14, 16, 12, 4, 16, 5 and 10 keys."""
    plan = attention.plan_calls(LAYOUT, None, True, None, keys)
    assert [len(piece.blocks.spans()) for piece in plan.pieces] == pieces
    assert sum((piece.queries for piece in plan.pieces), ()) == plan.calls[0].queries


def test_copies_are_summed_before_they_are_rounded():
    plan = attention.plan_calls(PrefixLayout(((1, (1, 1, 1)),)), None, True, None)
    pieces = torch.tensor([256.0, 1, 0, 1, 0, 1, 0]).bfloat16()[:, None]
    assert plan.give((pieces, plan.calls[0].keys))[0] == torch.tensor(259.0).bfloat16()  # 256 three times, one by one


def test_cudas_kernels_take_the_arguments_that_they_get(monkeypatch):
    """Shapes and signatures only, on tensors without memory: no GPU is needed."""
    monkeypatch.setattr("tspin.attention._has_varlen", lambda q: True)
    T, saved = LAYOUT.position_ids().shape[1], []
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
    q, k, v = (torch.empty(T, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    out = attention._Attention.forward(ctx, q, k, v, None, attention.plan_calls(LAYOUT, 6, True, None), 0.25)
    assert out.shape == (T, 4, 16) and out.dtype == torch.bfloat16
    ctx.saved_tensors = saved
    *grads, _, _, _ = attention._Attention.backward(ctx, out)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


def test_a_trace_without_data_runs_and_leaves_nothing_behind():
    with FakeTensorMode():
        inputs = tensors(LAYOUT)
        shapes = [x.shape for x in outputs_and_gradients(shared_prompt_attention, inputs, LAYOUT, window=6)]
    real = outputs_and_gradients(shared_prompt_attention, tensors(LAYOUT), LAYOUT, window=6)
    assert [x.shape for x in real] == shapes and all(x.isfinite().all() for x in real)


def test_cudas_kernels_are_for_16_bits_and_whole_vectors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():
        make = lambda d, dtype=torch.bfloat16: torch.empty(1, 4, 5, d, dtype=dtype, device="cuda")
        assert has_kernel(make(16), make(16))
        refused = ((make(16, torch.float32), make(16, torch.float32)), (make(12), make(12)), (make(16), make(8)))
        assert not any(has_kernel(*pair) for pair in refused)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not has_kernel(make(16), make(16))
