"""Sampling over HTTP: whatever goes wrong on the way, the shards are those of an undisturbed run, or there are none."""

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import anyio
import pytest
import torch
from completions_server import FAULTS, SLOW_FAULTS, PolicyServer
from test_distributed_loop import launch
from test_generate import contents, examples, toy_model, toy_tokenizer
from test_loop import make_toy, outcome, toy_config

from tspin import remote, storage
from tspin.cli import main
from tspin.completions import AgainError, Answer, TokenIds
from tspin.config import SelfPlayConfig
from tspin.data import Example
from tspin.generate import generate_responses, read_generations, row_seed, sample_responses
from tspin.loading import load_model, load_tokenizer
from tspin.loop import SelfPlay
from tspin.remote import Server
from tspin.server import ServerProcess, command_words
from tspin.storage import shard_request

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "LONGEST_ASKED_PAUSE", 0.02)


def completion_of(model, tokenizer, body):
    """What vLLM answers: the body's own sampling of the prompt's ids, a function of its seed."""
    prompt, options = body["prompt"], {name: body[name] for name in ("seed", "temperature", "top_p")}
    example = Example(0, "", "", prompt, [1])
    (made,) = sample_responses(model, tokenizer, [example], max_new_tokens=body["max_tokens"], **options)
    choice = {"index": 0, "text": made.text, "finish_reason": made.finish_reason, "token_ids": made.token_ids}
    choice |= {"stop_reason": None, "prompt_token_ids": prompt}
    if body.get("logprobs"):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + made.token_ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(made.token_ids)[:, None])[:, 0].tolist()
        choice["logprobs"] = {"token_logprobs": logprobs}
    return {"id": "0", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": {}}


def toy_server(model=None, **options):
    model, tokenizer = model or toy_model(sharpness=3.0), toy_tokenizer()
    return PolicyServer(lambda body, headers: completion_of(model, tokenizer, body), **options)


def config_of(url, **changes):
    keys = {"model_name_or_path": "toy", "dataset": "none", "generation_backend": "openai", "generation_url": url}
    return SelfPlayConfig.from_dict(keys | {"generation_timeout": 5, "generation_wait": 5} | changes)


def generate(url, directory, rows=None, load=lambda: toy_model(sharpness=3.0), **changes):
    server = Server(config_of(url, **changes), toy_tokenizer(), load, weights="toy", log=directory / "server.log")
    try:
        settings = {"seed": 3, "max_new_tokens": 8, "shard_size": 3, "backend": server.backend}
        generate_responses(None, toy_tokenizer(), rows or examples(7), directory, **settings)
    finally:
        server.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    with toy_server() as server:
        generate(server.url, directory)
    return contents(directory)


def test_responses_are_the_servers_token_ids_in_shards_that_say_so(tmp_path):
    with toy_server() as server:
        generate(server.url, tmp_path)
    request, read = shard_request(tmp_path), read_generations(tmp_path)
    assert (request["backend"], request["protocol"]) == ("openai", "token_ids")
    tokenizer, model = toy_tokenizer(), toy_model(sharpness=3.0)
    for example in examples(7):
        options = {"seed": row_seed(3, example.row) >> 32, "max_new_tokens": 8}
        alone = Example(0, "", "", example.prompt_ids, [1])
        assert [read[example.row]] == sample_responses(model, tokenizer, [alone], **options)
    assert {g.finish_reason for g in read.values()} == {"stop", "length"}


def test_a_request_leaves_nothing_to_the_servers_defaults(tmp_path):
    with toy_server() as server:
        generate(server.url, tmp_path)
        bodies = [body for body in server.requests if "logprobs" not in body]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 8, "stop_token_ids": [1]}
    neutral |= {"return_token_ids": True, "model": "toy"}
    assert len(bodies) == 7
    for body in bodies:
        assert neutral.items() <= body.items()
    assert sorted(b["prompt"] for b in bodies) == sorted(e.prompt_ids for e in examples(7))
    assert len({b["seed"] for b in bodies}) == 7 and max(b["seed"] for b in bodies) < 2**31


@pytest.mark.parametrize("concurrency", [1, 2, 64])
def test_concurrency_changes_no_shard(tmp_path, undisturbed, concurrency):
    waiting, most, lock = 0, 0, threading.Lock()

    def gate(number):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        time.sleep(0.03)
        with lock:
            waiting -= 1

    with toy_server(gate=gate) as server:
        generate(server.url, tmp_path, generation_concurrency=concurrency)
    assert contents(tmp_path) == undisturbed
    assert most <= min(concurrency, 3) and (most > 1) == (concurrency > 1)


def schedule(seed):
    """Faults by request number; a row is asked again a few times only, so no run of them may be too long."""
    draw = random.Random(seed)
    return {number: draw.choice(FAULTS) for number in range(60) if draw.random() < 0.35}


@pytest.mark.parametrize("faults", [{3 * n: fault for n, fault in enumerate(FAULTS)}, *map(schedule, range(2))])
def test_after_faults_the_shards_are_those_of_an_undisturbed_run(tmp_path, undisturbed, faults):
    with toy_server(faults=faults) as server:
        generate(server.url, tmp_path, generation_concurrency=2)
        assert len(server.requests) > len(undisturbed)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("fault", SLOW_FAULTS)
def test_a_server_that_hangs_or_drips_is_asked_again(tmp_path, undisturbed, caplog, fault):
    caplog.set_level(logging.INFO)
    with toy_server(faults={4: fault}) as server:
        generate(server.url, tmp_path, generation_timeout=1)
    assert "no answer within 1 s (generation_timeout)" in caplog.text
    assert contents(tmp_path) == undisturbed


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 300))
def test_after_many_schedules_of_faults_the_shards_are_those_of_an_undisturbed_run(tmp_path, undisturbed, seed):
    faults = schedule(seed)
    draw = random.Random(seed)
    faults |= {number: draw.choice(SLOW_FAULTS) for number in range(60) if draw.random() < 0.03}
    with toy_server(faults=faults) as server:
        generate(server.url, tmp_path, generation_concurrency=draw.choice([1, 2, 5]), generation_timeout=1.0)
    assert contents(tmp_path) == undisturbed


def test_asking_again_is_bounded_in_number_and_in_time(tmp_path):
    with (
        toy_server(faults=dict.fromkeys(range(100), "500")) as server,
        pytest.raises(ValueError, match=r"no usable answer from the server at .* HTTP 500: out of order"),
    ):
        generate(server.url, tmp_path)
    assert len(server.requests) == remote.TRIES
    with (
        toy_server(faults=dict.fromkeys(range(10_000), "503")) as server,
        pytest.raises(ValueError, match=r"no usable answer .* HTTP 503"),
    ):
        generate(server.url, tmp_path, generation_wait=0.2)
    assert len(server.requests) > remote.TRIES
    with pytest.raises(ValueError, match=r"no usable answer .* ConnectError"):
        generate("http://127.0.0.1:1/v1", tmp_path, generation_wait=0.2)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("model", "generation_model: want 'toy', the server answers as \"somebody else's\""),
        ("400", "refuses: HTTP 400: out of order"),
        ("401", "refuses: HTTP 401: out of order; set TSPIN_SERVER_KEY in the environment"),
    ],
)
def test_what_asking_again_would_not_mend_ends_the_run_at_once(tmp_path, undisturbed, fault, message):
    """Request 11 is of the second shard: the first stays, and the same command goes on from there."""
    with toy_server(faults={11: fault}) as server:
        with pytest.raises(ValueError, match=message):
            generate(server.url, tmp_path, generation_concurrency=1)
        assert len(server.requests) == 12
        assert list(contents(tmp_path)) == list(undisturbed)[:1]
        generate(server.url, tmp_path)
    assert contents(tmp_path) == undisturbed


def other_weights():
    model = toy_model(sharpness=3.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    return model


def test_a_server_of_other_weights_is_refused_before_a_row_is_asked_for(tmp_path):
    with (
        toy_server(other_weights()) as server,
        pytest.raises(ValueError, match="does not serve toy: its log-probs differ"),
    ):
        generate(server.url, tmp_path)
    assert all("logprobs" in body for body in server.requests) and contents(tmp_path) == {}


def test_without_log_probs_greedy_tokens_tell_the_weights_apart(tmp_path, undisturbed):
    def silent(model):
        def answer(body, headers):
            completion = completion_of(model, tokenizer, body)
            completion["choices"][0].pop("logprobs", None)
            return completion

        return answer

    tokenizer = toy_tokenizer()
    with PolicyServer(silent(toy_model(sharpness=3.0))) as server:
        generate(server.url, tmp_path)
    assert contents(tmp_path) == undisturbed
    flipped = toy_model(sharpness=3.0)
    with torch.no_grad():
        flipped.lm_head.weight.mul_(-1)
    with PolicyServer(silent(flipped)) as server:
        with pytest.raises(ValueError, match="none of its first greedy tokens is ours"):
            generate(server.url, tmp_path / "flipped")
        with pytest.raises(ValueError, match=r"its greedy token \d for row \d+ is not ours"):
            generate(server.url, tmp_path / "flipped", generation_tolerance=0.01)


def test_a_difference_of_precision_is_within_the_tolerance(tmp_path):
    low = toy_model(sharpness=3.0).to(torch.bfloat16)
    with toy_server(low) as server:
        generate(server.url, tmp_path)
        with pytest.raises(ValueError, match=r"does not serve .* raise generation_tolerance \(1e-06\)"):
            generate(server.url, tmp_path / "strict", generation_tolerance=1e-6)


def test_a_server_restarted_with_other_weights_spoils_no_shard(tmp_path, undisturbed):
    weights = {"now": toy_model(sharpness=3.0)}
    tokenizer = toy_tokenizer()

    def gate(number):
        if number == 11:
            weights["now"] = other_weights()

    with PolicyServer(lambda body, _: completion_of(weights["now"], tokenizer, body), gate=gate) as server:
        with pytest.raises(ValueError, match="does not serve toy"):
            generate(server.url, tmp_path)
        assert list(contents(tmp_path)) == list(undisturbed)[:1]
        weights["now"] = toy_model(sharpness=3.0)
        generate(server.url, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TSPIN_SERVER_KEY", "sesame-1234\n")
    with toy_server(faults={1: "500", 3: "503"}) as server:
        generate(server.url, tmp_path / "kept")
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame-1234"}
    with toy_server(faults={0: "401"}) as server, pytest.raises(ValueError, match="TSPIN_SERVER_KEY") as caught:
        generate(server.url, tmp_path / "refused")
    assert "HTTP 503: out of orderBearer ***; asking again" in caplog.text and "Bearer ***" in str(caught.value)
    process = ServerProcess(["sh", "-c", f"# sesame-1234\necho $TSPIN_SERVER_KEY{'.' * 195}; exit 3"], tmp_path / "log")
    process.start()
    assert process._process is not None and process._process.wait(10) == 3
    with pytest.raises(ChildProcessError) as ended:
        process.check_alive()
    process.stop()
    assert "sesame" in (tmp_path / "log").read_text() and "1234" not in str(ended.value)
    kept = [caplog.text, repr(caught.value), *(data.decode("latin1") for data in contents(tmp_path / "kept").values())]
    assert not [text for text in kept if "sesame" in text]
    monkeypatch.delenv("TSPIN_SERVER_KEY")
    with toy_server() as server:
        generate(server.url, tmp_path / "open")
        assert not [headers for headers in server.headers if "Authorization" in headers]


def test_a_key_that_cannot_be_sent_is_refused_at_once_and_not_shown(tmp_path, monkeypatch):
    for key in ("sesame-ü", "sesame 1234", "sesame\n1234"):
        monkeypatch.setenv("TSPIN_SERVER_KEY", key)
        with pytest.raises(ValueError, match="TSPIN_SERVER_KEY: want ASCII without spaces") as caught:
            config_of("http://127.0.0.1:8000/v1")
        assert "sesame" not in str(caught.value)
    monkeypatch.setenv("TSPIN_SERVER_KEY", "sesame")
    monkeypatch.setattr(remote, "server_key", lambda: "sesame\n")
    with toy_server() as server, pytest.raises(ValueError, match=r"no request can be sent to .*Bearer \*\*\*"):
        generate(server.url, tmp_path)


@pytest.mark.parametrize(
    ("command", "is_refused"),
    [
        ("s {model} {port} --api-key secret", True),
        ("s {model} {port} --api_key=secret", True),
        ("env VLLM_API_KEY='secret' s {model} {port}", True),
        ("s {model} --api-key secret", True),
        ("sh -c 's $0 --port $1 --api-key  \"$TSPIN_SERVER_KEY\"' {model} {port}", False),
    ],
)
def test_a_key_in_the_command_is_refused(command, is_refused):
    given = {"generation_url": None, "generation_server_command": command}
    if is_refused:
        with pytest.raises(ValueError, match=r"want no key in it.*set TSPIN_SERVER_KEY") as caught:
            config_of("", **given)
        assert "secret" not in str(caught.value)
    else:
        config_of("", **given)


def test_a_proxy_of_the_environment_is_not_asked(tmp_path, monkeypatch, undisturbed):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with toy_server() as server:
        generate(server.url, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_the_command_samples_over_http_too(tmp_path, monkeypatch, capsys):
    make_toy(tmp_path)
    model, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.jsonl"), "--use_cpu"]
    words += ["--prompt_template", "{prompt}", "--max_new_tokens", "6", "--shard_size", "8", "--max_length", "32"]
    with PolicyServer(lambda body, headers: completion_of(model, tokenizer, body)) as server:
        keys = ["--generation_backend", "openai", "--generation_url", server.url, "--output_dir", str(tmp_path / "out")]
        assert main(["generate", *words, *keys]) == 0
        assert len([body for body in server.requests if "logprobs" not in body]) == 24
        assert main(["run", *words, *keys]) == 2
    assert "generation_server_command: want the command of a server" in capsys.readouterr().err
    assert len(read_generations(tmp_path / "out")) == 24


def read(stop_ids=(1, 7), **choice):
    protocol = TokenIds("toy", toy_tokenizer(), stop_ids, 20)
    choice = {"token_ids": [5, 6, 1], "finish_reason": "stop", **choice}
    return protocol.read({"model": "toy", "choices": [choice]}, Example(9, "", "", [4, 5], [1]), 4)


def test_what_an_answer_means():
    assert read() == Answer([5, 6, 1], True)
    assert read(token_ids=[5, 6, 8, 9], finish_reason="length") == Answer([5, 6, 8, 9], False)
    # The last token may be an end whatever the reason, and a server may name it rather than send it.
    assert read(token_ids=[5, 6, 8, 7], finish_reason="length").stopped
    assert read(token_ids=[5, 6], stop_reason=7) == Answer([5, 6, 7], True)
    assert read(token_ids=[5, 6], matched_stop=1) == Answer([5, 6, 1], True)
    assert read((1,), token_ids=[]) == Answer([1], True)
    assert read(logprobs={"token_logprobs": [-1.0, -2.0, -0.5]}).logprobs == [-1.0, -2.0, -0.5]
    for unusable in (None, {"token_logprobs": [-1.0, None, -0.5]}, {"token_logprobs": [-1.0]}, []):
        assert read(logprobs=unusable).logprobs is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": None, "text": "ab"}, "generation_protocol: the server returns no token ids"),
        ({"prompt_token_ids": [3, 4, 5]}, "the server read another prompt than that of row 9"),
        ({"token_ids": [5, 6]}, r"ended row 9 without one of \[1, 7\]"),
        ({"token_ids": [5, 6], "finish_reason": "length"}, r"cut row 9 after 2 of 4 tokens; .*--max-model-len"),
        ({"token_ids": [5, 1, 6, 1]}, "went on after a stop token in row 9"),
    ],
)
def test_an_answer_of_a_server_that_cannot_be_used_says_why(choice, message):
    with pytest.raises(ValueError, match=message):
        read(**choice)


@pytest.mark.parametrize(
    "choice",
    [
        *({"token_ids": ids} for ids in ([True], [5.0], [-1], [20], "ab", [5] * 5)),
        *({"finish_reason": reason} for reason in (None, "abort", "content_filter")),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(choice):
    with pytest.raises(AgainError):
        read(**choice)
    for answer in ([], {}, {"model": "toy"}, {"model": 3, "choices": []}, {"model": "toy", "choices": ["a"]}):
        with pytest.raises(AgainError):
            TokenIds("toy", toy_tokenizer(), (1,), 20).read(answer, Example(9, "", "", [4], [1]), 4)


def test_a_server_that_asks_for_a_pause_gets_it_within_bounds(tmp_path, monkeypatch):
    pauses, real = [], anyio.sleep
    monkeypatch.setattr(anyio, "sleep", lambda seconds: pauses.append(seconds) or real(seconds))
    monkeypatch.setattr(remote, "LONGEST_ASKED_PAUSE", 0.05)
    with toy_server(faults={0: "503", 1: "429"}) as server:
        generate(server.url, tmp_path)
    assert len(pauses) == 2 and pauses[0] <= 0.005 and pauses[1] == 0.05


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("3", 3), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("soon", 0), ("Mon, 1 Jan 1990", 0)],
)
def test_retry_after(header, seconds):
    assert remote._retry_after(header) == seconds
    later = formatdate(time.time() + 50, usegmt=True)
    assert 40 < remote._retry_after(later) <= 50


def test_check_tells_whether_the_backend_is_there(tmp_path, capsys):
    make_toy(tmp_path)
    words = ["check", "--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.jsonl")]
    words += ["--prompt_template", "{prompt}", "--max_new_tokens", "6", "--max_length", "32", "--use_cpu"]
    words += ["--iterations", "1", "--generation_backend"]

    def line(*more):
        main([*words, *more])
        return next(line for line in capsys.readouterr().out.splitlines() if "generation:" in line)

    assert line("transformers") == "ok  generation: by transformers, in this process"
    assert line("continuous").startswith("ok  generation: by continuous batching")
    with toy_server() as server:
        url = server.url
        assert line("openai", "--generation_url", url).startswith("ok  generation: by the server at")
        assert server.requests == []
    assert line("openai", "--generation_url", url).startswith(
        "NO  generation: generation_url: want a server that answers"
    )
    started = ("openai", "--generation_server_command")
    assert line(*started, "sh -c {model} {port}").startswith("ok  generation: by sh, started for the weights")
    assert line(*started, "no-such {model} {port}").startswith(
        "NO  generation: generation_server_command: want a program"
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


class Policies:
    """The tiny models of a run by their directories, behind one server that processes of ours forward to."""

    def __init__(self, fatal=()):
        self.models, self.asked, self.pids, self.fatal = {}, [], set(), set(fatal)

    def __call__(self, body, headers):
        self.pids.add(int(headers["X-Pid"]))
        if len(self.asked) in self.fatal:
            self.fatal.remove(len(self.asked))
            os.kill(int(headers["X-Pid"]), signal.SIGKILL)
        weights = headers["X-Weights"]
        self.asked.append(weights)
        if weights not in self.models:
            self.models[weights] = load_model(weights), load_tokenizer(weights)
        return completion_of(*self.models[weights], body)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def loop(toy, directory, policies, **changes):
    with PolicyServer(policies) as upstream:
        command = f"{sys.executable} -S {HERE / 'completions_server.py'} {{port}} {upstream.url} {{model}}"
        keys = {"generation_backend": "openai", "generation_server_command": command, "num_train_epochs": 1}
        keys |= {"generation_wait": 30, "generation_concurrency": 4}
        result = SelfPlay(toy_config(toy, directory, **keys | changes)).run()
    assert policies.pids and not [pid for pid in policies.pids if is_alive(pid)]
    return result


@pytest.mark.parametrize(
    ("iterations", "servers", "fatal"),
    [(1, 4, (3, 40, 60)), pytest.param(2, 7, (3, 40, 75, 120), marks=pytest.mark.soak)],
)
def test_the_loop_starts_a_server_for_each_policy_and_outlives_its_deaths(toy, tmp_path, iterations, servers, fatal):
    """What is asked of it when it is killed is asked again of its successor: the same run, to the bit of its weights."""
    calm, shaken = Policies(), Policies(fatal)
    undisturbed = loop(toy, tmp_path / "calm" / "run", calm, iterations=iterations)
    made = [str(undisturbed.output_dir / f"iter_0{t}" / "model") for t in range(iterations)]
    assert list(dict.fromkeys(calm.asked)) == [str(toy / "model"), *made]
    samples = {"eval_initial/greedy": 0, "iter_00/synthetic": 0}
    samples |= {"iter_00/fresh": 1} if iterations == 1 else {"proto": 0, "iter_01/synthetic": 1}
    pi_0 = storage.hash_json(storage.read_record(undisturbed.output_dir / "run.json")["model"])
    for name, t in samples.items():
        request = shard_request(undisturbed.output_dir / name)
        assert request["backend"] == "openai" and (request["model"] == pi_0) == (t == 0)
    # For the evaluation of pi_0, its samples, those of pi_1, its evaluation after the pairs are scored, then y0 and pi_2 likewise.
    assert len(calm.pids) == servers
    restarted = loop(toy, tmp_path / "shaken" / "run", shaken, iterations=iterations)
    assert len(shaken.pids) == servers + len(fatal) and not shaken.fatal
    assert restarted.model_hash == undisturbed.model_hash
    pair = [outcome(run.output_dir) for run in (undisturbed, restarted)]
    assert pair[0] == pair[1]


@pytest.mark.soak
def test_of_two_processes_one_samples(toy, tmp_path):
    one, two = Policies(), Policies()
    loop(toy, tmp_path / "one" / "run", one, iterations=1)
    with PolicyServer(two) as upstream:
        command = f"{sys.executable} -S {HERE / 'completions_server.py'} {{port}} {upstream.url} {{model}}"
        keys = {"generation_backend": "openai", "generation_server_command": command, "num_train_epochs": 1}
        config = toy_config(toy, tmp_path / "two" / "run", iterations=1, per_device_train_batch_size=2, **keys)
        config.save(tmp_path / "config.yaml")
        launched = launch("-m", "tspin", "run", "--config", str(tmp_path / "config.yaml"))
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert two.pids and not [pid for pid in two.pids if is_alive(pid)]
    assert two.asked.count(str(toy / "model")) == one.asked.count(str(toy / "model"))
    assert len(two.asked) == len(one.asked)
    for name in ("iter_00/synthetic", "eval_initial/sampled"):
        assert contents(tmp_path / "one" / "run" / name) == contents(tmp_path / "two" / "run" / name)


class Fatal(Policies):
    """Kills the server at every request but the first few, which verify it."""

    def __call__(self, body, headers):
        if len(self.asked) >= 3:
            os.kill(int(headers["X-Pid"]), signal.SIGKILL)
        return super().__call__(body, headers)


def test_a_server_that_keeps_dying_ends_the_run_with_its_last_words(toy, tmp_path):
    with pytest.raises(
        ValueError, match=r"generation_server_command: the server ended with code 3; .*'no memory left'"
    ):
        command = f"{sys.executable} -S -c \"print('no memory left'); raise SystemExit(3)\" {{model}} {{port}}"
        SelfPlay(
            toy_config(toy, tmp_path / "run", generation_backend="openai", generation_server_command=command)
        ).run()
    with pytest.raises(ValueError, match=f"it was started again {remote.RESTARTS} times"):
        loop(toy, tmp_path / "again", again := Fatal())
    assert len(again.pids) == 1 + remote.RESTARTS and not [pid for pid in again.pids if is_alive(pid)]


def test_a_server_goes_down_with_us(tmp_path):
    """Killed with -9 we can end nothing; the watcher ends the server's group, children too."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tspin.server import ServerProcess\n"
        "child = 'sleep 300 & echo $! $$ > ' + sys.argv[1] + '; wait'\n"
        "server = ServerProcess(['sh', '-c', child], Path(sys.argv[1] + '.log'))\n"
        "server.start()\n"
        "written = lambda: Path(sys.argv[1]).exists() and Path(sys.argv[1]).read_text().endswith('\\n')\n"
        "for _ in range(3000):\n"
        "    if not written(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "pids")], timeout=60)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for _ in range(1000):
        if not any(map(is_alive, pids)):
            break
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_server_that_does_not_listen_to_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("tspin.server.GRACE_SECONDS", 0.2)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ready = tmp_path / "ready"
    server = ServerProcess(
        ["sh", "-c", f"trap '' TERM; env; touch {ready}; while :; do sleep 1; done"], tmp_path / "log"
    )
    server.start()
    pid = server.pid
    for _ in range(1000):
        if ready.exists():
            break
        time.sleep(0.01)
    server.stop()
    assert pid is not None and not is_alive(pid)
    environment = (tmp_path / "log").read_text()
    assert "PATH=" in environment and "RANK=" not in environment and "ACCELERATE" not in environment


def test_the_log_says_what_a_server_died_of_before_it_was_started_again(tmp_path):
    for name in ("first", "second"):
        server = ServerProcess(["sh", "-c", f"echo {name} $$"], tmp_path / "log")
        for _ in range(2):
            server.start()
            server._process.wait()
        said = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
        assert said == [name, name]
        server.stop()


def test_a_health_that_drips_is_none_after_all_its_seconds(monkeypatch):
    monkeypatch.setattr(remote, "HEALTH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n")
                for _ in range(40):
                    time.sleep(0.1)
                    connection.sendall(b" ")

        threading.Thread(target=drip, daemon=True).start()
        begin = time.monotonic()
        assert not remote.answers(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        assert time.monotonic() - begin < 3


def test_a_command_is_words_and_never_a_shell():
    words = command_words("sh -c 'serve $HOME' --weights={model} --port {port}", "/a b/$(touch x)", 12)
    assert words == ["sh", "-c", "serve $HOME", "--weights=/a b/$(touch x)", "--port", "12"]
    with pytest.raises(ValueError, match=r"want \{model\} where the server takes its weights"):
        command_words("sh --port {port}", "m", 1)
    with pytest.raises(ValueError, match="want a program that is installed, got 'no-such-server'"):
        command_words("no-such-server {model}", "m", 1)
    with pytest.raises(ValueError, match="want words as in a shell"):
        command_words("sh 'open {model}", "m", 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"generation_url": None}, "generation_server_command: want a command"),
        (
            {"generation_url": None, "generation_server_command": "s {model}"},
            "generation_server_command: want a command",
        ),
        ({"generation_url": "ftp://a/v1"}, "generation_url: want http://"),
        ({"generation_url": "http:///v1"}, "generation_url: want http://"),
        ({"generation_url": "http://127.0.0.1:99999/v1"}, "generation_url: want a port of 1 to 65535"),
        ({"generation_url": "http://..:80/v1"}, "generation_url: want the name of a host"),
        ({"generation_url": f"http://{'a' * 300}/v1"}, "generation_url: want the name of a host"),
        ({"generation_url": "http://me:secret@../v1"}, "generation_url: want no name or password"),
        ({"generation_url": "http://me:secret@a/v1"}, "generation_url: want no name or password"),
        ({"generation_protocol": "text", "tokenizer_name_or_path": "t"}, "generation_protocol: want token_ids beside"),
        ({"generation_concurrency": 0}, "generation_concurrency: want 1 or more"),
        ({"generation_timeout": 0}, "generation_timeout: want a number of seconds above 0"),
        ({"use_peft": True, "quantization": "nf4"}, "generation_backend: want transformers beside quantization"),
    ],
)
def test_keys_that_do_not_fit_are_named(keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of("http://127.0.0.1:8000/v1", **keys)
    assert "secret" not in str(caught.value)
