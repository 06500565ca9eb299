"""The predicted memory of a training step against the profiler's count of the bytes that the same step allocates on the CPU.

A real step: scoring, backward and optimizer through the package's own functions. The profiler knows nothing of tspin.memory.
"""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Trainer,
)

from tspin import attention, tiling
from tspin.collator import TripletCollator
from tspin.data import MEMBERS
from tspin.memory import KEPT, SCORING_PHASE, Context, predict_memory
from tspin.model import disable_dropout, head_of, install_scoring, score_batch
from tspin.prefix import NAME, PrefixLayout, layout_inputs
from tspin.sequential import backward_one_by_one
from tspin.tracing import COPIES, LiveBytes, gpu_attention
from tspin.trainer import method_loss_fn
from tspin.training_args import TSPINConfig
from tspin_kernels import linear_sequence_loss, linear_tspin_loss

SIZES = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 256}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=192),
    "qwen2_tied": Qwen2Config(**SIZES, num_key_value_heads=4, intermediate_size=128, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, intermediate_size=128, sliding_window=64),
}
ROUTED = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 16}
EXPERTS = {
    "mixtral": MixtralConfig(**SIZES, **ROUTED, intermediate_size=96, num_local_experts=8),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **ROUTED, moe_intermediate_size=32, num_experts=16),
    "gpt-oss": GptOssConfig(**SIZES, **ROUTED, intermediate_size=96, num_local_experts=8),
}
WIDE = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=8192)
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def training_args(tmp_path, **values) -> TSPINConfig:
    values = {"per_device_train_batch_size": 1, "optim": "rmsprop"} | values
    return TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def rows_of(prompt: int, responses: tuple[int, ...], triplets: int) -> list[dict]:
    def ids(n):
        return torch.randint(3, 250, (n,)).tolist()

    return [
        {"prompt_ids": ids(prompt), **{f"{m}_ids": ids(n) for m, n in zip(MEMBERS, responses, strict=False)}}
        for _ in range(triplets)
    ]


def shared_backward(model, prompt: int, responses: tuple[int, ...], triplets: int) -> None:
    layout = PrefixLayout(((prompt, responses),) * triplets)
    T = prompt + sum(responses)
    inputs = layout_inputs(layout, torch.device("cpu"))
    starts = [sum(responses[:m]) + prompt for m in range(len(responses))]
    rows, sequence_ids = [], []
    for t in range(triplets):
        for m, (start, length) in enumerate(zip(starts, responses, strict=True)):
            rows += [t * T + prompt - 1, *range(t * T + start, t * T + start + length - 1)]
            sequence_ids += [t * len(responses) + m] * length
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = core.base_model(
        input_ids=torch.randint(3, 250, (1, triplets * T)), use_cache=False, **inputs
    ).last_hidden_state
    head = head_of(model)
    linear_tspin_loss(
        hidden.flatten(0, 1),
        head.weight,
        torch.randint(3, 250, (len(rows),)),
        torch.tensor(sequence_ids),
        rows=torch.tensor(rows),
        alpha=1.0,
        beta=0.1,
    )[0].backward()


def measured_peak(config, args, prompt, responses, *, sharing=False, adapter=None, others=None) -> int:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model = model if adapter is None else get_peft_model(model, adapter)
    disable_dropout(model)
    if args.sequence_tiling == "on":
        tiling.tile_sequences(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    triplets = args.per_device_train_batch_size
    trainable = [p for p in model.parameters() if p.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(trainable, **options)
    members = MEMBERS[: len(responses)]
    one_by_one = args.sequential_backward == "on"
    if sharing:
        (model.get_base_model() if adapter is not None else model).set_attn_implementation(NAME)
    if one_by_one or others or not sharing:
        install_scoring(model)

    def backward() -> None:
        if sharing and not one_by_one and not others:
            return shared_backward(model, prompt, responses, triplets)
        rows = rows_of(prompt, responses, 1 if others else triplets)
        rows += [row for other in others or () for row in rows_of(other.prompt, other.responses, 1)]
        batch = TripletCollator(pad_token_id=0, members=members, packed=sharing)(rows)
        score = partial(score_batch, model, memory_budget=args.memory_budget, fused=args.fused != "off")
        loss_fn = partial(method_loss_fn(args, 0.1), keep=torch.ones(triplets, dtype=torch.bool))
        if one_by_one:
            loss, _ = backward_one_by_one(score, torch.Tensor.backward, batch, loss_fn)
        else:
            loss, _ = score(batch, loss_fn)
        loss.backward()

    def step() -> None:
        for _ in range(args.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def predicted_peak(config, args, prompt, responses, *, sharing=False, adapter=None, others=None) -> int:
    options = {"sharing": sharing, "peft_config": adapter, "gpu": False, "others": others}
    return predict_memory(config, args, prompt_tokens=prompt, response_tokens=responses, **options).peak


def check(tmp_path, config, prompt, responses, *, sharing=False, adapter=None, others=None, **values) -> float:
    """The predicted peak by the measured one."""
    args, options = training_args(tmp_path, **values), {"sharing": sharing, "adapter": adapter, "others": others}
    predicted, measured = (peak(config, args, prompt, responses, **options) for peak in (predicted_peak, measured_peak))
    print(f"{predicted} predicted, {measured} measured: {predicted / measured:.3f}")
    return predicted / measured


ARMS = {"shared": {"sharing": True}, "separate": {}, "sequential": {"sequential_backward": "on"}}


TILED = {
    # Wide enough for what a CPU's attention kernel takes for itself, which is not predicted, to be a small part.
    "llama": LlamaConfig(**SIZES | {"hidden_size": 256}, num_key_value_heads=2, intermediate_size=768),
    "gemma3": Gemma3TextConfig(**SIZES | {"hidden_size": 256}, num_key_value_heads=1, intermediate_size=768),
}


@pytest.mark.parametrize(
    "values",
    [
        {"sharing": True},
        {"gradient_checkpointing": True},
        {"sharing": True, "gradient_checkpointing": True, "bf16": True},
    ],
    ids=["kept", "checkpointed", "autocast"],
)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_priced_whichever_tokens_they_get(tmp_path, name, values):
    ratio = check(tmp_path, EXPERTS[name], 192, (48, 48, 48), **values)
    assert 0.9 <= ratio <= 1.1, ratio


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_experts_in_tiles_are_priced_and_take_less(tmp_path, monkeypatch, adapter):
    for tile, tokens in (("MLP_TILE", 64), ("NORM_TILE", 64), ("EXPERT_TILE", 8)):
        monkeypatch.setattr(tiling, tile, tokens)
    config = Qwen3MoeConfig(**SIZES | {"hidden_size": 256}, **ROUTED, moe_intermediate_size=64, num_experts=4)
    lengths, keys = (512, (192, 128, 192)), {"gradient_checkpointing": True}
    options = {"adapter": adapter, "sharing": True}
    assert check(tmp_path, config, *lengths, sequence_tiling="on", **options, **keys) == pytest.approx(1, abs=0.1)
    tiled, whole = (
        predicted_peak(config, training_args(tmp_path, sequence_tiling=switch, **keys), *lengths, **options)
        for switch in ("on", "off")
    )
    assert tiled < 0.9 * whole


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("arm", ["shared", "sequential"])
@pytest.mark.parametrize("name", TILED)
def test_the_peak_in_tiles_is_predicted_and_lower(tmp_path, monkeypatch, name, arm, adapter):
    for tile in ("MLP_TILE", "NORM_TILE"):
        monkeypatch.setattr(tiling, tile, 64)
    lengths, options = (512, (192, 128, 192)), {"adapter": adapter, "sharing": arm == "shared"}
    keys = {"gradient_checkpointing": True, "sequential_backward": "on" if arm == "sequential" else "off"}
    assert check(tmp_path, TILED[name], *lengths, sequence_tiling="on", **options, **keys) == pytest.approx(1, abs=0.1)
    tiled, whole = (
        predicted_peak(TILED[name], training_args(tmp_path, sequence_tiling=switch, **keys), *lengths, **options)
        for switch in ("on", "off")
    )
    assert tiled < 0.97 * whole


@pytest.mark.parametrize("prompt, response", [(16, 256), (128, 128)])
def test_the_scoring_of_one_response_at_a_time_is_priced(tmp_path, prompt, response):
    """Of a whole triplet in one row, without gradient: with short prompts and adapters more than any response's backward."""
    keys = {"gradient_checkpointing": True, "sequential_backward": "on"}
    options = {"sharing": True, "adapter": ADAPTER, **keys}
    assert check(tmp_path, TILED["llama"], prompt, (response,) * 3, **options) == pytest.approx(1, abs=0.1)
    lengths = {"prompt_tokens": prompt, "response_tokens": response}
    found = predict_memory(TILED["llama"], training_args(tmp_path, **keys), **lengths, peft_config=ADAPTER, gpu=False)
    assert (found.fullest == SCORING_PHASE) == (prompt == 16)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_peak_is_predicted_within_ten_percent(tmp_path, name, arm, checkpointing, adapter):
    ratio = check(
        tmp_path, CONFIGS[name], 192, (48, 48, 48), adapter=adapter, gradient_checkpointing=checkpointing, **ARMS[arm]
    )
    assert 0.9 <= ratio <= 1.1, ratio


@pytest.mark.parametrize(
    "responses, sharing, values",
    [
        ((8, 96, 40), False, {}),
        ((8, 96, 40), True, {"gradient_checkpointing": True}),
        ((48, 48, 48), True, {"per_device_train_batch_size": 3}),
        ((48, 48, 48), False, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ((48, 48, 48), False, {"fused": "off"}),
        ((48, 48, 48), False, {"bf16": True}),
        ((48, 48, 48), False, {"bf16": True, "gradient_checkpointing": True}),
        ((2, 2, 2), True, {"optim": "adamw_torch", "gradient_checkpointing": True}),
        ((2, 2, 2), False, {"optim": "adafactor", "gradient_checkpointing": True}),
        ((2, 2, 2), False, {"optim": "sgd", "gradient_checkpointing": True}),
        ((48,), False, {"method": "sft"}),
    ],
    ids=lambda value: None if isinstance(value, (tuple, bool)) else "-".join(map(str, value)) or "plain",
)
def test_every_key_that_matters_is_priced(tmp_path, responses, sharing, values):
    ratio = check(tmp_path, CONFIGS["llama"], 192, responses, sharing=sharing, **values)
    assert 0.9 <= ratio <= 1.1, ratio


@pytest.mark.parametrize("sharing", [True, False])
def test_a_batch_with_one_long_triplet_is_priced_as_it_is(tmp_path, sharing):
    others, keys = [Context(24, (8, 16, 8))] * 3, {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    ratio = check(tmp_path, CONFIGS["llama"], 384, (64, 48, 64), sharing=sharing, others=others, **keys)
    assert 0.9 <= ratio <= 1.1, ratio
    alike, apart = (
        predicted_peak(CONFIGS["llama"], training_args(tmp_path, **keys), 384, (64, 48, 64), sharing=sharing, others=o)
        for o in (None, others)
    )
    assert apart < (0.6 if sharing else 1.001) * alike  # without sharing all rows are as long as the longest


def test_autocasts_copies_of_weights_are_gone_when_the_head_runs(monkeypatch):
    model, live, seen = AutoModelForCausalLM.from_config(CONFIGS["llama"]), LiveBytes(), []
    install_scoring(model)
    model.gradient_checkpointing_enable()
    model.train()
    head = linear_sequence_loss

    def watched(*args, **options):
        seen.append([number for number in live._live.values() if live.labels[number] == COPIES])
        return head(*args, **options)

    monkeypatch.setattr("tspin.model.linear_sequence_loss", watched)
    batch = TripletCollator(pad_token_id=0)(rows_of(8, (4, 4, 4), 1))
    with live, torch.autocast("cpu", torch.bfloat16):
        score_batch(model, batch, lambda sequences: sequences.logprobs.sum(1))
    assert COPIES in live.labels and seen == [[]]


@pytest.mark.parametrize(
    "values", [{}, {"memory_budget": 3 * 2**20}, {"fused": "off"}], ids=["kept", "budget", "logits"]
)
def test_the_head_of_a_large_vocabulary_is_priced(tmp_path, values):
    ratio = check(tmp_path, WIDE, 16, (48, 48, 48), optim="sgd", **values)
    assert 0.9 <= ratio <= 1.1, ratio


@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_gpus_varlen_kernels_are_stood_in_for_by_tensors_of_the_same_shapes(key_heads):
    blocks = attention.Blocks((0, 5, 12), (0, 7, 16), causal=False)
    q, k, v = torch.randn(12, 4, 8), torch.randn(16, key_heads, 8), torch.randn(16, key_heads, 8)
    real = attention._forward(q, k, v, blocks, 1.0)
    reals = [*real, *attention._backward(torch.randn_like(q), q, k, v, *real, blocks, 1.0)]
    with gpu_attention():
        priced = attention._forward(q, k, v, blocks, 1.0)
        all_priced = [*priced, *attention._backward(torch.randn_like(q), q, k, v, *priced, blocks, 1.0)]
    assert [(t.shape, t.dtype) for t in all_priced] == [(t.shape, t.dtype) for t in reals]
    assert attention._forward(q, k, v, blocks, 1.0)[0].equal(real[0])


def gpu_peak(tmp_path, config, prompt, dtype, **options):
    lengths = {"prompt_tokens": prompt, "response_tokens": 32}
    return predict_memory(config, training_args(tmp_path, optim="sgd"), **lengths, dtype=dtype, **options)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_shared_row_on_a_gpu_costs_what_the_kernel_for_it_keeps(tmp_path, monkeypatch, softcap):
    kind = LlamaConfig if softcap is None else Gemma2Config
    config = kind(**SIZES, num_key_value_heads=1, intermediate_size=64, head_dim=64)
    dtypes = (torch.bfloat16, torch.float32)
    kept = lambda prompt, dtype: gpu_peak(tmp_path, config, prompt, dtype).terms[KEPT] // dtype.itemsize
    monkeypatch.setattr(attention, "_LONG", 2049)
    short, long = ([kept(prompt, dtype) for dtype in dtypes] for prompt in (1024, 2048))
    # No scores [L, S] are kept: the activations grow with the tokens.
    assert long[0] < 2.05 * short[0]
    # Without a soft cap, 32 bits have no kernel that reads a prompt's keys and values where they are: a copy for each response.
    copies = 3 * 2 * 1024 * SIZES["num_hidden_layers"] * 64
    assert ((long[1] - long[0]) - (short[1] - short[0]) >= copies) == (softcap is None)
    # Where the prompt goes apart, a layer's output is kept by its kernels and once more as a whole; the last one's after the peak.
    monkeypatch.setattr(attention, "_LONG", 2048)
    outputs = (2048 + 3 * 32) * (SIZES["num_hidden_layers"] - 1) * SIZES["num_attention_heads"] * 64
    assert kept(2048, torch.bfloat16) - long[0] == (outputs if softcap is None else 0)


def test_gpus_divide_what_is_kept_and_gather_a_layer_at_a_time(tmp_path):
    args, config = training_args(tmp_path, gradient_checkpointing=True), CONFIGS["llama"]
    alone, two, many = (
        predict_memory(config, args, prompt_tokens=40, response_tokens=10, gpus=n) for n in (1, 2, 10**9)
    )
    model = AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    rest = sum(p.numel() for p in model.parameters()) * 4 - 5 * layer
    assert set(alone.phases) == set(two.phases)
    for phase, terms in alone.phases.items():
        shared = two.phases[phase]
        for term, size in terms.items():
            kept = term in ("weights", "optimizer states", "gradients", "optimizer's temporaries")
            assert shared[term] == (-(-size // 2) if kept else size), (phase, term)
            assert not kept or many.phases[phase][term] == 1
        gathered = {"optimizer": 0, "forward": 2 * layer + rest}.get(phase, 2 * (2 * layer + rest))
        assert shared.get("gathered by FSDP2", 0) == gathered
    half = training_args(tmp_path, bf16=True)
    terms = predict_memory(config, half, prompt_tokens=40, response_tokens=10, gpus=2).phases["forward"]
    assert terms["gathered by FSDP2"] == (2 * layer + rest) // 2 and "weight copies of autocast" not in terms
