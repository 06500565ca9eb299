"""Mixed precision: autocast, float16 with a gradient scaler at coefficients of 1e-6, bfloat16 sums."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tspin_kernels import linear_logprobs, linear_sequence_loss

from .oracle import evaluate, least_budget, make_case, plain_logprobs, plain_sequence_loss, relative_error
from .preferences import tspin
from .sequences import BUDGETS, UPSTREAM, budget_options, evaluate_loss, make_sequences

SHORT = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_autocast(implementation, dtype):
    """float32 weights under autocast: products in the short dtype, results and gradients float32."""
    case = make_case(9, 130, seed=1).to(implementation.device)
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    with torch.autocast(implementation.device, dtype=dtype):
        result = linear_logprobs(leaves[0], leaves[1], case.targets, leaves[2], backend=implementation.backend)
    sum((o * u).sum() for o, u in zip(result, case.upstream, strict=True)).backward()
    short = make_case(9, 130, seed=1, dtype=dtype)
    exact = evaluate(plain_logprobs, make_case(9, 130, seed=1).to(torch.float64))
    plain = evaluate(plain_logprobs, short)
    for name, output in result._asdict().items():
        assert output.dtype == torch.float32
        error = (output.double().cpu() - exact[name]).abs().max()
        assert 1e-5 < error < 4 * (plain[name] - exact[name]).abs().max() + 0.02, (
            f"{name}: {error:.3g}; 0 would mean float32 products"
        )
    for name, leaf in zip(("dhidden", "dweight", "dbias"), leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, exact[name]) < 4 * relative_error(plain[name], exact[name]) + 1e-2, name


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_autocast_joins_a_short_trunk_and_a_float32_head(implementation, dtype):
    """What a model under autocast hands over: short hidden states, float32 head."""
    case = make_case(6, 50, seed=2).to(implementation.device)
    hidden = case.hidden.to(dtype).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    with torch.autocast(implementation.device, dtype=dtype):
        loss = linear_logprobs(hidden, weight, case.targets, backend=implementation.backend).logprobs.sum()
        total, _ = linear_sequence_loss(
            hidden,
            weight,
            case.targets,
            torch.arange(6, device=implementation.device),
            tspin,
            group_size=3,
            backend=implementation.backend,
        )
    (loss + total).backward()
    assert hidden.grad.dtype == dtype and weight.grad.dtype == torch.float32
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_autocast_leaves_float32_logits_alone(implementation, dtype):
    """Autocast must not reach the products that the op itself asked for in float32."""
    case = make_case(9, 130, D=64, seed=1)
    rounded = replace(case.to(dtype), bias=case.bias)
    close = [plain_logprobs(c.hidden.double(), c.weight.double(), c.targets, c.bias.double()) for c in (case, rounded)]
    case = case.to(implementation.device)
    with torch.autocast(implementation.device, dtype=dtype):
        options = {"backend": implementation.backend, "logits_dtype": torch.float32}
        got = linear_logprobs(case.hidden, case.weight, case.targets, case.bias, **options)
    for name, *truths in zip(got._fields, *close, strict=True):
        assert min((getattr(got, name).cpu() - truth).abs().max() for truth in truths) < 1e-4, name


def under_autocast(backend, dtype):
    """linear_sequence_loss under autocast of the device that its tensors are on."""

    def op(hidden, *args, **options):
        with torch.autocast(hidden.device.type, dtype=dtype):
            return linear_sequence_loss(hidden, *args, **{"backend": backend, **options})

    return op


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_autocast_sequence_loss(implementation, dtype, budget):
    sequences = make_sequences(3, seed=3)
    op = under_autocast(implementation.backend, dtype)
    double = make_sequences(3, seed=3, dtype=torch.float64)
    short = make_sequences(3, seed=3, dtype=dtype)
    exact, plain = evaluate_loss(plain_sequence_loss, double, tspin), evaluate_loss(plain_sequence_loss, short, tspin)
    got = evaluate_loss(
        op, sequences, tspin, device=implementation.device, **budget_options(op, sequences, tspin, budget)
    )
    for name in ("loss", "logprobs", "dhidden", "dweight", "dbias"):
        assert relative_error(got[name], exact[name]) < 4 * relative_error(plain[name], exact[name]) + 1e-2, name


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("coefficient", [1e-6, 1e-4, 1.0, 300.0])
def test_float16_gradients_survive_small_and_large_coefficients(fused, coefficient, budget):
    """Formed in the forward, the gradient cannot profit from the loss scale, and float16 ends at 6e-8."""
    sequences = make_sequences(3, seed=4, dtype=torch.float16)

    def loss_fn(s):
        return coefficient * tspin(s)

    op = partial(linear_sequence_loss, backend=fused.backend)
    scale = 2.0 ** round(-torch.log2(torch.tensor(coefficient)).item())
    case = sequences.case.to(fused.device)
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    loss, _ = op(
        leaves[0],
        leaves[1],
        case.targets,
        sequences.sequence_ids.to(fused.device),
        loss_fn,
        leaves[2],
        group_size=3,
        **budget_options(op, sequences, loss_fn, budget),
    )
    (loss * scale).backward()
    exact = evaluate_loss(plain_sequence_loss, replace(sequences, case=sequences.case.to(torch.float64)), tspin)
    for name, leaf in zip(("dhidden", "dweight", "dbias"), leaves, strict=True):
        want = exact[name] / UPSTREAM * coefficient * scale
        assert relative_error(leaf.grad, want) < 5e-3, name


@pytest.mark.parametrize("budget", [None, 1])
def test_gradient_scaler_trains_float32_weights(fused, budget):
    """Autocast to float16, GradScaler, loss coefficients of 1e-6: the unscaled gradients are those of float64."""
    sequences = make_sequences(3, seed=5)
    case = sequences.case.to(fused.device)
    trunk = torch.eye(8, device=fused.device).requires_grad_()
    head = case.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([trunk, head], lr=0.0)
    scaler = torch.amp.GradScaler(fused.device, init_scale=2.0**16)

    def loss_fn(s):
        return 1e-6 * tspin(s)

    @torch.autocast(fused.device, dtype=torch.float16)
    def call(memory_budget=None):
        ids = sequences.sequence_ids.to(fused.device)
        arguments = (F.linear(case.hidden, trunk), head, case.targets, ids, loss_fn, case.bias)
        options = {"group_size": 3, "memory_budget": memory_budget, "backend": fused.backend}
        return linear_sequence_loss(*arguments, **options)[0]

    scaler.scale(call(None if budget is None else least_budget(call))).backward()
    scaler.unscale_(optimizer)
    exact = evaluate_loss(plain_sequence_loss, make_sequences(3, seed=5, dtype=torch.float64), tspin)
    want = {name: exact[name] / UPSTREAM * 1e-6 for name in ("dhidden", "dweight")}
    assert relative_error(head.grad, want["dweight"]) < 1e-2
    assert relative_error(trunk.grad, want["dhidden"].t() @ case.hidden.double().cpu()) < 1e-2
    scaler.step(optimizer)


@pytest.mark.parametrize("scale", [2.0**-16, 1.0, 2.0**12])
def test_float16_logprobs_with_scaled_upstream(fused, scale):
    """linear_logprobs meets the loss scale in its upstream gradients, whatever their size."""
    case = make_case(8, 100, seed=6, dtype=torch.float16, bias=False)
    small = tuple(1e-6 / scale * torch.sign(u) * (0.5 + u.abs()) for u in case.upstream)
    case = replace(case, upstream=small)
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    got = evaluate(partial(linear_logprobs, backend=fused.backend), case, device=fused.device)
    for name in ("dhidden", "dweight"):
        floor = 2**-24 * 0.5 / exact[name].abs().mean().item()
        assert relative_error(got[name], exact[name]) < 2e-3 + floor, name


@pytest.mark.parametrize("budget", [None, 24 * 2**20], ids=["one block", "blocks"])
@pytest.mark.parametrize("constants", [{}, {"logit_scale": 1 / 16}, {"temperature": 8.0}], ids=str)
def test_float16_gradients_of_a_flat_row_keep_their_digits(fused, constants, budget):
    """As with a loss scale of 1024: at one, probabilities of 1e-5 would be float16's denormals, and less in a scaled transform."""
    if fused.interpreted:
        pytest.skip("32768 columns are slow under Triton's interpreter; the scale is shared with the torch backend")
    case = make_case(16, 2**15, 32, seed=5, dtype=torch.float16, bias=False)
    upstream = torch.randn(16, generator=torch.Generator().manual_seed(1))

    def gradients(op, case, scale=1.0, **options):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        logprobs = op(hidden, weight, case.targets, **constants, **options).logprobs
        (logprobs * upstream.to(logprobs) * scale).sum().backward()
        return hidden.grad.cpu().double() / scale, weight.grad.cpu().double() / scale

    exact = gradients(partial(linear_logprobs, backend="reference"), case.to(torch.float64))
    plain = gradients(partial(linear_logprobs, backend="reference"), case, 1024)
    got = gradients(linear_logprobs, case.to(fused.device), 1024, backend=fused.backend, memory_budget=budget)
    elsewhere = torch.ones(2**15, dtype=torch.bool).index_fill(0, case.targets, False)
    for name, pick in (("dhidden", lambda g: g[0]), ("dweight elsewhere", lambda g: g[1][elsewhere])):
        error, allowed = (relative_error(pick(g), pick(exact)) for g in (got, plain))
        assert error < 1.5 * allowed < 5e-3, f"{name}: {error:.2g}, plain {allowed:.2g}"


@pytest.mark.parametrize("constants", [{"logit_scale": 256.0}, {"temperature": 1 / 256}], ids=str)
def test_float16_gradients_of_a_steep_transform_do_not_overflow(fused, constants):
    case = make_case(8, 64, 16, seed=5, dtype=torch.float16, bias=False)

    def gradients(case, **options):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden / 16, case.weight / 16))
        linear_logprobs(hidden, weight, case.targets, **constants, **options).logprobs.sum().backward()
        return [t.grad.cpu().double() for t in (hidden, weight)]

    exact = gradients(case.to(torch.float64), backend="reference")
    for got, want in zip(gradients(case.to(fused.device), backend=fused.backend), exact, strict=True):
        assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1e3, 1e5, 1e8])
def test_a_softcap_keeps_the_digits_of_small_logits(fused, softcap):
    """Where it is far above them, the tanh is near zero."""
    case = make_case(8, 64, seed=6)
    want = linear_logprobs(*(t.double() for t in (case.hidden, case.weight)), case.targets, softcap=softcap)
    case = case.to(fused.device)
    got = linear_logprobs(case.hidden, case.weight, case.targets, softcap=softcap, backend=fused.backend)
    for name, value in got._asdict().items():
        torch.testing.assert_close(value.double().cpu(), getattr(want, name), rtol=2e-6, atol=2e-6)
