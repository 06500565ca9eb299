"""lm-evaluation-harness in our hands: local tasks on a tiny model, without a network, against counts made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import toy_model, toy_tokenizer

from tspin import cli
from tspin.harness import PAPER_BENCHMARKS, Benchmark, Harness, benchmark_table, benchmarks

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {shots}
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 7}}
"""
FREE = """
task: free
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = ["abc", "de", "fgha", "bb", "cad", "eee"]
CHOICES = [["a", "bc"], ["dd", "e", "aaa"], ["b", "c"], ["abc", "d"], ["e", "f"], ["ab", "ba"]]


def logprob(model, tokenizer, prompt: str, answer: str) -> float:
    ids, start = tokenizer(prompt + answer).input_ids, len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))


@pytest.fixture(scope="module")
def policy():
    return toy_model(sharpness=2.0), toy_tokenizer()


@pytest.fixture
def tasks(tmp_path, monkeypatch, policy) -> Path:
    """A folder with two multiple-choice tasks, one of one shot, and one of free text that is right in half of its rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = policy
    rows = [{"q": q, "choices": c, "gold": i % len(c)} for i, (q, c) in enumerate(zip(QUESTIONS, CHOICES))]
    for i, row in enumerate(rows):
        ids = torch.tensor([tokenizer(row["q"]).input_ids])
        made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        row["target"] = tokenizer.decode(made, skip_special_tokens=True).strip() if i % 2 else "?"
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, shots in (("choice", 0), ("shown", 1)):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data, shots=shots))
    (folder / "free.yaml").write_text(FREE.format(data=data))
    return folder


def test_names_shots_paths_and_the_preset_are_read():
    assert benchmarks("mmlu:5, hellaswag") == [Benchmark("mmlu", "mmlu", 5), Benchmark("hellaswag", "hellaswag")]
    assert benchmarks(["dir/my.yaml:2"]) == [Benchmark("my", "dir/my.yaml", 2)]
    assert benchmarks("paper") == [*PAPER_BENCHMARKS] and benchmarks(["paper", "arc_easy"])[:10] == [*PAPER_BENCHMARKS]
    for wrong in ("", [], "a,a", ["paper", "paper"], "x/a.yaml,a"):
        with pytest.raises(ValueError, match="tasks: want names of lm-evaluation-harness"):
            benchmarks(wrong)


def test_the_paper_s_shots_and_metrics_are_those_of_the_installed_harness():
    # GSM8K 5, MATH 4, MuSR 0, MMLU 5, MMLU-Pro 5, GPQA 0, HellaSwag 10, WinoGrande 5, BBH 3, IFEval 0.
    assert [b.shots for b in PAPER_BENCHMARKS] == [5, 4, 0, 5, 5, 0, 10, 5, 3, 0]
    normed = {b.name for b in PAPER_BENCHMARKS if b.metric.startswith("acc_norm")}
    assert normed == {"MuSR", "GPQA", "HellaSwag", "BBH"}
    from lm_eval.tasks._index import Kind, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = ("gsm8k", "leaderboard", "mmlu/default", "hellaswag", "winogrande", "ifeval")
    index = TaskIndex.build([root / name for name in folders])
    for benchmark in PAPER_BENCHMARKS:
        entry = index[benchmark.task]
        config = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)
        listed = config["aggregate_metric_list" if entry.kind is Kind.GROUP else "metric_list"]
        filters = [f["name"] for f in config.get("filter_list", [{"name": "none"}])]
        metric, _, chosen = benchmark.metric.partition(",")
        assert metric in [m["metric"] for m in listed] and chosen in filters, benchmark
        # A number in the task's own YAML is the paper's; where there is none, ours is set.
        assert config.get("num_fewshot", benchmark.shots) == benchmark.shots, benchmark


def test_scores_are_those_of_the_policy(policy, tasks):
    model, tokenizer = policy
    wanted = benchmarks([f"{tasks}/choice.yaml", f"{tasks}/free.yaml"])
    result = Harness(wanted).run(model, tokenizer, batch_size=4)
    choice, free = result["benchmarks"]
    scores = [[logprob(model, tokenizer, q, c) for c in cs] for q, cs in zip(QUESTIONS, CHOICES)]
    normed = [[s / len(c) for s, c in zip(row, cs)] for row, cs in zip(scores, CHOICES)]
    right, right_normed = (
        sum(max(range(len(row)), key=row.__getitem__) == i % len(row) for i, row in enumerate(rows)) / 6
        for rows in (scores, normed)
    )
    assert choice["metrics"]["choice"] == {
        "acc,none": pytest.approx(right),
        "acc_norm,none": pytest.approx(right_normed),
    }
    assert (choice["metric"], choice["score"]) == ("acc_norm,none", pytest.approx(right_normed))
    assert (choice["shots"], choice["questions"], choice["task_versions"]) == ([0], 6, {"choice": 7})
    assert (free["metric"], free["score"]) == ("exact_match,none", pytest.approx(0.5))
    assert result["average"] == pytest.approx((right_normed + 0.5) / 2)
    assert result["versions"]["lm_eval"] and not model.training


def test_shots_are_those_that_are_asked_for_even_where_the_task_says_none(policy, tasks):
    for words, shots in ((["choice:2", "shown"], [[2], [1]]), (["choice", "shown:0"], [[0], [0]])):
        rows = Harness(benchmarks(words), str(tasks)).run(*policy, limit=3)["benchmarks"]
        assert [row["shots"] for row in rows] == shots and [row["questions"] for row in rows] == [3, 3]


def test_a_group_counts_by_its_own_mean_and_a_named_metric_by_itself(policy, tasks):
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [choice, shown]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    both, named = (
        Harness([b], str(tasks)).run(*policy)["benchmarks"][0]
        for b in (Benchmark("both", "both", 0), Benchmark("c", "choice", 0, "acc,none"))
    )
    assert both["metric"] == "acc,none" and both["shots"] == [0] and both["questions"] == 12
    assert both["score"] == pytest.approx(named["score"]) and named["metric"] == "acc,none"
    with pytest.raises(ValueError, match="want the metric f1,none in choice, got acc,none, acc_norm,none"):
        Harness([Benchmark("c", "choice", 0, "f1,none")], str(tasks)).run(*policy)


def test_finished_benchmarks_are_kept_and_those_of_another_model_are_not(policy, tasks, tmp_path, monkeypatch):
    measured = []
    real = Harness._measure
    monkeypatch.setattr(Harness, "_measure", lambda self, b, *a: measured.append(b.name) or real(self, b, *a))
    wanted = Harness(benchmarks("choice,free"), str(tasks))
    first = wanted.run(*policy, tmp_path / "out", model_id="a")
    (tmp_path / "out" / "free.json").unlink()
    assert wanted.run(*policy, tmp_path / "out", model_id="a") == first
    assert measured == ["choice", "free", "free"]
    wanted.run(*policy, tmp_path / "out", model_id="b")
    assert measured[3:] == ["choice", "free"]


def test_what_cannot_be_measured_is_said_before(tasks, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        Harness(benchmarks("absent.yaml"))
    with pytest.raises(ValueError, match="include_path: want a directory"):
        Harness(benchmarks("choice"), str(tmp_path / "absent"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'tspin\[lm-eval\]'"):
        Harness(benchmarks("choice"), str(tasks))


def test_an_unknown_task_is_named_with_the_version(tasks, monkeypatch):
    # The harness' own index takes too long for a test.
    from lm_eval import tasks as lm_eval_tasks

    made = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda include_path, **_: made(None, include_path, False))
    with pytest.raises(ValueError, match=r"want tasks of lm-evaluation-harness 0\.\d.* got choise"):
        Harness(benchmarks("choise,free"), str(tasks))


def test_the_table_shows_percent_and_the_average(policy, tasks, capsys):
    from rich.console import Console

    Console(width=120).print(benchmark_table(Harness(benchmarks("free"), str(tasks)).run(*policy, limit=4)))
    text = capsys.readouterr().out
    assert "the first 4 questions" in text and "exact_match" in text
    assert any(line.split()[0] == "average" and "50.00" in line for line in text.splitlines() if line.strip())


def test_eval_of_rows_and_tasks_in_one_command(policy, tasks, tmp_path, capsys):
    model, tokenizer = policy
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "ab", "response": "c", "choices": [t]}) + "\n" for t in "dce"[::2]))
    words = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--use_cpu",
        "--bf16=false",
        "--prompt_template",
        "{prompt}",
    ]
    words += ["--tasks", "choice:1,free", "--include_path", str(tasks), "--save", str(tmp_path / "out" / "scores.json")]
    words += ["--eval_dataset", str(rows), "--choices_column", "choices", "--max_new_tokens", "2", "--tasks_limit", "4"]
    assert cli.main(["eval", *words]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(b["name"], b["shots"], b["questions"]) for b in result["tasks"]["benchmarks"]] == [
        ("choice", [1], 4),
        ("free", [0], 4),
    ]
    assert result["rows"] == 2 and 0 <= result["accuracy"] <= 1 and "exact_match" in result
    assert len(result["model"]["files"]["model.safetensors"]) == 64 and result["versions"]["lm_eval"]
    assert "average" in err and "choice" in err
    assert sorted(p.name for p in (tmp_path / "out" / "scores" / "tasks").iterdir()) == ["choice.json", "free.json"]


DEALT = """
import json, sys
from accelerate import Accelerator, PartialState
Accelerator(cpu=True)
sys.path.insert(0, sys.argv[3])
from test_generate import toy_model, toy_tokenizer
from lm_eval.models.huggingface import HFLM
from tspin.harness import Harness, benchmarks
asked, real = [], HFLM.loglikelihood
HFLM.loglikelihood = lambda self, requests, **options: asked.append(len(requests)) or real(self, requests, **options)
result = Harness(benchmarks("choice,free"), sys.argv[1]).run(toy_model(sharpness=2.0), toy_tokenizer(), sys.argv[2])
open(f"{sys.argv[2]}-{PartialState().process_index}.json", "w").write(json.dumps([asked, result]))
PartialState().destroy_process_group()
"""


def test_two_processes_score_what_one_does(policy, tasks, tmp_path):
    (tmp_path / "dealt.py").write_text(DEALT)
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *words,
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
    ]
    done = subprocess.run(
        [*words, str(tmp_path / "dealt.py"), str(tasks), str(tmp_path / "out"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    asked, found = zip(*(json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(2)))
    assert all(0 < count[0] < sum(map(len, CHOICES)) for count in asked)
    alone = Harness(benchmarks("choice,free"), str(tasks)).run(*policy)
    assert found[0] == found[1]
    assert [b["score"] for b in found[0]["benchmarks"]] == pytest.approx([b["score"] for b in alone["benchmarks"]])
    assert [b["questions"] for b in found[0]["benchmarks"]] == [6, 6]


def test_a_run_measures_its_tasks_after_each_iteration_and_once_before(tmp_path, monkeypatch):
    from test_loop import make_toy, toy_config

    from tspin.loop import SelfPlay

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_toy(tmp_path)
    data = tmp_path / "rows.json"
    data.write_text(
        '{"q": "1+1=", "choices": ["2", "3"], "gold": 0}\n{"q": "2+2=", "choices": ["5", "4"], "gold": 1}\n'
    )
    (tmp_path / "sums.yaml").write_text(CHOICE.format(name="sums", data=data, shots=0))
    config = toy_config(tmp_path, tmp_path / "run", iterations=1, eval_dataset=None, tasks=[f"{tmp_path}/sums.yaml:1"])
    result = SelfPlay(config).run()
    scores = [json.loads((tmp_path / "run" / "eval_initial.json").read_text()), *result.evaluations]
    assert [s["tasks/sums"] == s["tasks/average"] for s in scores] == [True, True]
    kept = json.loads((tmp_path / "run" / "iter_00" / "eval" / "tasks" / "sums.json").read_text())
    assert kept["result"]["shots"] == [1] and kept["result"]["score"] == scores[1]["tasks/sums"]
    assert kept["result"]["stderr"] == scores[1]["tasks_stderr/sums"] == scores[1]["tasks_stderr/average"]
    assert (
        kept["request"]["model"]
        == json.loads((tmp_path / "run" / "state.json").read_text())["done"]["iter_00/model"]["iter_00/model"]
    )
