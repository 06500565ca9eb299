"""Bad input ends in a ValueError that names the argument, what was wanted and what came; never in a wrong number."""

from functools import partial

import pytest
import torch

from tspin_kernels import linear_logprobs, linear_sequence_loss, linear_tspin_loss, sequence_loss

from .oracle import make_case
from .preferences import simpo, tspin

N, V, D = 6, 20, 8


@pytest.fixture
def call(implementation):
    """linear_logprobs with some arguments replaced."""
    case = make_case(N, V, D).to(implementation.device)

    def call(**changed):
        given = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "bias": case.bias}
        return linear_logprobs(**{**given, "backend": implementation.backend, **changed})

    return call


@pytest.fixture
def group(implementation):
    """linear_sequence_loss of three pairs with some arguments replaced."""
    case = make_case(N, V, D).to(implementation.device)

    def group(**changed):
        ids = torch.arange(N, device=implementation.device)
        given = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "bias": case.bias}
        given |= {"sequence_ids": ids, "loss_fn": simpo, "group_size": 2, "backend": implementation.backend}
        return linear_sequence_loss(**{**given, **changed})

    return group


def on(implementation, tensor):
    return tensor.to(implementation.device)


WRONG = [
    ("weight", torch.zeros(D, V), r"weight.*transposed"),
    ("weight", torch.zeros(V, D + 1), r"weight.*\b8\b.*\b9\b"),
    ("weight", torch.zeros(V), r"weight.*\[20\]"),
    ("weight", torch.zeros(V, D, dtype=torch.float16), r"weight.*float32.*float16"),
    ("weight", torch.zeros(0, D), r"weight"),
    ("hidden", torch.zeros(N, D, dtype=torch.int64), r"hidden.*int64"),
    ("hidden", torch.zeros(N, D + 1), r"hidden.*9"),
    ("targets", torch.zeros(N, dtype=torch.float32), r"targets.*int64.*float32"),
    ("targets", torch.zeros(N, dtype=torch.int32), r"targets.*int64.*int32"),
    ("targets", torch.zeros(N - 1, dtype=torch.int64), r"targets.*\b6\b.*\b5\b"),
    ("bias", torch.zeros(V - 1), r"bias.*20.*19"),
    ("bias", torch.zeros(V, dtype=torch.int64), r"bias.*floating.*int64"),
    ("weight", torch.zeros(V, D, dtype=torch.int8), r"weight.*floating.*int8"),
    ("bias", torch.zeros(V, 1), r"bias"),
]


@pytest.mark.parametrize("name, value, message", WRONG, ids=[f"{n}-{tuple(v.shape)}-{v.dtype}" for n, v, _ in WRONG])
def test_wrong_tensors(call, group, implementation, name, value, message):
    for op in (call, group):
        with pytest.raises(ValueError, match=message):
            op(**{name: on(implementation, value)})


@pytest.mark.parametrize("bad", [-1, -101, V, V + 1, 2**40])
def test_targets_out_of_range(call, group, implementation, bad):
    targets = torch.zeros(N, dtype=torch.int64)
    targets[3] = bad
    if implementation.device != "cpu":
        assert call(targets=on(implementation, targets)).logprobs.isnan().nonzero().flatten().tolist() == [3]
        return
    for op in (call, group):
        with pytest.raises(ValueError, match=rf"targets.*20.*{bad}"):
            op(targets=targets)


def test_the_ignore_index_alone_may_be_out_of_range(call, implementation):
    targets = on(implementation, torch.full((N,), -100))
    assert (call(targets=targets).logprobs == 0).all()
    if implementation.device == "cpu":
        for ignore_index in (None, -1):
            with pytest.raises(ValueError, match=r"targets.*-100"):
                call(targets=targets, ignore_index=ignore_index)


CONSTANTS = [
    ({"temperature": 0.0}, r"temperature.*positive.*0"),
    ({"temperature": -1.0}, r"temperature.*-1"),
    ({"softcap": 0.0}, r"softcap.*0"),
    ({"softcap": -2.0}, r"softcap.*-2"),
    ({"entropy": True}, r"entropy.*'grad'.*'value'.*False.*True"),
    ({"entropy": "gradient"}, r"entropy.*'grad'.*gradient"),
    ({"backend": "cuda"}, r"backend.*'triton'.*'torch'.*'reference'.*cuda"),
    ({"temperature": float("nan")}, r"temperature.*nan"),
    ({"softcap": float("nan")}, r"softcap.*nan"),
    ({"softcap": float("inf")}, r"softcap.*inf"),
    ({"temperature": float("inf")}, r"temperature.*inf"),
    ({"logit_scale": float("nan")}, r"logit_scale.*nan"),
    ({"logit_scale": float("-inf")}, r"logit_scale.*inf"),
]
FUSED_CONSTANTS = [
    ({"memory_budget": 2e9}, r"memory_budget: want an int, bytes, got 2000000000.0"),
    ({"memory_budget": True}, r"memory_budget.*True"),
    *(
        ({name: torch.ones((), requires_grad=True)}, rf"{name}.*requires grad.*{name}.item")
        for name in ("temperature", "logit_scale", "softcap")
    ),
]


@pytest.mark.parametrize("changed, message", FUSED_CONSTANTS, ids=[str(*c) for c, _ in FUSED_CONSTANTS])
def test_constants_that_only_plain_pytorch_takes(fused, changed, message):
    case = make_case(N, V, D).to(fused.device)
    options = {"backend": fused.backend, **changed}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(case.hidden, case.weight, case.targets, **options)
    with pytest.raises(ValueError, match=message):
        ids = torch.arange(N, device=fused.device)
        linear_sequence_loss(case.hidden, case.weight, case.targets, ids, simpo, group_size=2, **options)
    if "memory_budget" not in changed:
        with torch.no_grad():
            linear_logprobs(case.hidden, case.weight, case.targets, **options)


@pytest.mark.parametrize("changed, message", CONSTANTS, ids=[str(c) for c, _ in CONSTANTS])
def test_wrong_constants(call, group, changed, message):
    for op in (call, group):
        with pytest.raises(ValueError, match=message):
            op(**changed)


@pytest.mark.parametrize("budget", [0, -1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_budget_too_small_names_the_least(fused, dtype, budget):
    """In the forward, where the user stands; the budget that the error names is enough for the backward too."""
    if fused.interpreted:
        pytest.skip("100 blocks are slow under Triton's interpreter; the plan is shared with the torch backend")
    case = make_case(40, 500, 16, dtype=dtype).to(fused.device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    ids = torch.arange(40, device=fused.device) % 4
    tokens = partial(linear_logprobs, hidden, weight, case.targets, backend=fused.backend)
    groups = partial(
        linear_sequence_loss, hidden, weight, case.targets, ids, simpo, group_size=2, backend=fused.backend
    )
    for op, scalar in ((tokens, lambda r: r.logprobs.sum()), (groups, lambda r: r[0])):
        with pytest.raises(ValueError, match=r"memory_budget.*at least \d+ bytes") as error:
            op(memory_budget=budget)
        least = int(str(error.value).split("at least ")[1].split()[0])
        scalar(op(memory_budget=least)).backward()


def test_a_named_backend_never_falls_back():
    case = make_case(N, V, D)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"backend.*triton.*cpu"):
            linear_logprobs(case.hidden, case.weight, case.targets, backend="triton")
    with pytest.raises(ValueError, match=r"float64.*torch"):
        double = case.to(torch.float64)
        linear_logprobs(double.hidden, double.weight, double.targets, backend="triton")


def test_devices_must_agree(call, group):
    """`meta` stands for any other device."""
    for name, value in [
        ("weight", torch.zeros(V, D)),
        ("bias", torch.zeros(V)),
        ("targets", torch.zeros(N, dtype=torch.int64)),
    ]:
        for op in (call, group):
            with pytest.raises(ValueError, match=rf"{name}.*device.*meta"):
                op(**{name: value.to("meta")})


def test_devices_of_sequences_must_agree(group, implementation):
    ids = on(implementation, torch.arange(N))
    for name, value in [("sequence_ids", ids), ("rows", ids), ("group_inputs", (torch.zeros(3, 2),))]:
        elsewhere = tuple(t.to("meta") for t in value) if isinstance(value, tuple) else value.to("meta")
        with pytest.raises(ValueError, match=rf"{name}.*device.*meta"):
            group(num_groups=3, **{name: elsewhere})


SEQUENCE_ARGUMENTS = [
    ({"sequence_ids": torch.arange(N - 1)}, r"sequence_ids.*6.*5"),
    ({"sequence_ids": torch.arange(N, dtype=torch.int32)}, r"sequence_ids.*int64.*int32"),
    ({"sequence_ids": torch.arange(N) - 1}, r"sequence_ids.*-1"),
    ({"num_groups": 2}, r"sequence_ids.*4.*5"),
    ({"group_size": 0}, r"group_size.*0"),
    ({"rows": torch.arange(N - 1)}, r"rows.*6.*5"),
    ({"rows": torch.arange(N, dtype=torch.int32)}, r"rows.*int64.*int32"),
    ({"group_inputs": (torch.zeros(2, 2),)}, r"group_inputs.*3.*2"),
    ({"group_inputs": (torch.tensor(1.0),)}, r"group_inputs"),
    ({"group_inputs": (torch.zeros(3, 2, requires_grad=True),)}, r"group_inputs.*grad"),
    ({"group_inputs": torch.zeros(3, 2)}, r"group_inputs.*sequence"),
    ({"normalizer": torch.tensor(2.0, requires_grad=True)}, r"normalizer.*grad"),
    ({"normalizer": torch.ones(2)}, r"normalizer.*\[2\]"),
    ({"normalizer": torch.ones(3, 1)}, r"normalizer.*\[3, 1\]"),
]


@pytest.mark.parametrize("changed, message", SEQUENCE_ARGUMENTS, ids=range(len(SEQUENCE_ARGUMENTS)))
def test_wrong_sequence_arguments(group, implementation, changed, message):
    def moved(value):
        if isinstance(value, tuple):
            return tuple(t.detach().to(implementation.device).requires_grad_(t.requires_grad) for t in value)
        return on(implementation, value) if isinstance(value, torch.Tensor) and not value.requires_grad else value

    with pytest.raises(ValueError, match=message):
        group(num_groups=changed.get("num_groups", 3), **{k: moved(v) for k, v in changed.items() if k != "num_groups"})


@pytest.mark.parametrize("bad", [-1, N])
def test_rows_out_of_range(group, implementation, bad):
    """On a GPU too, where an index out of range ends the process."""
    with pytest.raises(ValueError, match=rf"rows.*{bad}"):
        group(rows=on(implementation, torch.arange(N).index_fill(0, torch.tensor([2]), bad)))


LOSSES = {
    "reduced": lambda s: simpo(s).mean(),
    "kept_dimension": lambda s: simpo(s)[:, None],
    "per_sequence": lambda s: s.logprobs,
    "one_value": lambda s: simpo(s).sum()[None],
    "none": lambda s: None,
    "number": lambda s: 0.0,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_the_wrong_shape(group, loss):
    """No silent broadcast: one loss for each of the three pairs, or an error."""
    with pytest.raises(ValueError, match=r"loss_fn.*\[3\]"):
        group(loss_fn=LOSSES[loss])


def test_the_plain_half_checks_alike():
    logprobs, ids = torch.zeros(N), torch.arange(N)
    with pytest.raises(ValueError, match=r"loss_fn"):
        sequence_loss(logprobs, None, ids, LOSSES["reduced"], group_size=2)
    with pytest.raises(ValueError, match=r"sequence_ids"):
        sequence_loss(logprobs, None, ids[1:], simpo, group_size=2)
    with pytest.raises(ValueError, match=r"group_size"):
        sequence_loss(logprobs, None, ids, simpo, group_size=0)


@pytest.mark.parametrize("form", ["product", "sum", "inside", "non_leaf"])
def test_a_captured_tensor_that_requires_grad(fused, form):
    """It would get no gradient: the closure's tensors are constants."""
    case = make_case(N, V, D).to(fused.device)
    scale = torch.ones((), device=fused.device, requires_grad=True)
    captured = scale * 2 if form == "non_leaf" else scale
    loss_fn = {
        "product": lambda s: captured * simpo(s),
        "sum": lambda s: simpo(s) + captured,
        "inside": lambda s: (s.logprobs.detach() * captured).sum(1),
        "non_leaf": lambda s: captured * simpo(s),
    }[form]
    ids = torch.arange(N, device=fused.device)
    with pytest.raises(ValueError, match=r"loss_fn.*requires grad.*detach"):
        linear_sequence_loss(
            case.hidden.requires_grad_(), case.weight, case.targets, ids, loss_fn, group_size=2, backend=fused.backend
        )


def test_a_captured_tensor_that_requires_grad_beside_nothing_else(fused):
    """Not with a gradient of its own either; where no gradient is wanted it is a constant."""
    case = make_case(N, V, D).to(fused.device)
    scale = torch.full((), 2.0, device=fused.device, requires_grad=True)
    ids = torch.arange(N, device=fused.device)
    call = partial(
        linear_sequence_loss, case.hidden, case.weight, case.targets, ids, group_size=2, backend=fused.backend
    )
    with pytest.raises(ValueError, match=r"loss_fn.*requires grad.*detach"):
        call(lambda s: scale * simpo(s))
    with torch.no_grad():
        torch.testing.assert_close(call(lambda s: scale * simpo(s))[0], 2 * call(simpo)[0])


def test_float64_is_not_told_of_autocast():
    case = make_case(N, V, D)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"weight.*cast one of them$"):
        linear_logprobs(case.hidden.double(), case.weight, case.targets)


def test_linear_tspin_loss_needs_triplets(implementation):
    case = make_case(N, V, D).to(implementation.device)
    op = partial(
        linear_tspin_loss, case.hidden, case.weight, case.targets, torch.arange(N, device=implementation.device)
    )
    with pytest.raises(ValueError, match=r"group_size.*beta"):
        op(group_size=2, backend=implementation.backend)
    assert op(group_size=2, beta=0.0, backend=implementation.backend)[1].logprobs.shape == (3, 2)
    assert op(backend=implementation.backend)[1].logprobs.shape == (2, 3)
    with pytest.raises(ValueError, match=r"loss_type"):
        op(loss_type="hinge", backend=implementation.backend)


def test_an_error_in_the_loss_is_the_users(group):
    def broken(s):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        group(loss_fn=broken)


def test_nan_log_probs_reach_the_loss(group, implementation):
    """Not hidden by the op: a NaN row makes the loss NaN, and only its own sequence's statistics."""
    hidden = make_case(N, V, D).hidden.clone()
    hidden[4] = float("nan")
    loss, stats = group(hidden=on(implementation, hidden), loss_fn=tspin, group_size=3)
    assert loss.isnan() and stats.logprobs.isnan().flatten().tolist() == [False] * 4 + [True, False]
