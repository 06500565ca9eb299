"""The registered ops under torch.library.opcheck, and models that call them under torch.compile."""

import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tspin_kernels import linear_logprobs, linear_sequence_loss

from .oracle import make_case
from .preferences import simpo
from .sequences import make_sequences


class Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of every call of an op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tspin_kernels":
            # A backward has no derivative of its own: its check is of the values alone.
            live = "backward" not in func._schema.name
            copies = (
                a.detach().clone().requires_grad_(live and a.requires_grad) if isinstance(a, torch.Tensor) else a
                for a in args
            )
            self.calls.append((func, tuple(copies), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def backward_of(fused, **options):
    case = make_case(6, 70, seed=1, ignored=0.3).to(fused.device)
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    result = linear_logprobs(leaves[0], leaves[1], case.targets, leaves[2], backend=fused.backend, **options)
    sum((o * u).sum() for o, u in zip(result, case.upstream, strict=True)).backward()


ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Eagerly the backward may rewrite what the forward kept for it; a traced graph gets a form of the ops that does not.
CHECKS = {"eager": ALL[:3], "traced": ALL}


def recorded_calls(fused, monkeypatch, form, **options):
    with monkeypatch.context() as patch, Recorder() as recorder:
        patch.setattr(torch.compiler, "is_compiling", lambda: form == "traced")
        backward_of(fused, **options)
    return recorder.calls


@pytest.mark.parametrize("form", CHECKS)
@pytest.mark.parametrize("options", [{}, {"memory_budget": 16384, "softcap": 5.0, "temperature": 0.7}], ids=str)
def test_opcheck(fused, monkeypatch, options, form):
    """Schema, autograd registration, fake tensors and AOT dispatch of each op as the public function calls it."""
    calls = recorded_calls(fused, monkeypatch, form, **options)
    assert len(calls) >= 2
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs, test_utils=CHECKS[form])


def test_every_registered_op_is_checked(fused, monkeypatch):
    calls = [call for form in CHECKS for call in recorded_calls(fused, monkeypatch, form)]
    registered = {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("tspin_kernels::")}
    assert registered == {func._schema.name for func, _, _ in calls}


class Model(torch.nn.Module):
    """A trunk, a head, and log-probs of the next token."""

    def __init__(self, backend: str, **options):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 90)
        self.backend, self.options = backend, options

    def forward(self, x, targets, temperature=1.0):
        result = linear_logprobs(
            torch.tanh(self.trunk(x)),
            self.head.weight,
            targets,
            self.head.bias,
            temperature=temperature,
            backend=self.backend,
            **self.options,
        )
        return result.logprobs.sum() + 0.3 * result.entropy.sum() + 0.1 * result.logsumexp.square().sum()


def gradients(call, model):
    model.zero_grad()
    loss = call()
    assert loss.dtype == torch.float32
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def inputs(n, device):
    g = torch.Generator().manual_seed(n)
    targets = torch.randint(90, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < 0.3, -100)
    return torch.randn(n, 8, generator=g).to(device), targets.to(device)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("options", [{}, {"memory_budget": 8192}], ids=["store", "blocks"])
def test_compiles_without_a_graph_break(fused, options, dynamic):
    model = Model(fused.backend, **options).to(fused.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (7, 12, 7, 20):
        x, targets = inputs(n, fused.device)
        want = gradients(lambda x=x, t=targets: model(x, t), model)
        got = gradients(lambda x=x, t=targets: compiled(x, t), model)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * n)


def test_compiled_float_arguments(fused):
    """A temperature that changes from call to call is a dynamic float64 to the compiler; results stay float32."""
    model = Model(fused.backend).to(fused.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, targets = inputs(9, fused.device)
    for temperature in (0.7, 0.9, 1.3, 2.0):
        want = gradients(lambda t=temperature: model(x, targets, t), model)
        got = gradients(lambda t=temperature: compiled(x, targets, t), model)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_compiles_under_no_grad_and_autocast(fused):
    model = Model(fused.backend).to(fused.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, targets = inputs(9, fused.device)
    with torch.no_grad():
        assert torch.allclose(compiled(x, targets), model(x, targets), rtol=1e-5)
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        got, want = (gradients(lambda c=c: c(x, targets), model) for c in (compiled, model))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor on the CPU needs a C++ compiler"
)
def test_compiles_with_inductor(fused):
    model = Model(fused.backend).to(fused.device)
    x, targets = inputs(9, fused.device)
    want = gradients(lambda: model(x, targets), model)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(gradients(lambda: compiled(x, targets), model), want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sequence_loss_compiles(fused):
    """With a graph break where it stands, and the gradient of the code around it right."""
    sequences = make_sequences(2, seed=2)
    case, ids = sequences.case.to(fused.device), sequences.sequence_ids.to(fused.device)
    trunk = torch.eye(8, device=fused.device).requires_grad_()

    def step():
        hidden = torch.tanh(case.hidden @ trunk)
        loss, stats = linear_sequence_loss(
            hidden, case.weight, case.targets, ids, simpo, case.bias, group_size=2, backend=fused.backend
        )
        return loss * 2, stats.logprobs.sum()

    grads = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        trunk.grad = None
        loss, total = call()
        loss.backward()
        grads.append((loss.detach(), total, trunk.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
