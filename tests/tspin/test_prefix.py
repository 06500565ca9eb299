"""Prompt sharing: one packed row gives the logits and gradients of separate rows, on every architecture that it accepts."""

import pytest
import torch
import transformers as hf

from tspin.prefix import NAME, PrefixLayout, _attend, layout_inputs, prefix_attention, refusal, share_prompts

LAYOUT = PrefixLayout(((9, (5, 7, 3)), (4, (12, 1, 6))))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ACCEPTED = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen2 windowed": lambda: hf.Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**SIZES),
    "mistral windowed": lambda: hf.MistralConfig(**SIZES, **WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, **WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=8),
    "gpt-oss": lambda: hf.GptOssConfig(**SIZES, **WINDOW, **EXPERTS),
    "phi3": lambda: hf.Phi3Config(**SIZES, **WINDOW),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, **EXPERTS),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
}
REFUSED = {
    "lfm2": lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "llama4": lambda: hf.Llama4TextConfig(**SIZES, num_local_experts=2, intermediate_size_mlp=32),
    "falcon-h1": lambda: hf.FalconH1Config(**SIZES),
    "qwen3-next": lambda: hf.Qwen3NextConfig(**SIZES, num_experts=2, num_experts_per_tok=1),
}


def _build(config):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def _logits_apart(model, ids):
    """Logits of each response's tokens and of the prompt's last, for each response, from separate rows."""
    found, start = [], 0
    for P, lengths in LAYOUT.groups:
        prompt, start = ids[:, start : start + P], start + P
        for L in lengths:
            row, start = torch.cat([prompt, ids[:, start : start + L]], 1), start + L
            found.append(model(row, use_cache=False).logits[0, P - 1 :])
    return found


def _logits_together(model, ids):
    logits, found, start = model(ids, use_cache=False, **layout_inputs(LAYOUT, ids.device)).logits[0], [], 0
    for P, lengths in LAYOUT.groups:
        last, start = logits[start + P - 1 : start + P], start + P
        for L in lengths:
            found.append(torch.cat([last, logits[start : start + L]]))
            start += L
    return found


def _gradients(model, logits, weights):
    model.zero_grad()
    sum((one.log_softmax(-1) * weight).sum() for one, weight in zip(logits, weights)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_packed_row_equals_separate_rows(name, checkpointing):
    model = _build(ACCEPTED[name]())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The ordinary attention that knows soft caps and sinks is eager.
    model.set_attn_implementation("eager" if name in ("gemma2", "gpt-oss") else "sdpa")
    length = sum(P + sum(lengths) for P, lengths in LAYOUT.groups)
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))
    apart = _logits_apart(model, ids)
    weights = [torch.randn(one.shape, generator=torch.Generator().manual_seed(2)) for one in apart]
    want = _gradients(model, apart, weights)
    with share_prompts(model):
        together = _logits_together(model, ids)
        for one, other in zip(apart, together, strict=True):
            assert (one.log_softmax(-1) - other.log_softmax(-1)).abs().max() < 1e-5 * max(1, one.abs().max())
        for one, other in zip(want, _gradients(model, together, weights), strict=True):
            assert (one - other).abs().max() < 1e-5 * max(1.0, one.abs().max())
        again = _logits_apart(model, ids)
    assert all((one - other).abs().max() < 1e-4 for one, other in zip(apart, again, strict=True))


@pytest.mark.parametrize("window", [None, 1, 6])
def test_flex_attention_is_told_to_see_what_the_segments_see(monkeypatch, window):
    """FlexAttention has no backward without a GPU: a plain softmax under the mask that it would get stands in for it."""

    def stand_in(module, query, key, value, attention_mask, *, scaling, softcap, s_aux):
        T = query.shape[2]
        at = torch.arange(T)
        visible = attention_mask.mask_mod(None, None, at[:, None], at)
        assert attention_mask.shape == (1, 1, T, T)
        return _attend(query, key, value, visible, scaling, softcap, s_aux).transpose(1, 2), None

    T = LAYOUT.position_ids().shape[1]
    q, k, v = (torch.randn(1, heads, T, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options = {"prefix_layout": LAYOUT, "softcap": 3.0, "sliding_window": window, "s_aux": torch.randn(4)}
    want, _ = prefix_attention(torch.nn.Module(), q, k, v, None, **options)
    monkeypatch.setattr("tspin.prefix._has_flex", lambda query: True)
    monkeypatch.setattr("tspin.prefix.flex_attention_forward", stand_in)
    got, _ = prefix_attention(torch.nn.Module(), q, k, v, None, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_not_softmax_attention_are_refused(name):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(REFUSED[name]())
    assert refusal(model)
    with pytest.raises(ValueError, match=r"prefix_sharing: .* cannot share prompts: its layers"), share_prompts(model):
        pass


def test_responses_do_not_see_each_other():
    """Changing one response changes no other one's logits; changing the prompt changes them all."""
    model = _build(ACCEPTED["llama"]())
    ids = torch.randint(3, 64, (1, sum(P + sum(lengths) for P, lengths in LAYOUT.groups)))

    def moved(position):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 64
        pairs = zip(before, _logits_together(model, changed), strict=True)
        return [not torch.equal(one, other) for one, other in pairs]

    with share_prompts(model):
        before = _logits_together(model, ids)
        assert moved(9) == [True] + [False] * 5
        assert moved(0) == [True] * 3 + [False] * 3


def test_the_switch_leaves_no_trace(tmp_path):
    model = _build(ACCEPTED["qwen3"]()).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    with share_prompts(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
        model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "eager" and NAME not in (tmp_path / "config.json").read_text()
    with pytest.raises(ZeroDivisionError), share_prompts(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "eager"
