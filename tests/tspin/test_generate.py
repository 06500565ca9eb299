"""Generation: the sampled distribution is the policy's, and a response depends on its own row alone."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tspin import generate, scoring
from tspin.collator import TripletCollator
from tspin.data import Example
from tspin.generate import generate_responses, next_tokens, read_generations, row_seed, row_uniforms, sample_responses
from tspin.model import cache_keyword

SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
SMALL |= {"eos_token_id": 1, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral_sliding": MistralConfig(**SMALL, sliding_window=5),
    "gemma2_sliding": Gemma2Config(**SMALL, sliding_window=5),
    "gemma3_sliding": Gemma3TextConfig(**SMALL, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=20, n_positions=128, n_embd=16, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1),
}


def toy_tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1} | {chr(ord("a") + i): i + 2 for i in range(18)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def toy_model(name="llama", sharpness=8.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model


def examples(count=7, longest=9):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(count):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        rows.append(Example(10 * row, "p", "r", torch.randint(2, 20, (length,), generator=generator).tolist(), [1]))
    return rows


def sample(model, rows, **options):
    return sample_responses(model, toy_tokenizer(), rows, **{"seed": 3, "max_new_tokens": 12, **options})


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_batch_that_does_not_fit_names_its_key(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate, "_decode_batch", full)
    wanted = "generation_batch_size: want batches that fit the GPU, got no memory for decoding 3 rows at once; lower it"
    with pytest.raises(ValueError, match=wanted):
        sample_responses(toy_model(), toy_tokenizer(), examples(), seed=0, max_new_tokens=2, batch_size=3)
    monkeypatch.setattr(scoring, "score_batch", full)
    row = {"prompt_ids": [5], "chosen_ids": [6, 2]}
    collator = TripletCollator(pad_token_id=0, members=("chosen",))
    with pytest.raises(ValueError, match=r"per_device_eval_batch_size: want batches .* scoring 8 rows"):
        scoring.score_references(toy_model(), [row], collator)


def test_next_tokens_follow_the_softmax():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    uniforms = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.5):
        drawn = next_tokens(logits.expand(len(uniforms), -1), uniforms, temperature)
        probabilities = (logits.double() / temperature).softmax(-1)
        # 58.3 is the 0.999 quantile of chi-square with 29 degrees of freedom
        kept = probabilities * len(uniforms) > 5
        counts = torch.bincount(drawn, minlength=30).double()
        assert chi_square(counts[kept], probabilities[kept] / probabilities[kept].sum()) < 58.3


def test_next_tokens_is_the_inverse_of_the_distribution_function():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-53], dtype=torch.float64)
    assert next_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 3]


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0
    assert next_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 2, 2]


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(1000, 1)
    uniforms = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    assert set(next_tokens(logits, uniforms, top_k=2).tolist()) == {2, 3}
    assert set(next_tokens(logits, uniforms, top_p=0.6).tolist()) == {2, 3}
    assert set(next_tokens(logits, uniforms, top_p=0.75).tolist()) == {1, 2, 3}
    assert set(next_tokens(logits, uniforms, top_p=0.01).tolist()) == {3}
    counts = torch.bincount(next_tokens(logits, uniforms, top_k=2), minlength=4)
    assert counts[2] == pytest.approx(1000 * 3 / 7, abs=2)
    assert next_tokens(logits[:1], uniforms[:1], temperature=0).tolist() == [3]


def test_sampling_ignores_the_generation_config_of_the_model():
    model = toy_model(sharpness=1.0)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=9.0)
    rows = [Example(row, "", "", [5, 6, 7], [1]) for row in range(4000)]
    drawn = sample(model, rows, max_new_tokens=1, batch_size=1000)
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in drawn]), minlength=20).double()
    with torch.no_grad():
        probabilities = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    # 43.8 is the 0.999 quantile of chi-square with 19 degrees of freedom
    assert chi_square(counts, probabilities) < 43.8


def test_sequences_have_the_log_probability_of_the_policy():
    model = toy_model(sharpness=1.5)
    rows = [Example(row, "", "", [5, 6], [1]) for row in range(3000)]
    pairs = torch.zeros(20, 20, dtype=torch.float64)
    for g in sample(model, rows, max_new_tokens=2, batch_size=1500):
        if len(g.token_ids) == 2:
            pairs[g.token_ids[0], g.token_ids[1]] += 1
    first = pairs.sum(1).argmax()
    with torch.no_grad():
        probabilities = model(torch.tensor([[5, 6, first]])).logits[0, -1].double().softmax(-1)
    kept = probabilities * pairs[first].sum() > 5
    assert kept.sum() > 3
    # at most 19 degrees of freedom
    assert chi_square(pairs[first][kept], probabilities[kept] / probabilities[kept].sum()) < 43.8


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_on_each_row_alone(name):
    model = toy_model(name)
    drawn = sample(model, examples(), temperature=0.0, batch_size=3, max_new_tokens=16)
    for example, generation in zip(examples(), drawn):
        prompt = torch.tensor([example.prompt_ids])
        wanted = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        assert generation.token_ids == wanted[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_response_does_not_depend_on_its_batch(name):
    model = toy_model(name, sharpness=3.0)
    together = sample(model, examples(), batch_size=7)
    assert len({g.finish_reason for g in together} | {len(g.token_ids) for g in together}) > 2
    for batch_size in (1, 2, 3):
        assert sample(model, examples(), batch_size=batch_size) == together
    assert sample(model, examples()[::-1], batch_size=4) == together[::-1]


def test_left_padding_changes_no_logit():
    model, seen = toy_model("gemma2_sliding"), {}

    def watch(logits, uniforms, **options):
        seen.setdefault(len(logits), []).append(logits)
        return next_tokens(logits, uniforms, **options)

    rows = [Example(0, "", "", [4, 5, 6, 7, 8, 9, 10, 11], [1]), Example(1, "", "", [3, 4], [1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "next_tokens", watch)
        sample(model, rows, max_new_tokens=1)
    alone = [model(torch.tensor([row.prompt_ids])).logits[0, -1] for row in rows]
    torch.testing.assert_close(seen[2][0], torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_stop_tokens_end_a_response_once_and_length_adds_none():
    model = toy_model(sharpness=1.0)
    drawn = sample(model, [Example(r, "", "", [5], [1]) for r in range(200)], max_new_tokens=20, batch_size=64)
    reasons = {g.finish_reason for g in drawn}
    assert reasons == {"stop", "length"}
    for g in drawn:
        if g.finish_reason == "stop":
            assert g.token_ids[-1] == 1 and 1 not in g.token_ids[:-1] and len(g.token_ids) <= 20
        else:
            assert 1 not in g.token_ids and len(g.token_ids) == 20
        assert "<eos>" not in g.text
    model.generation_config.eos_token_id = [1, 7]
    assert {g.token_ids[-1] for g in sample(model, examples(40), max_new_tokens=60) if g.finish_reason == "stop"} == {
        1,
        7,
    }


def test_the_draws_of_a_row():
    assert row_seed(42, 7) == int(__import__("hashlib").sha256(b"42:7").hexdigest()[:16], 16) >> 1
    assert len({row_seed(seed, row) for seed in range(30) for row in range(30)}) == 900
    assert torch.equal(row_uniforms(1, 2, 50)[:9], row_uniforms(1, 2, 9))
    model = toy_model(sharpness=2.0)
    longer = sample(model, examples(), max_new_tokens=12)
    for short, long in zip(sample(model, examples(), max_new_tokens=5), longer):
        assert short.token_ids == long.token_ids[:5]
    assert sample(model, examples(), seed=4) != longer


def test_training_mode_and_global_random_state_are_left_alone():
    model = toy_model().train()
    state = torch.get_rng_state()
    sample(model, examples())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def write(directory, rows=None, **options):
    settings = {"seed": 3, "max_new_tokens": 8, "batch_size": 2, "shard_size": 3, **options}
    generate_responses(toy_model(sharpness=3.0), toy_tokenizer(), rows or examples(10), directory, **settings)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_shards_hold_what_was_sampled(tmp_path):
    write(tmp_path)
    assert len(contents(tmp_path)) == 4
    read = read_generations(tmp_path)
    rows = examples(10)
    assert list(read) == [e.row for e in rows]
    assert read[rows[4].row] == sample(toy_model(sharpness=3.0), rows[3:6], max_new_tokens=8, batch_size=2)[1]


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_resumed_run_makes_the_lost_shards_again_and_no_other(tmp_path, monkeypatch, damage):
    write(tmp_path)
    whole = contents(tmp_path)
    victim = sorted(tmp_path.iterdir())[1]
    if damage == "missing":
        victim.unlink()
    else:
        data = victim.read_bytes()
        victim.write_bytes(data[:-9] if damage == "truncated" else data[:-9] + bytes(9))
    (tmp_path / f".{victim.name}.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="shard-00001 is missing or torn; run the command"):
        read_generations(tmp_path)
    calls = []
    real = generate.sample_responses
    monkeypatch.setattr(generate, "sample_responses", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    write(tmp_path)
    assert contents(tmp_path) == whole
    assert calls == [examples(10)[3:6]]


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"temperature": 0.5}, {"max_new_tokens": 9}, {"shard_size": 4}, {"model_id": "other"}]
)
def test_shards_of_another_request_are_refused(tmp_path, change):
    write(tmp_path)
    with pytest.raises(ValueError, match=f"another request .*{next(iter(change)).removesuffix('_id')}: stored"):
        write(tmp_path, **change)
    with pytest.raises(ValueError, match=r"another request .*prompts: stored"):
        write(tmp_path, [*examples(9), Example(500, "", "", [4], [1])])


def test_any_number_of_processes_writes_the_same_shards(tmp_path):
    write(tmp_path / "one")
    for process in (2, 0, 1):
        write(tmp_path / "three", process_index=process, num_processes=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_process_clears_the_remains_of_its_own_shards_alone(tmp_path):
    """The half file of another process may be one that it is writing now."""
    for shard in (0, 1):
        (tmp_path / f".shard-{shard:05d}-0123.parquet.tmp").write_bytes(b"half")
    write(tmp_path, process_index=0, num_processes=2)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".shard-00001-0123.parquet.tmp"]


def test_no_examples_and_no_shards(tmp_path):
    with pytest.raises(ValueError, match="holds no whole shard"):
        read_generations(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"batch_size": 0}],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: want .* got"):
        sample(toy_model(), examples(), **options)


def test_bad_examples_are_named(tmp_path):
    with pytest.raises(ValueError, match="row 0 twice"):
        sample(toy_model(), examples()[:1] * 2)
    with pytest.raises(ValueError, match="empty prompt in row 4"):
        sample(toy_model(), [Example(4, "", "", [], [1])])
    with pytest.raises(ValueError, match="shard_size: want at least 1, got 0"):
        write(tmp_path, shard_size=0)


def test_nan_logits_are_an_error():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN logits"):
        sample(model, examples())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_called_what_the_model_calls_it(name):
    signatures = {
        "past_key_values": lambda input_ids, past_key_values=None: 0,
        "cache": lambda input_ids, cache=None: 0,
    }
    model = torch.nn.Module()
    model.forward = signatures[name]
    assert cache_keyword(model) == name
