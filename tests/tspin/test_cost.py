"""The cost of a run: operations against counts by hand, and hours that follow from them and from what is assumed."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from tspin.config import SelfPlayConfig
from tspin.cost import ASSUMED, GPUS, Cost, Forward, gpu_named
from tspin.loading import training_args_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
LLAMA = LlamaConfig(vocab_size=100, num_key_value_heads=2, **SIZES)
H100 = GPUS["H100"]


def bare(config=LLAMA):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def cost(lengths=((500, 120),) * 4, gpu=H100, held_out=(), assumed=ASSUMED, model=LLAMA, **values) -> Cost:
    values = {
        "model_name_or_path": "m",
        "dataset": "d",
        "iterations": 2,
        "max_new_tokens": 80,
        "use_cpu": True,
    } | values
    config = SelfPlayConfig.from_dict(values)
    args = [training_args_of(config, t) for t in range(config.iterations)]
    return Cost(config, bare(model), args, lengths, held_out, gpu, assumed)


def flop(found: Cost, name: str, iteration: int = 1) -> float:
    return next(stage.flop for stage in found.iterations[iteration] if stage.name == name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_is_two_operations_a_weight_and_four_a_pair_and_head(tied):
    model = bare(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": tied}))
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    weights = sum(m.weight.numel() for m in layers)
    found = Forward.of(model)
    # Torch 2.11 counts 16 more of 184,320.
    assert (found.token, found.pair, found.head) == pytest.approx((2 * weights, 4 * 64 * 3, 2 * 100 * 64), rel=1e-3)
    assert found.cache == 2 * 2 * 16 * 3  # keys and values of 2 heads of 16, in 3 layers
    assert found.weights - weights == 100 * 64 + 7 * 64  # the head and the norms, no embedding beside it
    assert found.kernels > 3 * 7


def test_layers_that_are_no_linear_modules_count_too():
    found = Forward.of(bare(GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)))
    assert found.token == pytest.approx(2 * 2 * 12 * 64 * 64, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_experts_those_count_that_a_token_is_sent_to(dtype):
    routed = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = bare(MixtralConfig(vocab_size=100, num_key_value_heads=2, **routed, **SIZES)).to(dtype)
    found, one_expert = Forward.of(model), 3 * 64 * 96
    attention_and_router = 64 * (64 + 32 + 32 + 64) + 8 * 64
    assert found.token == pytest.approx(2 * 3 * (attention_and_router + 2 * one_expert), rel=1e-3)
    assert found.experts == 3 * 8 * one_expert and found.chosen == 2 / 8
    assert found.weights == 3 * attention_and_router + 100 * 64 + 7 * 64
    assert found.read(1) == found.weights + found.experts / 4
    assert found.read(2) == found.weights + found.experts * (1 - 0.75**2)
    assert found.read(10**3) == pytest.approx(found.weights + found.experts)


def test_a_model_that_does_not_run_without_data_is_refused(monkeypatch):
    model = bare()
    monkeypatch.setattr(type(model.model), "forward", lambda self, *args, **kwargs: torch.ones(()).to("meta").item())
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be counted without data"):
        Forward.of(model)


def attended(prompt: int, responses: list[int], shared: bool) -> tuple[int, int]:
    """Tokens of the rows of a triplet, and pairs of a token and one that it sees, each counted."""
    together = [m + 1 for m, n in enumerate(responses) for _ in range(n)]
    rows = [[0] * prompt + together] if shared else [[0] * prompt + [1] * n for n in responses]
    pairs = sum(row[k] in (0, row[q]) for row in rows for q in range(len(row)) for k in range(q + 1))
    return sum(map(len, rows)), pairs


@pytest.mark.parametrize(
    "sharing, again",
    [("auto", {}), ("off", {}), ("auto", {"gradient_checkpointing": True}), ("auto", {"sequence_tiling": "on"})],
)
def test_training_is_three_forwards_of_what_attends_and_one_more_for_checkpoints_or_tiles(sharing, again):
    options = {"prefix_sharing": sharing, "num_train_epochs": 2} | again
    found, forward = cost(**options), Forward.of(bare())
    for iteration, responses in ((0, [120, 80]), (1, [120, 80, 80])):
        tokens, pairs = attended(500, responses, sharing == "auto")
        layers = forward.token * tokens + forward.pair * pairs
        wanted = 2 * 4 * (layers * (4 if again else 3) + 3 * forward.head * sum(responses))
        assert flop(found, "training", iteration) == pytest.approx(wanted, rel=2e-3)


def test_methods_and_keys_cost_what_they_compute():
    base = flop(cost(), "training")
    assert flop(cost(method="sft"), "training") < flop(cost(method="spin"), "training") < base
    assert flop(cost(use_peft=True), "training") == pytest.approx(base * 2 / 3)
    mixed = cost(method="spin", spin_mix_previous=True)
    assert flop(mixed, "training", 1) == 2 * flop(mixed, "training", 0)
    assert flop(cost(method="spin"), "log-probs of the last policy") == pytest.approx(
        flop(cost(method="spin", num_train_epochs=1), "training") / 3
    )
    assert [s.name for s in cost(method="sft").iterations[0]] == ["training"]
    assert [s.name for s in cost().once] == ["proto responses"] and not cost(method="spin").once
    # Samples end with max_length.
    assert flop(cost(max_length=520), "training") == pytest.approx(flop(cost(max_new_tokens=20), "training"))


def test_hours_follow_from_the_gpu_and_from_what_is_assumed():
    found = cost()
    training = found.iterations[1][-1]
    assert training.hours == pytest.approx(training.flop / (0.4 * 67e12) / 3600)
    assert cost(assumed=replace(ASSUMED, flops=0.2)).iterations[1][-1].hours == pytest.approx(2 * training.hours)
    # Small models wait for kernels to be launched, 80 times a batch.
    sampling = found.iterations[1][0]
    assert sampling.hours == pytest.approx(80 * Forward.of(bare()).kernels * 15e-6 / 3600, rel=1e-3)
    slow = replace(H100, tb_per_s=1e-6)
    read = 2 * cost(gpu=slow, generation_batch_size=1).iterations[1][0].hours
    assert cost(gpu=replace(slow, tb_per_s=5e-7), generation_batch_size=1).iterations[1][0].hours == pytest.approx(read)
    assert found.hours == pytest.approx(sum(s.hours for s in [*found.once, *found.iterations[0], *found.iterations[1]]))
    answers = cost(held_out=((500, 120),) * 4).once[-1]
    assert answers.name == "held-out answers, 3 times" and answers.hours == pytest.approx(6 * sampling.hours)


def test_what_is_said_is_said_to_be_predicted_with_its_assumptions():
    found = cost(tasks="paper")
    verdict = found.verdict("H100", 8)
    for piece in (
        "predicted, not measured",
        "of one H100 for 2 iterations",
        "on 8",
        "40% of the peak TFLOP/s",
        "`tasks`",
    ):
        assert piece in verdict
    assert "on 8" not in found.verdict("H100") and "`tasks`" not in cost().verdict("H100")
    assert any("iteration 1: training" in line and "GPU hours" in line for line in found.table())


def test_a_gpu_that_is_not_known_is_refused():
    assert gpu_named("rtx 4090") is GPUS["RTX4090"] and gpu_named("h100") is H100
    with pytest.raises(ValueError, match="gpu: want one of RTX4090, A100, H100"):
        gpu_named("TPU")
