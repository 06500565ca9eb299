"""Sampling from a real `transformers serve` on the loopback, killed with -9 and started again while it is asked."""

import os
import random
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from test_data import make_tokenizer
from test_generate import contents
from test_loop import toy_config
from test_remote import is_alive
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tspin import remote
from tspin.completions import Text
from tspin.config import SelfPlayConfig
from tspin.data import Example
from tspin.generate import generate_responses, read_generations, row_seed, sample_responses
from tspin.loading import load_model, load_tokenizer
from tspin.loop import SelfPlay
from tspin.remote import Server
from tspin.server import free_port
from tspin.storage import read_json, shard_request

pytest.importorskip("uvicorn", reason="transformers serve needs the extra `test`")
SERVE = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
OPTIONS = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
WORDS = {"<eos>": 0} | {character: i + 1 for i, character in enumerate("0123456789+=")}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model whose only special token ends a response, with a generation config that must take no part."""
    directory = tmp_path_factory.mktemp("policy")
    core = Tokenizer(models.WordLevel(WORDS, unk_token="="))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>").save_pretrained(directory)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.6, **small, **special))
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.5, repetition_penalty=4.0)
    model.save_pretrained(directory)
    lines = [f'{{"prompt": "{a}+{b}=", "response": "{a + b}"}}\n' for a in range(3) for b in range(4)]
    (directory / "train.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No server asks anything of a hub, or looks for a newer version of itself."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_UPDATE_CHECK", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


class Serve:
    """A server that somebody else runs: `start` returns at once."""

    def __init__(self, policy, log):
        self.policy, self.log, self.port, self.process = policy, log, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        with open(self.log, "ab") as log:
            words = [*SERVE, str(self.policy), *OPTIONS, "--port", str(self.port)]
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self):
        for _ in range(1200):
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-500:]
                time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-500:])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def rows(count):
    return [Example(7 * r, "", "", [WORDS[c] for c in f"{r % 10}+{r // 10}="], [0]) for r in range(count)]


def generate(policy, url, directory, **options):
    keys = {"model_name_or_path": str(policy), "dataset": "none", "generation_backend": "openai"}
    keys |= {"generation_url": url, "generation_protocol": "text", "generation_concurrency": 1, "generation_wait": 120}
    tokenizer = load_tokenizer(str(policy))
    server = Server(
        SelfPlayConfig.from_dict(keys), tokenizer, lambda: load_model(str(policy)), weights=str(policy), log=directory
    )
    settings = {"seed": 3, "max_new_tokens": 10, "shard_size": 6, "backend": server.backend, **options}
    generate_responses(None, tokenizer, rows(16), directory, **settings)


def test_killed_and_started_again_it_gives_the_shards_of_one_that_was_not(policy, tmp_path, monkeypatch, offline):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.5)
    serve = Serve(policy, tmp_path / "serve.log")
    try:
        serve.start()
        serve.wait()
        generate(policy, serve.url, tmp_path / "calm")
        generate(policy, serve.url, tmp_path / "greedy", temperature=0.0)
        pids, asked, real = [serve.process.pid], [], Server._post

        async def post(self, client, body):
            asked.append(body)
            if len(asked) == 13:  # in the second shard
                serve.kill()
                serve.start()
                pids.append(serve.process.pid)
            return await real(self, client, body)

        monkeypatch.setattr(Server, "_post", post)
        generate(policy, serve.url, tmp_path / "shaken")
        assert len(set(pids)) == 2 and len(asked) > 16 + 3 * 4
    finally:
        serve.kill()
    assert contents(tmp_path / "shaken") == contents(tmp_path / "calm") != {}
    assert shard_request(tmp_path / "calm")["protocol"] == "text"
    read = read_generations(tmp_path / "shaken")
    assert list(read) == [example.row for example in rows(16)]
    model, tokenizer = load_model(str(policy)), load_tokenizer(str(policy))
    wanted = sample_responses(model, tokenizer, rows(16), seed=0, max_new_tokens=10, temperature=0.0)
    assert list(read_generations(tmp_path / "greedy").values()) == wanted != list(read.values())
    for example in rows(16):  # what the server does with a seed, step by step, by the policy alone
        torch.manual_seed(row_seed(3, example.row) >> 32)
        ids = list(example.prompt_ids)
        for _ in range(11):
            with torch.no_grad():
                ids.append(int(torch.multinomial(model(torch.tensor([ids])).logits[0, -1].softmax(-1), 1)))
            if ids[-1] == 0:
                break
        assert read[example.row].token_ids == ids[len(example.prompt_ids) :][:10]
    assert {g.finish_reason for g in read.values()} == {"stop", "length"}


@pytest.mark.soak
def test_the_loop_over_transformers_serve_killed_at_random_is_the_loop_undisturbed(
    policy, tmp_path, monkeypatch, offline
):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.5)
    (tmp_path / "test.jsonl").write_text("".join((policy / "train.jsonl").open().readlines()[:4]))
    command = " ".join([*SERVE, "{model}", *OPTIONS, "--port", "{port}"])
    keys = {"generation_backend": "openai", "generation_server_command": command, "generation_protocol": "text"}
    keys |= {"generation_concurrency": 1, "generation_wait": 120, "num_train_epochs": 1, "iterations": 2}
    keys |= {"dataset": str(policy / "train.jsonl"), "model_name_or_path": str(policy)}
    results, pids, draw, real = [], set(), random.Random(0), Server._post
    for name in ("calm", "shaken"):

        async def post(self, client, body, name=name):
            pids.add(self._process.pid)
            if name == "shaken" and draw.random() < 0.06 and self._restarts < 2:
                os.killpg(self._process.pid, signal.SIGKILL)
            return await real(self, client, body)

        monkeypatch.setattr(Server, "_post", post)
        results.append(SelfPlay(toy_config(tmp_path, tmp_path / name, **keys)).run())
    assert len(pids) > 12 and not [pid for pid in pids if is_alive(pid)]
    assert results[0].model_hash == results[1].model_hash
    assert read_json(results[0].model_dir.parent / "eval.json") == read_json(results[1].model_dir.parent / "eval.json")


def protocol(tokenizer, stop_ids=(0,)):
    return Text("toy", tokenizer, stop_ids, len(WORDS))


def answer(text, count, reason="stop"):
    return {
        "model": "toy@main",
        "choices": [{"text": text, "finish_reason": reason}],
        "usage": {"completion_tokens": count},
    }


def test_text_is_encoded_to_the_tokens_it_shows(policy):
    text, (example,) = protocol(load_tokenizer(str(policy))), rows(1)
    whole = text.read(answer("12=", 4), example, 4)
    assert (whole.token_ids, whole.stopped, whole.is_exact) == ([2, 3, 12, 0], True, True)
    # Asked for five, so that four and an end are told from four that go on.
    cut = text.read(answer("12=34", 5, "length"), example, 4)
    assert (cut.token_ids, cut.stopped, cut.is_exact) == ([2, 3, 12, 4], False, True)
    last = text.read(answer("12=3", 5, "length"), example, 4)
    assert (last.token_ids, last.stopped, last.is_exact) == ([2, 3, 12, 4], False, True)
    assert not text.read(answer("12", 4), example, 4).is_exact
    assert text.read(answer("", 1), example, 4).token_ids == [0]
    with pytest.raises(ValueError, match="the response to row 0 has only special tokens"):
        text.read(answer("", 5, "length"), example, 4)
    with pytest.raises(ValueError, match=r"generation_backend: the server cut row 0 after 2 of 4 tokens"):
        text.read(answer("12", 2, "length"), example, 4)
    # A policy may spell an end token in ordinary ones.
    letters = protocol(make_tokenizer(), (2,))
    spelled = letters.read(answer(f"a{letters.tokenizer.eos_token}b", 7), example, 8)
    assert spelled.token_ids[-1] == 2 and 2 not in spelled.token_ids[:-1] and spelled.is_exact
    assert letters.tokenizer.decode(spelled.token_ids[:-1]) == f"a{letters.tokenizer.eos_token}b"
    for bad in (
        answer("1\ud800", 3),
        answer(None, 3),
        answer("1", "3"),
        answer("1", 9),
        {"model": "toy", "choices": [{"finish_reason": "stop"}]},
    ):
        with pytest.raises(remote.AgainError):
            text.read(bad, example, 4)


def test_texts_are_compared_where_tokens_cannot_be(policy):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.add_tokens(["12"])
    text = protocol(tokenizer)
    merged = text.read(answer("12=", 4), rows(1)[0], 8)
    ours = [WORDS["1"], WORDS["2"], WORDS["="], 0]
    assert merged.token_ids != ours
    assert all(text.agrees(merged, ours, step) for step in range(4))
    assert not text.agrees(merged, [WORDS["1"], WORDS["3"]], 1)
    assert not text.agrees(merged, [WORDS["1"], 0], 1)
    longer = text.read(answer("12=3", 9, "length"), rows(1)[0], 8)
    assert not text.agrees(longer, ours, 3)


def test_a_prompt_that_text_cannot_say_is_refused(policy):
    tokenizer = load_tokenizer(str(policy))
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert protocol(tokenizer).request(rows(1)[0], 0, 4, sampling)["prompt"] == "0+0="
    tokenizer.add_tokens(["+1"])
    with pytest.raises(ValueError, match=r"generation_protocol: the prompt of row 5 does not survive decoding"):
        protocol(tokenizer).request(Example(5, "", "", [WORDS["+"], WORDS["1"]], [0]), 0, 4, sampling)
