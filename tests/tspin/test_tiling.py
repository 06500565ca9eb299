"""Layers in tiles of tokens give what whole rows give, keep no wide activation of a row, and are refused where tokens mix."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from test_trainer import METHODS, build, train, triplets
from torch import nn

import tspin
from tspin import tiling
from tspin.model import causal_lm
from tspin.tiling import refusal, tile_sequences, tiles

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = {
    "mixtral": lambda **more: hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more),
    "qwen2-moe": lambda **more: hf.Qwen2MoeConfig(**SIZES, **ROUTED, shared_expert_intermediate_size=48, **more),
    "qwen3-moe": lambda **more: hf.Qwen3MoeConfig(**SIZES, **ROUTED, head_dim=16, **more),
    "gpt-oss": lambda **more: hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **more),
    "granite-moe": lambda **more: hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more),
}
MODELS = EXPERTS | {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama with biases": lambda: hf.LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**SIZES),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=8),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "cohere": lambda: hf.CohereConfig(**SIZES, use_qk_norm=True),  # a weight for each head
}
CHECKPOINTING = {"kept": None, "checkpointed": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "MLP_TILE", 8)
    monkeypatch.setattr(tiling, "NORM_TILE", 12)
    monkeypatch.setattr(tiling, "EXPERT_TILE", 5)  # 10 tokens


def adapted(model):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def make(config, dtype=None, adapter=False):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).train()
    # Torch's product of rows grouped by expert knows no float64.
    dtype = dtype or (torch.float32 if any(hasattr(m, "experts") for m in model.modules()) else torch.float64)
    return (adapted(model) if adapter else model).to(dtype)


def gradients(run, shape=(2, 15), autocast=False, of=None):
    """Logits and the gradient of each trained parameter of the model `of`, default `run` itself."""
    model = run if of is None else of
    ids = torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1)).to(model.device)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = run(input_ids=ids, use_cache=False).logits.float()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
    (logits * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return logits.detach(), grads


def agree(got, want, rtol=1e-6):  # a norm computes in float32
    assert got[1].keys() == want[1].keys()
    for a, b in zip((got[0], *got[1].values()), (want[0], *want[1].values()), strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_whole_rows(name, checkpointing, adapter):
    model = make(MODELS[name](), adapter=adapter)
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        model.enable_input_require_grads()
    whole = gradients(model)
    untile = tile_sequences(model)
    agree(gradients(model), whole, rtol=5e-5 if name in EXPERTS else 1e-6)
    untile()
    again = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(again[1].values(), whole[1].values(), strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_under_autocast_they_differ_by_its_rounding(adapter):
    exact = gradients(make(MODELS["qwen3"](), adapter=adapter))
    model = make(MODELS["qwen3"](), torch.float32, adapter)
    whole = gradients(model, autocast=True)
    tile_sequences(model)
    tiled = gradients(model, autocast=True)
    assert (tiled[0] - whole[0]).abs().max() < 0.05
    error = lambda run: max((run[1][n] - g).norm() / g.norm() for n, g in exact[1].items())
    assert error(tiled) <= 1.2 * error(whole) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_on_a_gpu_they_are_as_near_as_whole_rows(monkeypatch, adapter, checkpointing):
    for tile in ("MLP_TILE", "NORM_TILE"):
        monkeypatch.setattr(tiling, tile, 512)
    exact, errors = gradients(make(MODELS["qwen3"](), adapter=adapter), (1, 1500))[1], []
    for tiled in (False, True):
        model = make(MODELS["qwen3"](), torch.bfloat16, adapter).cuda()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if tiled:
            tile_sequences(model)
        logits, grads = gradients(model, (1, 1500))
        assert logits.isfinite().all()
        errors.append(max((grads[n].double().cpu() - g).norm() / g.norm() for n, g in exact.items()))
    assert errors[1] <= 1.2 * errors[0] < 0.8  # adapters of 16 bits are the worse


def test_a_backward_within_autocast_is_that_without():
    model = make(MODELS["llama"](), torch.float32)
    tile_sequences(model)
    ids, found = torch.arange(1, 41)[None], []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            loss.backward() if inside else None
        None if inside else loss.backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-6)


def test_gradients_of_16_bit_weights_are_summed_in_float32():
    """64 tiles, whose gradients are alike: summed in bf16 the last ones would be lost."""
    model = make(MODELS["llama"]()).model.layers[0].mlp.bfloat16()
    x = torch.randn(1, 8, 32).bfloat16().repeat(1, 64, 1)
    one = torch.autograd.grad(model(x[:, :8]).float().sum(), model.down_proj.weight)[0].float()
    tiled = tiling._in_tiles(model.forward, model, 8, x)
    got = torch.autograd.grad(tiled.float().sum(), model.down_proj.weight)[0]
    assert torch.equal(got, (64 * one).bfloat16())


@pytest.mark.parametrize("name, times", [("llama", 2), ("gemma2", 3)])
def test_a_checkpoint_recomputes_no_mlp_unless_a_norm_reads_its_output(name, times):
    model, calls = make(MODELS[name]()), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tile_sequences(model)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *args: calls.append(args[1][0].shape[1]))
    gradients(model, (1, 24))
    assert calls == [8] * 3 * times * len(model.model.layers)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_nothing_wide_and_no_float32_of_a_16_bit_model_is_as_long_as_the_row(adapter):
    """Not an MLP's activations, not what norms compute in, not what adapters read."""
    config = hf.Qwen3Config(**SIZES | {"intermediate_size": 96}, head_dim=16)
    model, longest = make(config, torch.bfloat16), {"wide": set(), "float32": set()}
    model = adapted(model) if adapter else model  # whose weights are float32
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    tile_sequences(model)
    T, weights = 40, {p.shape for p in model.parameters()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if (
                    isinstance(t, torch.Tensor)
                    and t.dim() > 1
                    and not {t.shape, t.T.shape if t.dim() == 2 else None} & weights
                ):
                    per_token = t.numel() / T
                    if per_token >= 96:
                        longest["wide"].add((func.__name__, tuple(t.shape)))
                    if t.dtype == torch.float32 and per_token >= 32:
                        longest["float32"].add((func.__name__, tuple(t.shape)))
            return out

    ids = torch.arange(1, T + 1)[None]
    with Watch():
        core = model.get_base_model() if adapter else model
        core.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert longest == {"wide": set(), "float32": set()}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_tile_gives_each_expert_its_tokens(name, adapter):
    model, calls = make(EXPERTS[name](), adapter=adapter), []
    tile_sequences(model)
    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    for module in experts:
        module.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    gradients(model, (1, 20))
    assert calls == [10] * 4 * 2 and len(experts) == 2  # 5 tokens for 4 experts, of which each goes to 2; twice


def test_the_loss_of_the_routing_is_that_of_all_tokens():
    """Which needs the router logits of a row, with their gradient, once."""
    model = make(EXPERTS["mixtral"]())
    ids = torch.arange(1, 41)[None]

    def run():
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return loss.detach(), grads

    whole = run()
    tile_sequences(model)
    agree(run(), whole, rtol=5e-5)
    assert not torch.equal(gradients(model, (1, 40))[1]["model.layers.0.mlp.gate.weight"], whole[1]["lm_head.weight"])


def test_without_a_gradient_nothing_is_kept():
    model = make(MODELS["llama"]())
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        want = model(ids).logits
        tile_sequences(model)
        got = model(ids).logits
    assert got.grad_fn is None
    torch.testing.assert_close(got, want)
    model.requires_grad_(False)
    assert model(ids).logits.grad_fn is None


@pytest.mark.parametrize("frozen", ["layers", "embed_tokens"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen):
    """Weights of an MLP that its input's gradient goes through, and inputs without a gradient of an MLP with trained weights."""
    model = make(MODELS["llama"]())
    getattr(model.model, frozen).requires_grad_(False)
    whole = gradients(model)
    tile_sequences(model)
    tiled = gradients(model)
    assert len(tiled[1]) and not any(frozen in name for name in tiled[1])
    agree(tiled, whole)


def test_a_forward_that_a_module_had_is_run_and_comes_back():
    model, calls = make(MODELS["llama"]()), []
    mlp = model.model.layers[0].mlp
    mlp.forward = own = lambda x: calls.append(x.shape[1]) or type(mlp).forward(mlp, x)
    untile = tile_sequences(model)
    calls.clear()
    gradients(model, (1, 16))
    assert calls == [8] * 4
    untile()
    assert mlp.forward is own


def test_a_copy_of_a_tiled_model_has_weights_of_its_own():
    model = make(MODELS["llama"]())
    tile_sequences(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    agree(gradients(other), gradients(make(MODELS["llama"]())))


def test_tiling_twice_and_short_rows_change_nothing():
    model = make(MODELS["llama"]())
    tile_sequences(model)
    before = [vars(module).get("forward") for module in model.modules()]
    tile_sequences(model)
    assert before == [vars(module).get("forward") for module in model.modules()]
    short, plain = gradients(model, (1, 8)), gradients(make(MODELS["llama"]()), (1, 8))
    assert all(torch.equal(a, b) for a, b in zip(short[1].values(), plain[1].values(), strict=True))


@pytest.mark.parametrize("total, most, want", [(1, 4096, 1), (4096, 4096, 1), (4097, 4096, 2), (12289, 4096, 4)])
def test_tiles_cover_a_row_in_nearly_equal_parts(total, most, want):
    found = tiles(total, most)
    assert [i for tile in found for i in range(tile.start, tile.stop)] == list(range(total))
    sizes = [tile.stop - tile.start for tile in found]
    assert len(found) == want and max(sizes) <= most and max(sizes) - min(sizes) < want * 128


def test_what_cannot_be_tiled_is_refused_and_why():
    noisy = make(EXPERTS["mixtral"](router_jitter_noise=0.1))
    assert "has a jitter noise above 0" in refusal(noisy)
    opt = make(hf.OPTConfig(**{k: v for k, v in SIZES.items() if "key" not in k}, ffn_dim=48, word_embed_proj_dim=32))
    assert "no module named mlp or feed_forward" in refusal(opt)
    bloom = make(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    assert "reads more than hidden states" in refusal(bloom)
    config = LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    random = get_peft_model(make(MODELS["llama"]()), config)
    assert "has a dropout above 0" in refusal(random)
    for model in (noisy, opt, bloom, random):
        with pytest.raises(ValueError, match=r"sequence_tiling: want .* by sequence_tiling='off'"):
            tile_sequences(model)


class Mixing(nn.Module):
    def __init__(self, mixed):
        super().__init__()
        self.mixed = mixed

    def forward(self, x):
        return x + x.mean(1, keepdim=True) if self.mixed == "tokens" else (x, x) if self.mixed == "outputs" else x


@pytest.mark.parametrize("mixed, reason", [("tokens", "mixes tokens"), ("outputs", "does not return hidden states")])
def test_an_mlp_that_mixes_tokens_is_found_by_trying(mixed, reason):
    model = make(MODELS["llama"]())
    model.model.layers[1].mlp = Mixing(mixed)
    assert f"Mixing {reason}" in refusal(model)
    with pytest.raises(ValueError, match=f"Mixing {reason}"):
        tile_sequences(model)
    model.model.layers[1].mlp = Mixing(None)
    tile_sequences(model)


class Broken(nn.Module):
    def forward(self, x):
        return x.view(7, -1)


def test_an_mlp_that_fails_on_a_few_tokens_is_refused_and_trained_whole(tmp_path, monkeypatch):
    """Where nothing asks for tiles it is not even tried."""
    model = build()
    model.model.layers[0].mlp.register_module("gone", Broken())
    monkeypatch.setattr(
        type(model.model.layers[0].mlp), "forward", lambda self, x: self.gone(x) if len(x[0]) < 7 else x
    )
    assert "MLP could not be tried on a few tokens: shape" in refusal(model)
    monkeypatch.setattr(tiling, "_mixes_tokens", None)
    _, logs, trainer = train(tmp_path, triplets(3), model, prefix_sharing="off", num_train_epochs=1)
    assert logs and not trainer.tiled


def is_tiled(trainer):
    core = causal_lm(trainer.model)
    return {getattr(layer.mlp.forward, "func", None) is tiling._in_tiles for layer in core.model.layers} == {True}


CASES = {method: {"method": method} for method in METHODS} | {
    "one by one": {"sequential_backward": "on"},
    "separate rows": {"prefix_sharing": "off"},
    "plain": {"fused": "off"},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("name", CASES)
def test_training_in_tiles_is_that_of_whole_rows(tmp_path, name):
    runs = []
    for switch in ("on", "off"):
        options = {"per_device_train_batch_size": 3, "alpha": 0.3} | CASES[name]
        model = build()
        if options.pop("lora", False):
            model = adapted(model)
        rows = triplets(7, identical=(2,), references=True)
        runs.append(train(tmp_path, rows, model, sequence_tiling=switch, **options))
    (tiled, logs, trainer), (whole, other_logs, other) = runs
    assert trainer.tiled and is_tiled(trainer) and not other.tiled and not is_tiled(other)
    assert (whole[-1] - whole[0]).abs().max() > 1e-3
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in other_logs], rel=1e-4)


@pytest.mark.parametrize("mixed", [None, "tokens"])
def test_auto_takes_tiles_where_a_step_would_not_fit_and_the_model_can(tmp_path, monkeypatch, mixed):
    monkeypatch.setattr(tspin.trainer, "gpu_memory", lambda device: 1)
    model = build()
    if mixed:
        model.model.layers[0].mlp = Mixing(mixed)
    _, _, trainer = train(tmp_path, triplets(3), model, prefix_sharing="off", num_train_epochs=1)
    assert trainer.tiled == is_tiled(trainer) == (mixed is None)


def test_the_trainer_says_why_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(tspin.trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="sequence_tiling: want 'off', got 'on': DeepSpeed ZeRO-3"):
        train(tmp_path, triplets(3), sequence_tiling="on")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_takes_its_tiles_along(checkpointing):
    model = make(MODELS["llama"]())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = gradients(model)
    tile_sequences(model)
    torch._dynamo.reset()
    agree(gradients(torch.compile(model, backend="aot_eager"), of=model), whole)
