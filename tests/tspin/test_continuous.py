"""Continuous batching: the responses of batched decoding, whatever is scheduled with what."""

import gc

import pytest
import torch
from test_generate import CONFIGS, examples, toy_model, toy_tokenizer
from transformers import MambaConfig, MambaForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from tspin import continuous
from tspin.continuous import sample_continuous
from tspin.data import Example
from tspin.generate import Backend, generate_responses, sample_responses
from tspin.storage import shard_request


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Each manager ends with two collections over all that the tests have imported."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


def both(model, rows, **options):
    settings = {"seed": 3, "max_new_tokens": 12, **options}
    return [sample(model, toy_tokenizer(), rows, **settings) for sample in (sample_continuous, sample_responses)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_responses_are_those_of_batched_decoding(name):
    model = toy_model(name, sharpness=3.0)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=9.0)
    got, wanted = both(model, examples(9), batch_size=4)
    assert got == wanted
    assert len({g.finish_reason for g in got} | {len(g.token_ids) for g in got}) > 2


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}])
def test_sampling_options_mean_the_same(options):
    got, wanted = both(toy_model(sharpness=2.0), examples(), **options)
    assert got == wanted


def test_a_cache_too_small_for_all_requests_changes_no_response(monkeypatch):
    """Requests are then thrown out and prefilled again behind the tokens that they have."""
    real, sizes, resets = continuous.ContinuousBatchingConfig, {"num_blocks": 2, "max_batch_tokens": 64}, []
    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", lambda **options: real(**options | sizes))
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", lambda r: resets.append(1) or again(r))
    model = toy_model(sharpness=1.5)
    with torch.no_grad():
        model.lm_head.weight[1] = 0
    rows = [Example(row, "", "", [4 + row] * (250 + row), [1]) for row in range(3)]
    model.config.max_position_embeddings = 512
    got, wanted = both(model, rows, max_new_tokens=20)
    assert got == wanted and resets


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, share", [(torch.float32, 0.9), (torch.bfloat16, 0.5)])
def test_a_gpu_gives_the_responses_of_batched_decoding(dtype, share):
    """But for draws within the rounding of two logits, of which bfloat16 has more; a response goes its own way from there on."""
    model, rows = toy_model(sharpness=3.0).to("cuda", dtype), examples(64, 40)
    got, wanted = both(model, rows, batch_size=16, max_new_tokens=32)
    assert sum(a == b for a, b in zip(got, wanted)) >= share * len(rows)
    assert len({len(g.token_ids) for g in got}) > 5


def test_a_gpu_is_asked_for_no_more_than_the_requests_need():
    model = toy_model()
    page = 2 * 256 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 4
    lengths = [10, 300, 20, 600]  # the longest two: 3 and 4 blocks, one of each to spare
    for free, blocks in ((None, 7), (15 * page, 7), (14 * page, None)):
        limits = continuous._limits(model, lengths, 2, free)
        assert limits["max_requests_per_batch"] == 2 and limits.get("num_blocks") == blocks


def test_it_leaves_model_and_random_state_as_they_were():
    model = toy_model().train()
    state, attention = torch.get_rng_state(), model.config._attn_implementation
    both(model, examples(2))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert model.config._attn_implementation == attention


def test_shards_name_the_backend_and_are_not_mixed_with_others(tmp_path):
    model, settings = toy_model(sharpness=3.0), {"seed": 3, "max_new_tokens": 8, "shard_size": 3}
    backend = Backend(sample_continuous, {"backend": "continuous"})
    generate_responses(model, toy_tokenizer(), examples(4), tmp_path, backend=backend, **settings)
    assert shard_request(tmp_path)["backend"] == "continuous"
    with pytest.raises(ValueError, match=r"another request \(.*backend: stored 'continuous', wanted 'transformers'"):
        generate_responses(model, toy_tokenizer(), examples(4), tmp_path, **settings)


def test_nan_logits_are_an_error():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN logits"):
        sample_continuous(model, toy_tokenizer(), examples(2), seed=3, max_new_tokens=4)


def test_what_cannot_be_batched_continuously_is_refused_with_the_remedy():
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**small, eos_token_id=1, pad_token_id=0))
    with pytest.raises(ValueError, match=r"generation_backend: .* set generation_backend: transformers"):
        both(model, examples(2))
    with pytest.raises(ValueError, match=r"autocast_dtype: want the model's own torch.float32, got torch.bfloat16"):
        both(toy_model(), examples(2), autocast_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="row 0 twice"):
        sample_continuous(toy_model(), toy_tokenizer(), examples(1) * 2, seed=3, max_new_tokens=4)


def test_a_transformers_that_ignores_our_draws_is_refused(monkeypatch):
    """Its own choice would be greedy, and look like a response."""
    real = continuous.ContinuousBatchingLogitsProcessorList

    def deaf(processors):
        made = real(processors)
        made.prepare_tensor_args = lambda requests_in_batch, arg_storage: arg_storage
        return made

    monkeypatch.setattr(continuous, "ContinuousBatchingLogitsProcessorList", deaf)
    with pytest.raises(ValueError, match="not known to work with transformers"):
        sample_continuous(toy_model(), toy_tokenizer(), examples(2), seed=3, max_new_tokens=4)
