"""Loading, the output head of many architectures, and scores against the models' own logits on separate unpadded rows."""

import copy
import inspect
import logging

import pytest
import torch
import transformers as tf
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tspin.collator import TripletCollator
from tspin.loading import load_model, load_tokenizer
from tspin.model import disable_dropout, head_of, install_scoring, probe_head, score_batch
from tspin.scoring import score_references

V = 61
SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"head_dim": 16}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
OPT = {"vocab_size": V, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "llama_tied": tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": tf.Qwen2Config(**SMALL),
    "qwen3": tf.Qwen3Config(**SMALL, **HEADS),
    "qwen3_moe": tf.Qwen3MoeConfig(**SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral": tf.MistralConfig(**SMALL, sliding_window=4),
    "gemma2": tf.Gemma2Config(**SMALL, **HEADS, sliding_window=4),
    "gemma3": tf.Gemma3TextConfig(**SMALL, **HEADS, sliding_window=4, final_logit_softcapping=12.0),
    "cohere": tf.CohereConfig(**SMALL, logit_scale=0.25),
    "cohere2": tf.Cohere2Config(**SMALL, logit_scale=0.5, sliding_window=4),
    "granite": tf.GraniteConfig(**SMALL, logits_scaling=8.0),
    "phi3": tf.Phi3Config(**SMALL),
    "olmo2": tf.Olmo2Config(**SMALL),
    "gpt_neox": tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "starcoder2": tf.Starcoder2Config(**SMALL),
    "opt": tf.OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=64),
    "gpt2": tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gptj": tf.GPTJConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64, rotary_dim=8),
    "phi": tf.PhiConfig(**SMALL),
    "falcon": tf.FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "falcon_h1": tf.FalconH1Config(**SMALL, **FALCON_H1, lm_head_multiplier=0.3),
    "recurrent_gemma": tf.RecurrentGemmaConfig(**SMALL, lru_width=32, attention_window_size=8, logits_soft_cap=15.0),
}
DROPOUTS = {
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "starcoder2": {"embedding_dropout": 0.5, "residual_dropout": 0.5, "attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "gptj": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5},
}
COLLATOR = TripletCollator(pad_token_id=0, members=("chosen", "rejected", "proto"))


def build(name, seed=0, **changes):
    """A randomly initialised model whose head and biases are large enough for logits far from 0."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(8)
        if head.bias is not None:
            head.bias.normal_()
    return model


def triplets(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(3, V, (k,), generator=generator).tolist()
    return [
        {"prompt_ids": draw(2 + i % 3), "chosen_ids": draw(3), "rejected_ids": draw(1 + i), "proto_ids": draw(5)}
        for i in range(n)
    ]


def own_scores(model, features):
    """[B, 3] log-probs and entropies from the model's logits, one unpadded row at a time."""
    logps, entropies = [], []
    for feature in features:
        for member in COLLATOR.members:
            prompt, response = feature["prompt_ids"], feature[f"{member}_ids"]
            ids = torch.tensor([prompt + response])
            every = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            every = every[len(prompt) - 1 : -1]
            logps.append(every[range(len(response)), response].sum())
            entropies.append(-(every.exp() * every).sum())
    return torch.stack(logps).view(-1, 3), torch.stack(entropies).view(-1, 3)


def a_loss(sequences):
    spread = sequences.logprobs @ torch.tensor([-1.0, 0.7, 0.4], dtype=sequences.logprobs.dtype)
    return torch.nn.functional.softplus(spread) - 0.05 * (sequences.entropy / sequences.lengths).sum(1)


def assert_same_gradients(model, reference):
    wanted = [p.grad for p in reference.parameters() if p.requires_grad]
    names, got = zip(*((n, p.grad) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    scale = max(g.abs().max().item() for g in wanted if g is not None)
    assert scale > 0
    for name, have, want in zip(names, got, wanted, strict=True):
        if want is None:
            assert have is None or not have.any(), name
        else:
            torch.testing.assert_close(
                have, want, rtol=2e-4, atol=2e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


def check_against_own_logits(model, fused=True):
    """Scores, entropies, loss and all gradients of `model` equal those of a copy that is only asked for logits."""
    reference, features = copy.deepcopy(model).eval(), triplets(3)
    install_scoring(model)
    loss, sequences = score_batch(model, COLLATOR(features), a_loss, entropy="grad", fused=fused)
    logps, entropies = own_scores(reference, features)
    torch.testing.assert_close(sequences.logprobs, logps.detach(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(sequences.entropy, entropies.detach(), rtol=2e-4, atol=2e-4)
    want = a_loss(type(sequences)(logps, entropies, sequences.lengths)).mean()
    torch.testing.assert_close(loss, want, rtol=2e-4, atol=2e-4)
    loss.backward()
    want.backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(name):
    model = build(name)
    probe_head(model)
    check_against_own_logits(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_the_plain_path_gives_the_same(name):
    check_against_own_logits(build(name), fused=False)


TRANSFORMED = ("gemma2", "gemma3", "cohere", "cohere2", "granite", "falcon_h1", "recurrent_gemma")


@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_probe_refuses_a_transform_that_the_config_does_not_tell(name, monkeypatch):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name])
    probe_head(model)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self: tf.PretrainedConfig())
    assert head_of(model).softcap is None and head_of(model).logit_scale == 1.0
    with pytest.raises(ValueError, match="fused='off'"):
        probe_head(model)


def test_the_probe_refuses_changes_to_hidden_states_and_config_keys_that_the_model_ignores():
    model = build("llama")
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    with pytest.raises(ValueError, match="cannot be scored through its output head"):
        probe_head(model)
    hook.remove()
    probe_head(model)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="cannot be scored through its output head"):
        probe_head(model)


def test_the_probe_leaves_the_model_as_it_was():
    model = build("llama").train()
    probe_head(model)
    assert model.training and not model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_head_is_refused():
    with pytest.raises(ValueError, match="output head"):
        probe_head(build("llama").model)


def test_forward_without_a_request_is_unchanged_and_a_copy_scores_itself():
    model = build("qwen2")
    ids = torch.arange(1, 7)[None]
    before = model(input_ids=ids, labels=ids)
    install_scoring(model)
    install_scoring(model)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    batch = COLLATOR(triplets(2))
    _, uniform = score_batch(clone, batch, lambda s: s.logprobs[:, 0])
    expected = -batch["lengths"] * torch.log(torch.tensor(float(V)))
    torch.testing.assert_close(uniform.logprobs, expected)
    assert not clone(input_ids=ids).logits.any() and torch.equal(model(input_ids=ids).logits, before.logits)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_off_in_training_mode(name):
    model = build(name, **DROPOUTS[name]).train()
    features = triplets(2)
    batch = COLLATOR(features)
    noisy = [model(input_ids=batch["input_ids"]).logits for _ in range(3)]
    assert not torch.equal(noisy[0], noisy[1]) or not torch.equal(noisy[0], noisy[2])
    install_scoring(model)
    _, first = score_batch(model, batch, lambda s: s.logprobs[:, 0])
    model.eval()
    _, second = score_batch(model, batch, lambda s: s.logprobs[:, 0])
    assert torch.equal(first.logprobs, second.logprobs)


def test_references_are_the_scores_in_order_without_gradient():
    model, features = build("gemma2").train(), triplets(5)
    columns = score_references(model, features, COLLATOR, batch_size=2)
    logps, _ = own_scores(copy.deepcopy(model).eval(), features)
    got = torch.tensor([columns[f"ref_{member}_logps"] for member in COLLATOR.members]).T
    torch.testing.assert_close(got, logps.detach(), rtol=2e-4, atol=2e-4)
    assert model.training and all(p.grad is None for p in model.parameters())


class Watch(TorchDispatchMode):
    """Fails on any tensor of at least `limit` elements."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            assert not isinstance(tensor, torch.Tensor) or tensor.numel() < self.limit, f"{func}: {list(tensor.shape)}"
        return out


def scored_under_watch(fused):
    config = tf.LlamaConfig(**SMALL | {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 1009})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config)
    install_scoring(model)
    batch = COLLATOR(triplets(12, seed=1))
    N = len(batch["targets"])
    assert N > 2 * 8, "the head's own gradient [V, D] must stay below the limit"
    with Watch(N * 1009 // 2):
        loss, _ = score_batch(model, batch, a_loss, entropy="grad", fused=fused, memory_budget=200_000)
        loss.backward()


def test_no_tensor_of_all_logits_exists_on_the_fused_path():
    scored_under_watch(fused=True)


def test_the_watch_sees_the_logits_of_the_plain_path():
    with pytest.raises(AssertionError, match="1009"):
        scored_under_watch(fused=False)


def lora(**options):
    return LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.5},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=lambda o: "-".join(f"{k}_{v}" for k, v in o.items()),
)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_lora_is_exact(name, options):
    torch.manual_seed(3)
    model = get_peft_model(build(name, tie_word_embeddings=False), lora(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    install_scoring(model)
    probe_head(model)
    check_against_own_logits(model)


def test_an_adapter_added_without_a_wrapper_is_exact():
    model = build("llama")
    try:
        model.add_adapter(lora(target_modules=["q_proj", "lm_head"]))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"this transformers refuses the installed peft: {error}")
    check_against_own_logits(model)


def test_disabled_and_merged_adapters_of_the_head_are_followed():
    torch.manual_seed(3)
    model = get_peft_model(build("llama"), lora(target_modules=["lm_head"]))
    with model.disable_adapter():
        check_scores_only(model)
    check_scores_only(model)
    model.merge_adapter()
    check_scores_only(model)


def check_scores_only(model):
    install_scoring(model)
    features = triplets(2)
    with torch.no_grad():
        _, sequences = score_batch(model, COLLATOR(features), lambda s: s.logprobs[:, 0])
        torch.testing.assert_close(sequences.logprobs, own_scores(model, features)[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["lm_head"], use_dora=True),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=["dora", "ia3"],
)
def test_other_adapters_on_the_head_are_refused(config):
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="plain LoRA on the output head"):
        probe_head(model)
    check_against_own_logits(model, fused=False)


def test_prompt_learning_is_refused():
    model = get_peft_model(build("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt learning"):
        install_scoring(model)


def test_a_model_survives_saving_and_loading(tmp_path):
    model = build("gemma2")
    install_scoring(model)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.dtype == torch.float32 and type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert load_model(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_a_pickled_checkpoint_is_refused_before_it_is_read(tmp_path):
    build("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*convert to safetensors"):
        load_model(str(tmp_path))


def test_damaged_incomplete_and_absent_checkpoints_are_refused(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model_name_or_path: cannot load"):
        load_model(str(tmp_path))
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks the weights.*layers\.1\.mlp"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="model_name_or_path: cannot load"):
        load_model(str(tmp_path / "nowhere"))


def toy_tokenizer(**special):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_a_missing_padding_token_becomes_the_end_token(tmp_path, caplog):
    toy_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "ends")
    with caplog.at_level(logging.INFO, logger="tspin.loading"):
        tokenizer = load_tokenizer(str(tmp_path / "ends"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert "padding token" in caplog.text
    toy_tokenizer(pad_token="a").save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="end token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_dropout_off_is_logged_once(caplog):
    model = build("gpt2", resid_pdrop=0.3)
    with caplog.at_level(logging.INFO, logger="tspin.model"):
        disable_dropout(model)
        disable_dropout(model)
    assert caplog.text.count("dropout set to 0") == 1
