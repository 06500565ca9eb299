"""linear_logprobs(grad_buffer=...): the weight's gradient is added to a tensor of the caller's, and autograd gets none."""

import pytest
import torch

from tspin_kernels import linear_logprobs

from .oracle import evaluate, least_budget, make_case, plain_logprobs, relative_error
from .test_memory import peak_bytes

N, V, D = 9, 150, 8


def backward(fused, case, **options):
    """Gradients in hidden, weight and bias, None where autograd leaves none."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    outputs = linear_logprobs(leaves[0], leaves[1], case.targets, leaves[2], backend=fused.backend, **options)
    sum((o * u).sum() for o, u in zip(outputs, case.upstream, strict=True)).backward()
    return [leaf.grad for leaf in leaves]


def blocks_budget(fused, case, buffer):
    """The smallest that both ways accept: many blocks on both axes."""
    ways = ({}, {"grad_buffer": torch.zeros_like(buffer)})
    return max(least_budget(lambda b, way=way: backward(fused, case, memory_budget=b, **way)) for way in ways)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("dtype, buffer_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("plan", [0, 1], ids=["store", "blocks"])
def test_what_was_there_plus_the_gradient(fused, dtype, buffer_dtype, ignored, plan):
    case = make_case(N, V, D, seed=1, dtype=dtype, spread=1.0, ignored=ignored).to(fused.device)
    before = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(fused.device, buffer_dtype)
    buffer = before.clone()
    budget = blocks_budget(fused, case, buffer) if plan else None
    want = backward(fused, case, memory_budget=budget)
    got = backward(fused, case, memory_budget=budget, grad_buffer=buffer)
    assert got[1] is None
    exact = evaluate(plain_logprobs, case.to("cpu").to(torch.float64))
    for mine, theirs, name in ((got[0], want[0], "dhidden"), (got[2], want[2], "dbias")):
        # The buffer's plan may have other blocks, and a GPU's products another rounding for each shape.
        mine_error, error = (relative_error(found.cpu(), exact[name]) for found in (mine, theirs))
        assert torch.equal(mine, theirs) or (fused.device == "cuda" and plan and mine_error <= 1.5 * error)
    exact = exact["dweight"] + before.double().cpu()
    # The gradient itself is rounded nowhere before it is added; dlogits are, as ever.
    own = (want[1].double().cpu() + before.double().cpu() - exact).abs().max()
    rounding = torch.finfo(buffer_dtype).eps * exact.abs().max()
    assert (buffer.double().cpu() - exact).abs().max() <= own + rounding
    assert (buffer - before).abs().max() > 0.01


@pytest.mark.parametrize("plan", [0, 1], ids=["store", "blocks"])
def test_calls_add_up_whatever_the_order_of_their_backwards(fused, plan):
    cases = [make_case(N, V, D, seed=seed, bias=False).to(fused.device) for seed in (2, 3, 4)]
    weight = cases[0].weight.clone().requires_grad_()
    buffer = torch.zeros(V, D, device=fused.device)
    budget = least_budget(
        lambda b: linear_logprobs(cases[0].hidden, weight, cases[0].targets, backend="torch", memory_budget=b)
    )
    options = {"backend": fused.backend, "memory_budget": budget if plan else None}
    losses = [linear_logprobs(c.hidden, weight, c.targets, grad_buffer=buffer, **options).logprobs.sum() for c in cases]
    want = torch.autograd.grad(
        sum(linear_logprobs(c.hidden, weight, c.targets, **options).logprobs.sum() for c in cases), weight
    )[0]
    for loss in (losses[1], losses[0], losses[2]):
        loss.backward()
    assert weight.grad is None
    assert torch.allclose(buffer, want, atol=1e-5)


def test_a_float32_buffer_sums_many_calls_without_losing_them(fused):
    """Eighty bfloat16 gradients of one sign: a bfloat16 sum stops growing, a float32 one does not."""
    case = make_case(2, 40, D, seed=5, dtype=torch.bfloat16, bias=False).to(fused.device)
    weight = case.weight.clone().requires_grad_()
    buffer = torch.zeros(40, D, device=fused.device)
    for _ in range(80):
        linear_logprobs(
            case.hidden, weight, case.targets, backend=fused.backend, grad_buffer=buffer
        ).logprobs.sum().backward()
        linear_logprobs(case.hidden, weight, case.targets, backend=fused.backend).logprobs.sum().backward()
    once = torch.autograd.grad(
        linear_logprobs(case.hidden, weight, case.targets, backend=fused.backend).logprobs.sum(), weight
    )[0]
    assert relative_error(buffer, 80 * once) < 2**-8
    assert relative_error(weight.grad, 80 * once) > 2**-8


def test_where_no_row_counts_nothing_is_added(fused):
    case = make_case(N, V, D, seed=6, ignored=1.0).to(fused.device)
    buffer = torch.full((V, D), 3.0, device=fused.device)
    assert backward(fused, case, grad_buffer=buffer)[1] is None
    assert (buffer == 3).all()


def test_forward_alone_leaves_it_alone(fused):
    case = make_case(N, V, D, seed=7).to(fused.device)
    buffer = torch.full((V, D), 3.0, device=fused.device)
    weight = case.weight.requires_grad_()
    with torch.no_grad():
        linear_logprobs(case.hidden, weight, case.targets, backend=fused.backend, grad_buffer=buffer)
    linear_logprobs(case.hidden, weight, case.targets, backend=fused.backend, grad_buffer=buffer)
    assert (buffer == 3).all()


def test_a_view_into_a_larger_buffer(fused):
    """One flat tensor holds the gradients of all parameters, as distributed optimizers keep them."""
    case = make_case(N, V, D, seed=8).to(fused.device)
    flat = torch.zeros(2 * V * D + 5, device=fused.device)
    want = backward(fused, case)[1]
    backward(fused, case, grad_buffer=flat[5 : 5 + V * D].view(V, D))
    assert torch.allclose(flat[5 : 5 + V * D].view(V, D), want, atol=1e-6)
    assert (flat[:5] == 0).all() and (flat[5 + V * D :] == 0).all()


def test_no_second_tensor_of_the_weights_size(fused):
    if fused.interpreted:
        pytest.skip(
            "1024 columns by 512 are slow under Triton's interpreter; the products are shared with the torch backend"
        )
    case = make_case(4, 1024, 512, seed=9).to(fused.device)
    buffer = torch.zeros(1024, 512, device=fused.device)
    size = buffer.nbytes
    with_buffer = peak_bytes(lambda: backward(fused, case, grad_buffer=buffer), fused.device)
    without = peak_bytes(lambda: backward(fused, case), fused.device)
    assert without - with_buffer > 0.9 * size


WRONG = [
    ({"grad_buffer": torch.zeros(V, D + 1)}, r"grad_buffer.*\[150, 8\].*\[150, 9\]"),
    ({"grad_buffer": torch.zeros(V, D, dtype=torch.float64)}, r"grad_buffer.*float32.*float64"),
    ({"grad_buffer": torch.zeros(V, D, dtype=torch.bfloat16)}, r"grad_buffer.*float32.*bfloat16"),
    ({"grad_buffer": torch.zeros(V, D, device="meta")}, r"grad_buffer.*device.*meta"),
    ({"grad_buffer": torch.zeros(V, D, requires_grad=True)}, r"grad_buffer.*does not require grad"),
    ({"grad_buffer": torch.zeros(V, D), "backend": "reference"}, r"grad_buffer.*reference"),
]


@pytest.mark.parametrize("changed, message", WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_buffer(changed, message):
    case = make_case(N, V, D)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(case.hidden, case.weight.requires_grad_(), case.targets, **{"backend": "torch", **changed})


def test_a_frozen_head_has_no_gradient_to_add(fused):
    case = make_case(N, V, D).to(fused.device)
    buffer = torch.zeros(V, D, device=fused.device)
    with pytest.raises(ValueError, match=r"grad_buffer.*requires grad"):
        linear_logprobs(case.hidden, case.weight, case.targets, backend=fused.backend, grad_buffer=buffer)


def test_under_the_compiler_it_breaks_the_graph_and_says_why(fused):
    case = make_case(N, V, D, seed=10, bias=False).to(fused.device)
    trunk = torch.eye(D, device=fused.device).requires_grad_()
    weight = case.weight.clone().requires_grad_()

    def step(buffer):
        hidden = torch.tanh(case.hidden @ trunk)
        options = {"backend": fused.backend, "grad_buffer": buffer}
        return 2 * linear_logprobs(hidden, weight, case.targets, **options).logprobs.sum()

    found = []
    torch.compiler.reset()
    for call in (step, torch.compile(step, backend="aot_eager")):
        trunk.grad, buffer = None, torch.ones(V, D, device=fused.device)
        call(buffer).backward()
        found.append((trunk.grad, buffer))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    torch.compiler.reset()
    whole = torch.compile(step, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="grad_buffer"):
        whole(torch.zeros(V, D, device=fused.device))
    torch.compiler.reset()
