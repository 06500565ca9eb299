"""Plain PyTorch in place of CUDA's varlen flash kernels, with their arguments."""

import math

import torch


def stand_in(monkeypatch, made=None):
    """For as long as the monkeypatch lasts, shared prompts are attended to as on a GPU; names of calls are added to `made`."""
    made = [] if made is None else made
    monkeypatch.setattr("tspin.attention._has_varlen", lambda q: True)
    for name, function in (("forward", forward), ("backward", backward)):

        def called(*args, name=name, function=function, **options):
            made.append(name)
            return function(*args, **options)

        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{name}", called)


def hidden(Q, K, causal, reach):
    """[Q, K] bool, as the varlen kernels understand their arguments: the last query is aligned with the last key."""
    distance = torch.arange(K - Q, K)[:, None] - torch.arange(K)
    return (distance < 0) & causal | (distance > (K if reach is None else reach))


def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left):
    assert cum_q.dtype == cum_k.dtype == torch.int32 and dropout == 0 and not debug
    outs, lses, repeats = [], [], q.shape[1] // k.shape[1]
    assert (cum_q[-1], cum_k[-1]) == (len(q), len(k))
    assert (cum_q.diff().max(), cum_k.diff().max()) == (max_q, max_k)
    for a, b, c, e in zip(cum_q, cum_q[1:], cum_k, cum_k[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:e].repeat_interleave(repeats, 1)) * scale
        scores = scores.masked_fill(hidden(b - a, e - c, causal, window_size_left), -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:e].repeat_interleave(repeats, 1)))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1), None, None, None


def backward(
    grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale, window_size_left
):
    """From the given output and log-sum-exp, as flash kernels do, not from the softmax of these keys alone."""
    grads, repeats = [torch.zeros_like(x) for x in (q, k, v)], q.shape[1] // k.shape[1]
    delta = (grad * out).sum(-1).T
    for a, b, c, e in zip(cum_q, cum_q[1:], cum_k, cum_k[1:], strict=False):
        keys, values = (x[c:e].repeat_interleave(repeats, 1) for x in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale - lse[:, a:b, None]).exp()
        weights = weights.masked_fill(hidden(b - a, e - c, causal, window_size_left), 0.0)
        slope = weights * (torch.einsum("qhd,khd->hqk", grad[a:b], values) - delta[:, a:b, None]) * scale
        fold = lambda x: x.unflatten(1, (-1, repeats)).sum(2)
        grads[0][a:b] = torch.einsum("hqk,khd->qhd", slope, keys)
        grads[1][c:e] = fold(torch.einsum("hqk,qhd->khd", slope, q[a:b]))
        grads[2][c:e] = fold(torch.einsum("hqk,qhd->khd", weights, grad[a:b]))
    return grads
