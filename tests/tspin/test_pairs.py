"""Pairs: log-probs are those of the logits, rewards those of training, and the share of fresh pairs counts what it says."""

import dataclasses

import pyarrow as pa
import pytest
from test_evaluate import held_out, plain_logprob
from test_generate import toy_model

from tspin.generate import Generation
from tspin.pairs import fresh_summary, pair_table
from tspin.training_args import TSPINConfig

PROTO, SYNTHETIC, FRESH = [3, 4, 1], [6, 1], [7, 8, 9, 1]


def generations(rows, ids):
    return {e.row: Generation(ids, "stop", "") for e in rows}


def made(tmp_path, method, *, with_proto=True, reduction="sum", rows=None, samples=None, initial=None, **options):
    """The pair table of two policies, and the policies; every other row was trained on."""
    rows = held_out() if rows is None else rows
    policies = {3: toy_model(sharpness=2.0), 4: toy_model(sharpness=3.0)}
    args = TSPINConfig(
        str(tmp_path), method=method, logp_reduction=reduction, use_cpu=True, alpha=0.7, lam=0.2, **options
    )
    columns = {"row": [], "prompt_ids": [], "chosen_ids": []} | ({} if method == "sft" else {"rejected_ids": []})
    columns |= {"proto_ids": []} if with_proto else {}
    for e in rows[::2]:
        values = {"row": e.row, "prompt_ids": e.prompt_ids, "chosen_ids": e.response_ids}
        values |= {"rejected_ids": SYNTHETIC, "proto_ids": PROTO}
        for name, column in columns.items():
            column.append(values[name])
    if args.needs_references:
        for member in ("chosen", "rejected", "proto")[: 3 if with_proto and method == "tspin_ref" else 2]:
            columns[f"ref_{member}_logps"] = [
                plain_logprob(policies[3], p, ids) for p, ids in zip(columns["prompt_ids"], columns[f"{member}_ids"])
            ]
    trained = pa.table(columns)
    samples = generations(rows, FRESH) if samples is None else samples
    loaded = []

    def load(t):
        loaded.append(t)
        return policies[t]

    table = pair_table(load, args, 3, trained, rows, samples, initial, pad_token_id=0)
    assert loaded == ([3, 4] if args.needs_references else [4])
    return table.to_pylist(), rows, policies


@pytest.mark.parametrize("method", ["tspin", "tspin_no_history", "tspin_ref", "spin", "sft"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probs_are_of_the_new_policy_and_rewards_those_of_training(tmp_path, method, reduction):
    pairs, rows, policies = made(tmp_path, method, with_proto=method in ("tspin", "tspin_ref"), reduction=reduction)
    known = {e.row: e for e in rows}
    assert [(p["set"], p["row"]) for p in pairs] == [
        *(("trained", e.row) for e in rows[::2]),
        *(("fresh", e.row) for e in rows),
    ]
    for pair in pairs:
        example, is_fresh = known[pair["row"]], pair["set"] == "fresh"
        responses = {"chosen": example.response_ids}
        if method != "sft" or is_fresh:
            responses["rejected"] = FRESH if is_fresh else SYNTHETIC
        if method in ("tspin", "tspin_ref") and not is_fresh:
            responses["proto"] = PROTO
        for member in ("chosen", "rejected", "proto"):
            if member not in responses:
                assert pair[f"logps/{member}"] is pair[f"rewards/{member}"] is pair[f"lengths/{member}"] is None
                continue
            new, old = (plain_logprob(policies[t], example.prompt_ids, responses[member]) for t in (4, 3))
            assert pair[f"logps/{member}"] == pytest.approx(new, abs=1e-4)
            length = len(responses[member])
            assert pair[f"lengths/{member}"] == length
            reward = 0.2 * (new - old) if method == "spin" else 0.7 * (new - (old if method == "tspin_ref" else 0.0))
            wanted = (
                None if method == "sft" else pytest.approx(reward / (length if reduction == "mean" else 1), abs=1e-4)
            )
            assert pair[f"rewards/{member}"] == wanted
        assert pair["identical"] is False


def test_a_sample_of_the_initial_policy_stands_for_the_proto_that_was_not_trained_on(tmp_path):
    initial = generations(held_out(), PROTO)
    for method in ("spin", "tspin_ref", "tspin"):
        pairs, rows, policies = made(tmp_path, method, with_proto=False, initial=initial)
        first = pairs[0]
        assert first["logps/proto"] == pytest.approx(plain_logprob(policies[4], rows[0].prompt_ids, PROTO), abs=1e-4)
        # Without its log-prob under the reference it has no reward.
        assert (first["rewards/proto"] is None) == (method != "tspin")
        assert first["rewards/chosen"] is not None


def test_fresh_pairs_are_counted_without_those_whose_responses_are_the_same(tmp_path):
    rows = held_out()
    rows[0] = dataclasses.replace(rows[0], response_ids=FRESH)
    short = generations(rows[1::2], [1])
    pairs, _, _ = made(tmp_path, "tspin", rows=rows, samples=generations(rows, FRESH) | short)
    assert [p["identical"] for p in pairs] == [False] * 3 + [True] + [False] * 5
    fresh = pairs[4:]
    below = sum(p["logps/chosen"] < p["logps/rejected"] for p in fresh)
    assert 0 < below < 5
    table = pa.Table.from_pylist(pairs)
    assert fresh_summary(table) == {"fresh_share": below / 5, "fresh_identical": pytest.approx(1 / 6), "fresh_rows": 6}
    same = [dataclasses.replace(e, response_ids=FRESH) for e in rows]
    pairs, _, _ = made(tmp_path, "tspin", rows=same)
    assert fresh_summary(pa.Table.from_pylist(pairs)) == {"fresh_identical": 1.0, "fresh_rows": 6}


def test_a_table_made_again_is_the_same_and_rows_that_were_not_asked_for_are_left_out(tmp_path):
    first, rows, _ = made(tmp_path, "tspin")
    assert made(tmp_path, "tspin")[0] == first
    assert {p["row"] for p in first} == {e.row for e in rows}
    few, _, _ = made(tmp_path, "tspin", rows=rows[:3])
    assert [(p["set"], p["row"]) for p in few] == [
        *(("trained", rows[i].row) for i in (0, 2)),
        *(("fresh", e.row) for e in rows[:3]),
    ]
