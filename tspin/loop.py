"""Algorithm 1: sample from the policy, train on the triplets, and again, in a directory that survives kill -9.

A run is a list of stages. Each stage reads files and writes files, is repeatable, and counts once `state.json` names
it together with the hashes of what it wrote; a stage loads what it needs from disk, so an interrupted run takes the
same path as an undisturbed one and ends with bitwise the same weights (same machine and number of processes). Inside a
stage, generation resumes at its shards and training at its last whole checkpoint. This module deliberately holds no
loss, no sampling and no data format.
"""

from __future__ import annotations

import gc
import logging
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, ProgressCallback, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from tspin import storage
from tspin.backends import Samplers
from tspin.cards import write_cards
from tspin.checkpoints import Checkpoints, Progress, Sealing, TensorBoard, wait_for_everyone
from tspin.collator import TripletCollator
from tspin.config import SelfPlayConfig
from tspin.data import Example, build_triplets, load_examples
from tspin.evaluate import evaluate, generate_answers, read_references, write_references
from tspin.generate import derived_seed, generate_responses, read_generations
from tspin.harness import Harness, benchmarks, task_scores
from tspin.ledger import Ledger
from tspin.loading import local_directory, lora_config, model_of, tokenizer_of
from tspin.pairs import fresh_summary, pair_table
from tspin.report import iteration_table, write_report
from tspin.scoring import scoring_options
from tspin.timings import timed
from tspin.trainer import TSPINTrainer
from tspin.training_args import TSPINConfig

logger = logging.getLogger(__name__)

FRESH_ROWS = 256
_PACKAGES = ("tspin", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy", "pyarrow")
_NOT_OF_THE_MODEL = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "complete.json")
_NOT_OF_THE_MODEL += ("pytorch_model_fsdp_*", "optimizer_*", "global_step*", "latest", "zero_to_*.py")


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left its last policy, the SHA-256 of its weights, and each iteration's eval.json."""

    output_dir: Path
    model_dir: Path
    model_hash: str
    evaluations: list[dict[str, Any]]


class SelfPlay:
    """The self-play loop of one config; `run` may be called on a directory in any state that a run left behind."""

    def __init__(self, config: SelfPlayConfig):
        self.config = config
        self.directory = Path(config.output_dir)
        self.ledger = Ledger(self.directory)
        if config.generation_backend == "openai" and config.generation_server_command is None:
            raise ValueError(
                "generation_server_command: want the command of a server, got null; each iteration samples from other "
                "weights, so the loop starts one for each, and a server at generation_url serves `tspin generate` only"
            )
        lora_config(config)  # refuses a missing peft

    def run(self, *, report: bool = True) -> RunResult:
        """Do what is not yet done and return the final policy; without `report` no report is written at the end.

        Raises:
            ValueError: another process uses the directory; it belongs to another config, model or data; one of its
                files is damaged; the input is bad; no space is left. What is finished is kept.
        """
        # A bar for each loading of weights would bury those that matter.
        disable_progress_bar()
        # TrainingArguments choose the device and start the process group; those of every iteration, to refuse bad values now.
        training = [self._training_args(t) for t in range(self.config.iterations)]
        self.autocast = training[0].autocast_dtype
        state = PartialState()
        self.is_main, self.rank, self.world = state.is_main_process, state.process_index, state.num_processes
        for args in training:
            args.rehearse()
            if args.fsdp and self.world == 1:
                raise ValueError(
                    "fsdp: want several processes, got one; start them with accelerate launch, or leave fsdp out"
                )
        with storage.run_lock(self.directory, self.rank):
            self._open()
            for t, args in enumerate(training):
                args.check_rows(len(self.examples) * (2 if args.spin_mix_previous and t > 0 else 1))
            self._survey()
            log = self.directory / "server.log"
            self.samplers = Samplers(self.config, self.tokenizer, self._read, self._weights, log, self.autocast)
            with self.samplers:
                if self.held_out or self.harness:
                    initial = self.directory / "eval_initial.json"
                    is_evaluated = self.ledger.holds("eval_initial", *self._evaluation(initial))
                    self._stage("eval_initial", lambda: self._evaluate(0, initial), is_evaluated)
                for t in range(self.config.iterations):
                    self._iterate(t)
            if self.is_main:
                self.ledger.name_damage()
                write_cards(self.directory)
            if self.is_main and report:
                self._report()
            wait_for_everyone()
            final = self._at(self.config.iterations - 1) / "model"
            evaluations = [storage.read_json(self._at(t) / "eval.json") for t in range(self.config.iterations)]
            return RunResult(self.directory, final, storage.model_hash(final), evaluations)

    def _iterate(self, t: int) -> None:
        here, following, args = self._at(t), self._at(t + 1), self._training_args(t)
        is_last, is_sft = t + 1 == self.config.iterations, args.method == "sft"
        proto, checkpoints = self.directory / "proto", self._checkpoints(t)
        if self.is_main:
            self._restore_metrics(t, checkpoints)
        exported, trained = self.exported[t], self.trained[t]
        # The pairs still need the triplets after the training.
        built = (trained and self._is_paired(t)) or self.ledger.holds(
            f"{here.name}/triplets", here / "triplets.parquet"
        )
        synthesised = built or is_sft or self.ledger.holds(f"{here.name}/synthetic", here / "synthetic")
        has_proto = built or "proto" not in args.members_at(t) or self.ledger.holds("proto", proto)
        wait_for_everyone()
        self._stage("proto", lambda: self._generate("proto", 0, proto), has_proto)
        self._stage(f"{here.name}/synthetic", lambda: self._generate(here.name, t, here / "synthetic"), synthesised)
        self._stage(f"{here.name}/triplets", lambda: self._build_triplets(t, args), built)
        self._stage(f"{here.name}/train", lambda: self._train(t, args, checkpoints), trained)
        self._stage(f"{here.name}/model", lambda: self._export(t, checkpoints), exported)
        # The samples that the next iteration starts from show at once what this policy makes of its own responses.
        borrows = not (is_last or is_sft)
        samples = following / "synthetic" if borrows else here / "fresh"
        name, rows = (f"{following.name}/synthetic", None) if borrows else (f"{here.name}/fresh", FRESH_ROWS)
        is_paired, is_evaluated = self._is_paired(t), self._is_evaluated(t)
        is_sampled = is_paired or self.ledger.holds(name, samples)
        first = self._at(0) / "synthetic"
        has_first = is_paired or is_sft or self.ledger.holds(f"{first.parent.name}/synthetic", first)
        wait_for_everyone()
        self._stage(name, lambda: self._generate(following.name, t + 1, samples, rows), is_sampled)
        self._stage(f"{first.parent.name}/synthetic", lambda: self._generate(first.parent.name, 0, first), has_first)
        self._stage(f"{here.name}/pairs", lambda: self._pair(t, args, samples), is_paired)
        self._stage(f"{here.name}/eval", lambda: self._evaluate(t + 1, here / "eval.json"), is_evaluated)
        if self.is_main and not is_evaluated:
            write_cards(self.directory)
            console = Console()
            console.print(iteration_table(self.directory, console.width))

    def _report(self) -> None:
        try:
            write_report(self.directory)
        except Exception as error:
            if storage.is_full(error, self.directory):
                raise
            # A picture is no reason to lose the result of a finished run.
            logger.exception("the run is finished, but not its report; `tspin report %s` writes it", self.directory)

    def _at(self, t: int) -> Path:
        return self.directory / f"iter_{t:02d}"

    def _survey(self) -> None:
        """Of which iterations the policy is there, and of which at least the last checkpoint, or neither needed any more.

        What is done is looked at again only while something still needs it.
        """
        self.exported, self.trained, later = {}, {}, False
        for t in reversed(range(self.config.iterations)):
            name, here = self._at(t).name, self._at(t)
            passed = later and self._is_paired(t) and self._is_evaluated(t)
            self.exported[t] = passed or self.ledger.holds(f"{name}/model", here / "model")
            whole = not self.exported[t] and f"{name}/train" in self.ledger.done and self._checkpoints(t).final()
            self.trained[t] = later = self.exported[t] or bool(whole)
            # Nothing is left to make it again from but a whole training, and what is there may be the user's.
            if not later and f"{name}/model" in self.ledger.done and (here / "model").exists():
                raise self._altered(t)

    def _checkpoints(self, t: int) -> Checkpoints:
        """Those of an iteration; once it is trained, only those of that training count."""
        made = self.ledger.origin_of(f"{self._at(t).name}/train")
        return Checkpoints(self._at(t) / "checkpoints", None if made is None else self._origin(t, made))

    def _origin(self, t: int, made: dict[str, Any]) -> dict[str, Any]:
        """All that determines a training; `made`: as `Ledger.origin`."""
        config, name = SelfPlayConfig.from_dict(made["config"]), self._at(t).name
        adapter = [config.use_peft, config.lora_r, config.lora_alpha, config.lora_target_modules]
        seed = derived_seed(config.seed, f"{name}/train")
        settings = [config.training_at(t), config.torch_dtype, adapter, seed]
        return {
            "processes": made["processes"],
            "settings": settings,
            "triplets": self.ledger.hash_of(f"{name}/triplets"),
        }

    def _is_paired(self, t: int) -> bool:
        return self.ledger.holds(f"{self._at(t).name}/pairs", self._at(t) / "pairs.parquet")

    def _is_evaluated(self, t: int) -> bool:
        here = self._at(t)
        return self.ledger.holds(f"{here.name}/eval", *self._evaluation(here / "eval.json"))

    def _evaluation(self, path: Path) -> tuple[Path, ...]:
        """The files of an evaluation whose scores are at `path`: those, and the answers that they judge."""
        return (path, path.with_suffix("")) if self.held_out or self.harness else (path,)

    def _restore_metrics(self, t: int, checkpoints: Checkpoints) -> None:
        """The training log, if it is damaged, as the last checkpoint has it."""
        name, metrics = f"{self._at(t).name}/train", self._at(t) / "metrics.jsonl"
        if name in self.ledger.done and not self.ledger.holds(name, metrics) and (final := checkpoints.final()):
            logger.warning("%s is missing or altered: written again from %s", metrics, final)
            storage.write_atomic(
                metrics, storage.json_lines(storage.read_json(final / "trainer_state.json")["log_history"])
            )

    def _stage(self, name: str, work: Callable[[], Path | tuple[Path, ...]], holds: bool) -> None:
        """Run `work` on every process unless the stage holds; the main process then records what it made."""
        if holds:
            return
        if name in self.ledger.done:
            logger.warning("%s is done, but its files are missing or altered: doing it again", name)
        else:
            logger.info("%s", name)
        with timed(self.directory / "timings.jsonl", name) if self.is_main else nullcontext():
            made = work()
            wait_for_everyone()
        if self.is_main:
            self.ledger.record(name, *(made if isinstance(made, tuple) else (made,)))
        wait_for_everyone()
        self.ledger.read()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()

    def refuse_changes(self) -> None:
        """ValueError where the directory belongs to another config and `allow_config_change` is not set."""
        if self.config.allow_config_change:
            return
        if self.ledger.path.exists():
            self.ledger.read()
        # Not what config.yaml says: this config may have been read from it, after an edit.
        origin, path = self.ledger.origin, self.directory / "config.yaml"
        if origin:
            path = self.ledger.path
        elif not path.exists():
            if self.ledger.done:
                logger.warning(
                    "%s is missing, and %s, of an older version, does not say by which config its stages were made: they are "
                    "taken for those of this one; restore the file if they are not",
                    *(path, self.ledger.path),
                )
            return
        try:
            known = SelfPlayConfig.from_dict(origin["config"]) if origin else SelfPlayConfig.from_file(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it, or delete {path}, and the same command writes it anew"
            ) from error
        if changes := [f"{key}: {old!r} -> {new!r}" for key, new, old in self.config.diff(known)]:
            raise ValueError(
                f"output_dir {self.directory} belongs to a run with another config ({path.name}: {'; '.join(changes)}); "
                "undo the change, choose another output_dir, or set allow_config_change: true"
            )

    def _open(self) -> None:
        """Load tokenizer and rows, and bind the directory to this config, model and data, or refuse it."""
        config, path = self.config, self.directory / "config.yaml"
        if self.is_main:
            self.refuse_changes()
        self.harness = Harness(benchmarks(config.tasks), config.include_path) if config.tasks else None
        record_path = self.directory / "run.json"
        known = storage.read_record(record_path) if record_path.exists() else None
        self.fingerprint, self.revision = storage.fingerprint(config.model_name_or_path, config.model_revision, known)
        self.tokenizer = tokenizer_of(config, revision=self.revision)
        self.pad_token_id = cast(int, self.tokenizer.pad_token_id)
        with PartialState().main_process_first():
            self.examples, _ = load_examples(config, self.tokenizer)
            self.held_out = load_examples(config, self.tokenizer, split="eval")[0] if config.eval_dataset else []
        data = {"rows": len(self.examples), "sha256": _examples_hash(self.examples)}
        if self.is_main:
            storage.remove_partial(self.directory)
            record = {
                "command": _own_command(),
                "processes": self.world,
                "device": str(PartialState().device),
                "platform": platform.platform(),
                "versions": {"python": platform.python_version(), **storage.package_versions(_PACKAGES)},
                "model": self.fingerprint,
                "data": data,
                "eval_data": {"rows": len(self.held_out), "sha256": _examples_hash(self.held_out)},
            }
            storage.bind(record_path, record, allow_change=config.allow_config_change)
            self.ledger.begin({"config": config.to_dict(), "data": data, "processes": self.world})
            draft = self.directory / ".config.yaml.tmp"
            config.save(draft)
            storage.write_atomic(path, draft.read_bytes())
        wait_for_everyone()
        self.ledger.read()

    def _training_args(self, t: int) -> TSPINConfig:
        seed = derived_seed(self.config.seed, f"{self._at(t).name}/train")
        fixed = {"output_dir": str(self._at(t) / "checkpoints"), "seed": seed, "data_seed": seed}
        fixed |= {"run_name": f"{self.directory.name}/{self._at(t).name}"}
        # Rotation waits for the seal (see tspin.checkpoints), a checkpoint without optimizer state cannot be resumed, and one
        # process may wait for hours while another finishes its shards.
        fixed |= {"save_total_limit": None, "save_only_model": False, "ddp_timeout": 7 * 24 * 3600}
        return TSPINConfig(**self.config.training_at(t) | fixed)

    def _load(self, t: int, whole: bool = False) -> PreTrainedModel:
        """The weights of pi_t, on this process's device; `whole` in the precision in which they are kept."""
        # A sampler may hold the device's memory.
        self.samplers.close()
        return self._read(t, whole)

    def _read(self, t: int, whole: bool = False) -> PreTrainedModel:
        path = self._at(t - 1) / "model"
        if t > 0 and not self.ledger.holds(f"{self._at(t - 1).name}/model", path):
            raise self._altered(t - 1)
        device, named = cast(torch.device, PartialState().device), None if t == 0 else str(path)
        return model_of(self.config, named, revision=self.revision, whole=whole, device=device)

    def _altered(self, t: int) -> ValueError:
        """The error of a policy that is not what iteration t made."""
        here = self._at(t)
        return ValueError(
            f"{here / 'model'} is missing or altered; restore it and take out what was added to it, or delete {here} and all "
            "later iterations, and the same command makes them again"
        )

    def _weights(self, t: int) -> str:
        """The directory of pi_t."""
        if t == 0:
            return local_directory(self.config.model_name_or_path, self.revision)
        return str((self._at(t - 1) / "model").absolute())

    def _generate(self, name: str, t: int, directory: Path, rows: int | None = None) -> Path:
        """Sample responses of pi_t with the seed of `name` into `directory`."""
        if self._samples():
            generate_responses(
                tokenizer=self.tokenizer,
                examples=self.examples[:rows],
                directory=directory,
                seed=derived_seed(self.config.seed, f"{name}/synthetic"),
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                desc=f"{directory.parent.name}/{directory.name}",
                **self._decoding(t),
            )
        return directory

    def _samples(self) -> bool:
        """Whether this process samples: all do, but a server is the main process's alone."""
        return self.is_main or self.config.generation_backend != "openai"

    def _decoding(self, t: int) -> dict[str, Any]:
        alone = {"process_index": 0, "num_processes": 1} if self.config.generation_backend == "openai" else {}
        decoding = {"max_new_tokens": self.config.max_new_tokens, "batch_size": self.config.generation_batch_size}
        return decoding | self.samplers.at(t) | self._sharding(t) | alone

    def _sharding(self, t: int) -> dict[str, Any]:
        model_id = (
            storage.hash_json(self.fingerprint) if t == 0 else self.ledger.hash_of(f"{self._at(t - 1).name}/model")
        )
        processes = {"process_index": self.rank, "num_processes": self.world}
        return {
            "shard_size": self.config.shard_size,
            "autocast_dtype": self.autocast,
            "model_id": model_id,
            **processes,
        }

    def _build_triplets(self, t: int, args: TSPINConfig) -> Path:
        path, references = self._at(t) / "triplets.parquet", self._at(t) / "references"
        if self.is_main or args.needs_references:
            table = self._triplets(t, args)
            if not table.num_rows:
                raise ValueError(
                    f"no triplet of iteration {t} is left: all end beyond max_length {args.max_length}; raise it, "
                    "lower max_new_tokens, or set overlong: cut"
                )
            if args.needs_references:
                model = self._load(t)
                collator = TripletCollator(self.pad_token_id, args.members_at(t))
                options = {"batch_size": args.per_device_train_batch_size, **self._sharding(t)}
                write_references(model, table, references, collator, **options, **scoring_options(args, model))
                wait_for_everyone()
            if self.is_main:
                storage.write_parquet(path, read_references(references, table) if args.needs_references else table)
                shutil.rmtree(references, ignore_errors=True)
        wait_for_everyone()
        return path

    def _triplets(self, t: int, args: TSPINConfig) -> pa.Table:
        if args.method == "sft":
            columns = ("row", "prompt", "chosen", "prompt_ids", "chosen_ids")
            rows = [(e.row, e.prompt, e.response, e.prompt_ids, e.response_ids) for e in self.examples]
            return pa.Table.from_pylist([dict(zip(columns, row)) for row in rows])
        proto = read_generations(self.directory / "proto") if "proto" in args.members_at(t) else None
        limits = {"max_length": args.max_length, "overlong": self.config.overlong}
        sources = [self._at(t) / "synthetic"]
        if args.spin_mix_previous and t > 0:
            sources.insert(0, self._at(t - 1) / "synthetic")
        return pa.concat_tables([build_triplets(self.examples, read_generations(s), proto, **limits) for s in sources])

    def _train(self, t: int, args: TSPINConfig, checkpoints: Checkpoints) -> Path:
        """Train pi_{t+1} from pi_t up to a final checkpoint; optimizer and schedule start afresh."""
        metrics = self._at(t) / "metrics.jsonl"
        checkpoints.origin = self._origin(t, self.ledger.origin)
        if self.is_main:
            checkpoints.remove_unusable()
        wait_for_everyone()
        if checkpoints.final() is None:
            last = checkpoints.last()
            table = pq.read_table(self._at(t) / "triplets.parquet")
            set_seed(args.seed)
            trainer = TSPINTrainer(
                self._load(t),
                args,
                train_dataset=Dataset(table),
                processing_class=self.tokenizer,
                peft_config=lora_config(self.config),
                callbacks=[Sealing(checkpoints, metrics, self.config.training_at(t).get("save_total_limit"))],
                iteration=t,
            )
            trainer.diagnostics = str(self._at(t) / "diagnostics")
            trainer.remove_callback(ProgressCallback)
            if not args.disable_tqdm:
                trainer.add_callback(Progress)
            if trainer.pop_callback(TensorBoardCallback):
                trainer.add_callback(TensorBoard(self._at(t) / "tensorboard"))
            try:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            except UnpicklingError as error:
                raise ValueError(
                    f"{last} holds more than tensors and numbers, as training never writes, and is not loaded; "
                    f"delete {last}, and the same command goes on from an earlier one"
                ) from error
        wait_for_everyone()
        if self.is_main:
            log = storage.read_json(cast(Path, checkpoints.final()) / "trainer_state.json")["log_history"]
            storage.write_atomic(metrics, storage.json_lines(log))
        return metrics

    def _export(self, t: int, checkpoints: Checkpoints) -> Path:
        """The final checkpoint as a plain model: weights (an adapter is merged into pi_t), configs and tokenizer."""
        directory, final = self._at(t) / "model", cast(Path, checkpoints.final())
        if self.is_main:
            with storage.staged_directory(directory) as staged:
                if self.config.use_peft:
                    from peft import PeftModel

                    PeftModel.from_pretrained(self._load(t, whole=True), str(final)).merge_and_unload().save_pretrained(
                        staged
                    )
                    self.tokenizer.save_pretrained(staged)
                else:
                    ignore = shutil.ignore_patterns(*_NOT_OF_THE_MODEL)
                    shutil.copytree(final, staged, ignore=ignore, dirs_exist_ok=True)
        wait_for_everyone()
        return directory

    def _pair(self, t: int, args: TSPINConfig, samples: Path) -> Path:
        """Write what pi_{t+1} makes, pair by pair, of the first training rows: of their triplets and of its new samples."""
        path, first = self._at(t) / "pairs.parquet", self._at(0) / "synthetic"
        if self.is_main:
            trained, drawn = pq.read_table(self._at(t) / "triplets.parquet"), read_generations(samples)
            initial = None if args.method == "sft" else read_generations(first)
            rows = self.examples[:FRESH_ROWS]
            table = pair_table(self._load, args, t, trained, rows, drawn, initial, pad_token_id=self.pad_token_id)
            storage.write_parquet(path, table)
        wait_for_everyone()
        return path

    def _evaluate(self, t: int, path: Path) -> tuple[Path, ...]:
        """Write what pi_t scores on the held-out rows, and what its fresh pairs come to."""
        result, seed = {"iteration": t - 1}, derived_seed(self.config.seed, "eval")
        answers, sampled = path.with_suffix(""), self.config.eval_sampled
        if self.held_out and self._samples():
            options = {"seed": seed, "sampled": sampled, **self._decoding(t)}
            generate_answers(tokenizer=self.tokenizer, examples=self.held_out, directory=answers, **options)
        wait_for_everyone()
        args = self._training_args(0)
        # The harness deals its requests over all processes.
        model: Any = self.samplers.scorer(t) or self._load(t) if self.is_main or self.harness else None
        if self.harness:
            options = {"limit": self.config.tasks_limit, "batch_size": args.per_device_eval_batch_size}
            options |= {"model_id": self._sharding(t)["model_id"], "autocast_dtype": self.autocast}
            result |= task_scores(self.harness.run(model, self.tokenizer, answers / "tasks", **options))
        if self.is_main:
            scoring = {"autocast_dtype": self.autocast, **scoring_options(args, model)}
            size, pattern = args.per_device_eval_batch_size, self.config.answer_pattern
            if self.held_out:
                options = {"directory": answers, "sampled": sampled, "answer_pattern": pattern}
                result |= evaluate(model, self.tokenizer, self.held_out, scoring_batch_size=size, **options, **scoring)
            if t > 0:
                result |= fresh_summary(pq.read_table(path.with_name("pairs.parquet")))
            storage.write_json(path, result)
        wait_for_everyone()
        return self._evaluation(path)


def _examples_hash(examples: list[Example]) -> str:
    return storage.hash_json([[e.row, e.prompt_ids, e.response_ids, e.response, *e.choices] for e in examples])


def _own_command() -> list[str]:
    # Of another program's words some may be secret.
    program = Path(sys.argv[0])
    return sys.argv if program.name == "tspin" or program.parts[-2:] == ("tspin", "__main__.py") else sys.argv[:1]
