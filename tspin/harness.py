"""lm-evaluation-harness on a policy: a list of its tasks, each with the shots and the metric that count, the paper's as a preset.

Prompts, data and metrics are the harness'; this module deliberately holds none. It puts the policy into it as it stands in memory,
on every process, keeps each finished benchmark in a file of its own, and says what was measured. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from rich import box
from rich.table import Table

from tspin import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = "paper"
_PACKAGES = ("lm_eval", "tspin", "torch", "transformers", "datasets")
# The harness' own: of Python, of numpy and torch, and of the choice of shots.
_SEEDS = (0, 1234)
_HEADLINES = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class Benchmark:
    """One line of a table: a task, group or tag of the harness, or the path of a task's YAML.

    shots: examples before each question; None takes the task's own number. metric: that counts, as the harness names it, e.g.
    "acc_norm,none"; None takes the first of acc_norm, acc and exact_match that the task has, else its first.
    """

    name: str
    task: str
    shots: int | None = None
    metric: str | None = None


# Benchmarks, shots and acc_norm are the paper's. It names neither tasks nor the other metrics: those of the Open LLM
# Leaderboards, whose shots these are, are ours; so is the strict prompt-level accuracy of IFEval.
PAPER_BENCHMARKS = (
    Benchmark("GSM8K", "gsm8k", 5, "exact_match,strict-match"),
    Benchmark("MATH", "leaderboard_math_hard", 4, "exact_match,none"),
    Benchmark("MuSR", "leaderboard_musr", 0, "acc_norm,none"),
    Benchmark("MMLU", "mmlu", 5, "acc,none"),
    Benchmark("MMLU-Pro", "leaderboard_mmlu_pro", 5, "acc,none"),
    Benchmark("GPQA", "leaderboard_gpqa", 0, "acc_norm,none"),
    Benchmark("HellaSwag", "hellaswag", 10, "acc_norm,none"),
    Benchmark("WinoGrande", "winogrande", 5, "acc,none"),
    Benchmark("BBH", "leaderboard_bbh", 3, "acc_norm,none"),
    Benchmark("IFEval", "ifeval", 0, "prompt_level_strict_acc,none"),
)


def benchmarks(tasks: str | Sequence[str]) -> list[Benchmark]:
    """The benchmarks that the key `tasks` names: `NAME`, `NAME:SHOTS`, a YAML path, or `paper` for the paper's ten.

    tasks: a list, or text separated by commas. Raises ValueError where there is none, or one comes twice.
    """
    words = tasks.split(",") if isinstance(tasks, str) else tasks
    found: list[Benchmark] = []
    for word in filter(None, map(str.strip, words)):
        match = re.fullmatch(r"(.+?)(?::(\d+))?", word)
        assert match is not None
        name = Path(match[1]).stem if _is_path(match[1]) else match[1]
        shots = None if match[2] is None else int(match[2])
        found += PAPER_BENCHMARKS if word == PAPER else (Benchmark(name, match[1], shots),)
    names = [benchmark.name for benchmark in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        wanted = "tasks: want names of lm-evaluation-harness, NAME:SHOTS, YAML paths, or paper, each once"
        raise ValueError(f"{wanted}; got {'none' if twice is None else f'{twice} twice'}")
    return found


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


class Harness:
    """The installed harness with the tasks of some benchmarks, whose names are known to exist.

    include_path: a directory of further task YAMLs, which win over the harness' own.
    Raises ImportError without the extra, ValueError for a name that the installed harness does not have.
    """

    def __init__(self, wanted: Sequence[Benchmark], include_path: str | None = None) -> None:
        try:
            import lm_eval.tasks as tasks
        except ImportError as error:
            raise ImportError(f"tasks: want lm-evaluation-harness; pip install 'tspin[lm-eval]' ({error})") from error
        # At every start, of models that come in memory, as ours always do.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"include_path: want a directory of task YAMLs, got {include_path}")
        paths = [b.task for b in wanted if _is_path(b.task)]
        if absent := next((path for path in paths if not Path(path).is_file()), None):
            raise ValueError(f"tasks: want the YAML of a task, got {absent}, which does not exist")
        self.wanted = list(wanted)
        self.manager = tasks.TaskManager(include_path=include_path, include_defaults=False)
        names = {b.task for b in wanted}.difference(paths)
        if not names <= set(self.manager.all_tasks):
            # Its own index of some 14,000 tasks takes a while.
            self.manager = tasks.TaskManager(include_path=include_path)
        if unknown := sorted(names.difference(self.manager.all_tasks)):
            version = storage.package_versions(["lm_eval"])["lm_eval"]
            raise ValueError(
                f"tasks: want tasks of lm-evaluation-harness {version}, got {', '.join(unknown)}; "
                "`lm_eval ls tasks` lists them; name the directory of your own with include_path"
            )

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: str | Path | None = None,
        *,
        model_id: str = "",
        batch_size: int = 8,
        limit: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Scores of the policy; every process calls it with its copy of the model, and questions are dealt over them.

        Args:
            directory: keeps each finished benchmark, so that the same call goes on after it; None keeps none.
            model_id: what identifies the weights; results of others in `directory` are measured again.
            limit: only the first questions of each task, for a try.
        Returns:
            benchmarks: for each its name, task, metric, score with standard error (a share, as the harness has it), shots and
            questions, versions of its tasks and every metric; average: unweighted mean of the scores; limit; versions.
        """
        rows = []
        versions = storage.package_versions(_PACKAGES)
        state = PartialState()
        for benchmark in self.wanted:
            request = {**asdict(benchmark), "model": model_id, "limit": limit, "autocast": str(autocast_dtype)}
            request |= {"batch_size": batch_size, "versions": versions}
            path = None if directory is None else Path(directory) / f"{benchmark.name}.json"
            known = storage.read_json(path) if path is not None and path.exists() else None
            state.wait_for_everyone()
            if known is not None and known["request"] == request:
                rows.append(known["result"])
                continue
            result = self._measure(benchmark, model, tokenizer, batch_size, limit, autocast_dtype)
            if path is not None and state.is_main_process:
                storage.write_json(path, {"request": request, "result": result})
            state.wait_for_everyone()
            rows.append(result)
        scores = [row["score"] for row in rows]
        return {"benchmarks": rows, "average": sum(scores) / len(scores), "limit": limit, "versions": versions}

    def _measure(
        self,
        benchmark: Benchmark,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        limit: int | None,
        autocast_dtype: torch.dtype | None,
    ) -> dict[str, Any]:
        from accelerate.utils import broadcast_object_list
        from lm_eval.evaluator import evaluate

        was_training = model.training
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        torch.manual_seed(_SEEDS[1])
        # The first process fetches the data; the others find them.
        with PartialState().main_process_first():
            try:
                loaded = self.manager.load([benchmark.task])
            except Exception as error:
                raise ValueError(f"tasks: cannot load {benchmark.task!r}: {error}") from error
        for task in loaded["tasks"].values():
            shots = benchmark.shots if benchmark.shots is not None else task.get_config("num_fewshot") or 0
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(_SEEDS[1])
        policy = _policy(model, tokenizer, batch_size, autocast_dtype)
        found = evaluate(policy, loaded, limit=limit, log_samples=False)
        model.train(was_training)
        result = [None if found is None else _result(benchmark, found)]
        broadcast_object_list(result)
        assert result[0] is not None
        return result[0]


def task_scores(result: dict[str, Any]) -> dict[str, float]:
    """The scores of `Harness.run` under the names that they have in eval.json, `tasks/<name>` and `tasks/average`, and the standard
    errors that are known, `tasks_stderr/<name>`; that of the average where all are, of independent ones."""
    rows = result["benchmarks"]
    scores = {f"tasks/{row['name']}": row["score"] for row in rows} | {"tasks/average": result["average"]}
    errors = {f"tasks_stderr/{row['name']}": row["stderr"] for row in rows if row["stderr"] is not None}
    if len(errors) == len(rows):
        errors["tasks_stderr/average"] = math.hypot(*errors.values()) / len(rows)
    return scores | errors


def _policy(model: Any, tokenizer: Any, batch_size: int, autocast_dtype: torch.dtype | None) -> Any:
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM

    class Policy(base):
        """A model in memory, one copy on each process, which the harness itself takes for a single one."""

        def __init__(self) -> None:
            super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast_dtype)
            self._rank, self._world_size = PartialState().process_index, PartialState().num_processes

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return gather(tensor) if self._world_size > 1 else tensor  # type: ignore[return-value]

        def barrier(self) -> None:
            PartialState().wait_for_everyone()

    return Policy()


def _result(benchmark: Benchmark, found: Any) -> dict[str, Any]:
    leaves, results = found["n-samples"], found["results"]
    whole = results.get(Path(benchmark.task).stem if _is_path(benchmark.task) else benchmark.task)
    # A tag, and a path whose task has another name, have no line of their own.
    parts = [whole] if whole is not None and _metrics(whole) else [results[name] for name in leaves]
    has = [name for name in _metrics(parts[0]) if all(name in part for part in parts)]
    metric = benchmark.metric or next(
        (m for h in _HEADLINES for m in has if m.split(",")[0] == h), has[0] if has else ""
    )
    if metric not in has:
        raise ValueError(
            f"tasks: want the metric {metric or 'of one kind'} in {benchmark.task}, got {', '.join(has) or 'none'}"
        )
    base, _, chosen = metric.partition(",")
    errors = [part.get(f"{base}_stderr,{chosen}") for part in parts]
    stderr = errors[0] if len(parts) == 1 and isinstance(errors[0], float) else None
    return {
        "name": benchmark.name,
        "task": benchmark.task,
        "metric": metric,
        "score": sum(part[metric] for part in parts) / len(parts),
        "stderr": stderr,
        "shots": sorted({found["n-shot"][name] for name in leaves}),
        "questions": sum(count["effective"] for count in leaves.values()),
        "task_versions": {name: found["versions"].get(name) for name in leaves},
        "metrics": {
            name: {m: values[m] for m in _metrics(values)} for name, values in results.items() if _metrics(values)
        },
    }


def _metrics(values: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, (int, float))
    ]


def benchmark_table(result: dict[str, Any]) -> Table:
    """The result of `Harness.run` as a person reads it, in percent."""
    title = "lm-evaluation-harness" + (
        f", the first {result['limit']} questions of each task" if result["limit"] else ""
    )
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for header in ("benchmark", "task", "metric"):
        table.add_column(header)
    for header in ("shots", "questions", "%", "±"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result["benchmarks"]:
        error = "" if row["stderr"] is None else f"{100 * row['stderr']:.2f}"
        shots, metric = ", ".join(map(str, row["shots"])), row["metric"].removesuffix(",none")
        table.add_row(
            row["name"], row["task"], metric, shots, str(row["questions"]), f"{100 * row['score']:.2f}", error
        )
    table.add_section()
    table.add_row("average", "", "", "", "", f"{100 * result['average']:.2f}", "")
    return table
