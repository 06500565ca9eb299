"""Evaluation: answers, exact match, log-likelihoods against plain logits, fresh pairs and reference columns."""

import dataclasses

import pyarrow as pa
import pytest
import torch
from test_generate import examples, toy_model, toy_tokenizer

from tspin import evaluate as evaluation
from tspin.collator import TripletCollator
from tspin.data import Example
from tspin.evaluate import (
    annotated_logprobs,
    evaluate,
    exact_match,
    extract_answer,
    generate_answers,
    read_references,
    write_references,
)
from tspin.generate import Generation, sample_responses


def held_out(count=6):
    return [dataclasses.replace(e, response_ids=[2 + e.row % 7, 5, 1]) for e in examples(count)]


def plain_logprob(model, prompt, response):
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


@pytest.mark.parametrize(
    "text, pattern, answer",
    [
        ("  12 \n", None, "12"),
        ("a #1 b #2", r"#(\d)", "2"),
        ("a #1 b #2", r"#\d", "#2"),
        ("x=1 y=2 x=3", r"(x|y)=(\d)", "3"),
        ("nothing", r"#(\d)", None),
        ("#", r"#(\d)?", None),
        ("#### 1,000 ", r"####(.*)", "1,000"),
        ("", None, ""),
    ],
)
def test_the_answer_is_the_last_group_of_the_last_match(text, pattern, answer):
    assert extract_answer(text, pattern) == answer


def test_exact_match_counts_ended_responses_with_the_same_answer():
    rows = [Example(i, "", f"so #{i}", [5], [1]) for i in range(4)]
    answers = [
        Generation([1], "stop", "#0"),
        Generation([1], "stop", "first #1 then #7"),
        Generation([5], "length", "#2"),
        Generation([1], "stop", "none"),
    ]
    assert exact_match(rows, answers, r"#(\d)") == 0.25
    assert exact_match(rows[:1], [Generation([1], "stop", " so #0 ")]) == 1.0


def test_an_annotation_without_an_answer_is_named():
    rows = [Example(7, "", "no answer", [5], [1])]
    with pytest.raises(ValueError, match=r"answer_pattern: .* in row 7: 'no answer'"):
        exact_match(rows, [Generation([1], "stop", "")], "#")


def test_log_probs_are_those_of_the_logits():
    model, rows = toy_model(), held_out()
    wanted = [plain_logprob(model, row.prompt_ids, row.response_ids) for row in rows]
    assert annotated_logprobs(model, rows, pad_token_id=0, batch_size=4) == pytest.approx(wanted, abs=1e-4)
    rounded = annotated_logprobs(model, rows, pad_token_id=0, autocast_dtype=torch.bfloat16)
    assert rounded != wanted and rounded == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize("sampled", [True, False])
def test_evaluate_gives_the_same_in_memory_and_from_shards(tmp_path, sampled):
    model, tokenizer, rows = toy_model(sharpness=2.0), toy_tokenizer(), held_out()
    options = {"max_new_tokens": 4, "batch_size": 4, "seed": 3, "sampled": sampled}
    result = evaluate(model, tokenizer, rows, **options)
    generate_answers(model, tokenizer, rows, tmp_path, **options)
    assert evaluate(model, tokenizer, rows, directory=tmp_path, **options) == result
    assert ("exact_match_sampled" in result) == sampled
    logprobs = [plain_logprob(model, e.prompt_ids, e.response_ids) for e in rows]
    assert result["logprob"] == pytest.approx(sum(logprobs) / 6, abs=1e-4)
    assert result["nll_per_token"] == pytest.approx(-sum(logprobs) / 18, abs=1e-4)
    assert result["rows"] == 6


def test_exact_match_is_of_greedy_and_of_sampled_responses():
    model, tokenizer, rows = toy_model(sharpness=3.0), toy_tokenizer(), examples(30)
    greedy = sample_responses(model, tokenizer, rows, seed=3, max_new_tokens=6, temperature=0.0, batch_size=8)
    drawn = sample_responses(model, tokenizer, rows, seed=3, max_new_tokens=6, batch_size=8)
    assert greedy != drawn
    for answers, key in ((greedy, "exact_match"), (drawn, "exact_match_sampled")):
        ended = [g.finish_reason == "stop" for g in answers]
        assert any(ended)
        known = [dataclasses.replace(e, response=g.text) for e, g in zip(rows, answers)]
        assert evaluate(model, tokenizer, known, seed=3, max_new_tokens=6, batch_size=8)[key] == sum(ended) / 30


@pytest.mark.parametrize("length", [1, 9], ids=["short", "long"])
def test_accuracy_is_the_share_of_rows_whose_annotated_answer_is_the_likeliest(length):
    model, tokenizer, rows = toy_model(sharpness=2.0), toy_tokenizer(), held_out(12)
    others = [(("y" * length, [3, 4, 1]), ("z", [5, 1])) if e.row % 20 else (("z", [5, 1]),) for e in rows]
    rows = [
        dataclasses.replace(e, response="abc", response_ids=e.response_ids[i % 3 :], choices=c)
        for i, (e, c) in enumerate(zip(rows, others))
    ]
    result = evaluate(model, tokenizer, rows, max_new_tokens=2, sampled=False, scoring_batch_size=5)
    scores = [
        [(plain_logprob(model, e.prompt_ids, ids), len(text)) for text, ids in (("abc", e.response_ids), *e.choices)]
        for e in rows
    ]
    right = [own[0] > max(s for s, _ in rest) for own, *rest in scores]
    normed = [own[0] / 3 > max(s / n for s, n in rest) for own, *rest in scores]
    assert 0 < sum(right) < 12 and right != normed
    assert (result["accuracy"], result["accuracy_norm"]) == (sum(right) / 12, sum(normed) / 12)
    assert "accuracy" not in evaluate(model, tokenizer, held_out(), max_new_tokens=2, sampled=False)


def test_no_held_out_rows_is_an_error():
    with pytest.raises(ValueError, match="examples: want at least one"):
        evaluate(toy_model(), toy_tokenizer(), [])


def triplets():
    rows = [{"prompt_ids": e.prompt_ids, "chosen_ids": e.response_ids, "rejected_ids": [4, 4]} for e in held_out(7)]
    return pa.Table.from_pylist(rows)


def test_references_come_back_in_order_and_whole_shards_are_kept(tmp_path, monkeypatch):
    model, table, collator = toy_model(), triplets(), TripletCollator(0, ("chosen", "rejected"))
    settings = {"batch_size": 2, "shard_size": 3, "num_processes": 2}
    write_references(model, table, tmp_path, collator, **settings, process_index=0)
    with pytest.raises(ValueError, match="shard-00001 is missing or torn"):
        read_references(tmp_path, table)
    write_references(model, table, tmp_path, collator, **settings, process_index=1)
    scored = read_references(tmp_path, table)
    assert scored.drop_columns(["ref_chosen_logps", "ref_rejected_logps"]) == table
    for row in scored.to_pylist():
        for member in ("chosen", "rejected"):
            wanted = plain_logprob(model, row["prompt_ids"], row[f"{member}_ids"])
            assert row[f"ref_{member}_logps"] == pytest.approx(wanted, abs=1e-4)
    calls = []
    real = evaluation.score_references
    monkeypatch.setattr(evaluation, "score_references", lambda *a, **k: calls.append(a[1]) or real(*a, **k))
    min(tmp_path.glob("shard-00002*")).unlink()
    write_references(model, table, tmp_path, collator, batch_size=2, shard_size=3)
    assert calls == [table.to_pylist()[6:]] and read_references(tmp_path, table) == scored
    with pytest.raises(ValueError, match="another request"):
        write_references(model, table, tmp_path, collator, batch_size=2, shard_size=3, model_id="other")
