"""The command `tspin`: words in, one call into the package, one clear line out when the input is at fault.

Holds no logic of the method, and imports torch only once a command needs it, so that help is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tspin.check import USER_ERRORS, check, one_line
from tspin.config import SelfPlayConfig, default_of, loop_fields, read_values, training_fields, type_name

_SAMPLING = ("seed", "max_new_tokens", "temperature", "top_p", "top_k", "shard_size")
_PACKAGES = ("tspin", "torch", "triton", "transformers", "datasets", "accelerate", "peft", "lm_eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after an error of the user's, told in one line on stderr.

    With TSPIN_DEBUG=1 in the environment such an error shows its traceback instead.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Said at every start by libraries about themselves.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`gradient_checkpointing(_kwargs)?` is deprecated")
    is_main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("tspin").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        args, words = _parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
        if words and not args.takes_words:
            # Their names alone: a value may be a token.
            names = [word.partition("=")[0] for word in words if word.startswith("-")] or words
            raise ValueError(f"unrecognised: {' '.join(names)}; see `tspin {args.name} --help`")
        return args.command(args, words) or 0
    except KeyboardInterrupt:
        print("tspin: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("TSPIN_DEBUG") == "1":
            raise
        print(f"tspin: error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    # Its threads, met alive by the end of the interpreter, now and then abort a process whose work is done.
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing its usage; the help of `tspin run` ends with the table of all keys."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def format_help(self) -> str:
        return super().format_help() + (_keys_help() if self.prog == "tspin run" else "")


def _parser() -> _Parser:
    parser = _Parser("tspin", description="Triplet self-play fine-tuning (T-SPIN).", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tspin {_version('tspin')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)

    def add(command: Callable, text: str, *, takes_words: bool = True, **options: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(command.__name__[1:], help=text, description=text, allow_abbrev=False, **options)
        made.set_defaults(command=command, takes_words=takes_words)
        return made

    def add_keyed(command: Callable, text: str) -> argparse.ArgumentParser:
        made = add(command, text, epilog="Further options: --key value for every key that `tspin run --help` lists.")
        made.add_argument("--config", metavar="FILE", help="flat YAML of keys; options on the command line win")
        return made

    add(_demo, "a small self-play experiment from nothing, on a CPU", add_help=False)
    add_keyed(_run, "the self-play loop; run the same command again to resume")
    compare = add_keyed(_compare, "the loop under several methods and seeds; run the same command again to resume")
    compare.add_argument("--methods", metavar="A,B", help="arms that differ in their method alone")
    compare.add_argument(
        "--arm",
        metavar="NAME:KEY=VALUE,...",
        action="append",
        default=[],
        help="an arm that differs in any keys, e.g. spin:learning_rate=3e-6; may be given again",
    )
    compare.add_argument(
        "--seeds", metavar="0,1,2", help="of every arm; arms and seeds may stand in the config file too"
    )
    generate = add_keyed(_generate, "sample responses of a model to a data set into output_dir")
    generate.add_argument("--split", choices=("train", "eval"), default="train", help="dataset or eval_dataset")
    train = add_keyed(_train, "train one iteration on given triplets into output_dir/model")
    train.add_argument("--triplets", metavar="PATH", required=True, help="parquet file as the loop writes it")
    train.add_argument("--iteration", metavar="N", type=int, default=0, help="which values and which beta (default 0)")
    evaluated = add_keyed(
        _eval, "a model on eval_dataset (exact match, log-likelihood, accuracy) and on tasks of lm-eval"
    )
    evaluated.add_argument(
        "--save", metavar="FILE", help="write the JSON there too; the same command then goes on in it"
    )
    checked = add_keyed(_check, "validate config, data, template, end token and model before a run")
    checked.add_argument(
        "--gpu_memory", metavar="SIZE", help="of the GPU to check for, as 24GB (default: this machine's)"
    )
    checked.add_argument("--gpu", metavar="NAME", help="also predict the GPU hours of the run, e.g. on an H100")
    checked.add_argument(
        "--gpus", metavar="N", type=int, default=1, help="that FSDP2 divides the model over (default 1)"
    )
    checked.add_argument("--rows", metavar="N", type=int, default=2, help="rows to show tokenised (default 2)")
    report = add(_report, "a page on a finished or running run, or on several as a comparison", takes_words=False)
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    report.add_argument(
        "--output_dir", metavar="DIR", help="where the page goes (default: RUN/report; of several runs: tspin-report)"
    )
    pushed = add(_push, "upload the model of a run, or its triplets, to the hub", takes_words=False)
    pushed.add_argument("run", metavar="RUN", help="a run directory")
    pushed.add_argument(
        "--repo_id", metavar="NAME", required=True, help="owner/name on the hub; made if it is not there"
    )
    pushed.add_argument("--triplets", action="store_true", help="the triplets of all iterations, as a data set")
    pushed.add_argument("--iteration", metavar="N", type=int, help="of the model (default: the last that is finished)")
    pushed.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    pushed.add_argument("--dry_run", action="store_true", help="list what would be uploaded, and open no connection")
    add(_env, "versions and devices, for a bug report", takes_words=False)
    return parser


def _keys_help() -> str:
    from tspin.training_args import TSPINConfig

    own = dict(re.findall(r"^ +(\w+): (.+(?:\n {12,}.+)*)", TSPINConfig.__doc__ or "", re.M))
    hints = typing.get_type_hints(TSPINConfig) | typing.get_type_hints(SelfPlayConfig)
    lines: dict[str, list[str]] = {}
    for key, f in (loop_fields() | training_fields()).items():
        group = f.metadata.get("group") or ("training" if key in own else "training, as in transformers")
        default = default_of(f)
        shown = "required" if default is dataclasses.MISSING else f"default {json.dumps(default)}"
        text = " ".join((own.get(key) or f.metadata.get("help", "")).split())
        text = text if "group" in f.metadata or key in own else text.split(". ")[0]
        lines.setdefault(group, []).append(f"  --{key} ({type_name(hints[key])}; {shown})\n      {text}\n")
    order = sorted(lines, key=lambda group: "," in group)
    note = "A training key takes one value, or a list of one per iteration.\n"
    return note + "".join(f"\n{group}:\n{''.join(lines[group])}" for group in order)


def _config(args: argparse.Namespace, words: list[str], *required: str, **defaults: Any) -> SelfPlayConfig:
    values = defaults | read_values(args.config, words)
    config = SelfPlayConfig.from_dict(values)
    for key in required:
        if values.get(key) is None:
            raise ValueError(f"{key} is required: set it in the config file or give --{key} VALUE")
    return config


def _demo(args: argparse.Namespace, words: list[str]) -> int | None:
    from tspin.demo import main as demo

    return demo(words)


def _run(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir")
    from tspin.loop import SelfPlay

    SelfPlay(config).run()


def _compare(args: argparse.Namespace, words: list[str]) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from tspin.compare import read_comparison
    from tspin.report import comparison_tables

    comparison = read_comparison(read_values(args.config, words), args.methods, args.arm, args.seeds)
    comparison.run()
    if PartialState().is_main_process:
        for table in comparison_tables(comparison.runs):
            Console().print(table)
        print(f"report {comparison.directory / 'report' / 'report.html'}")


def _generate(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir")
    from accelerate import PartialState

    from tspin.backends import opened
    from tspin.data import load_examples
    from tspin.generate import generate_responses
    from tspin.loading import local_directory, model_of, tokenizer_of, training_args_of
    from tspin.storage import run_lock

    state: Any = PartialState()
    autocast_dtype, tokenizer = training_args_of(config).autocast_dtype, tokenizer_of(config)
    examples, _ = load_examples(config, tokenizer, split=args.split)
    is_server = config.generation_backend == "openai"
    with run_lock(config.output_dir, state.process_index):
        if state.is_main_process or not is_server:
            with opened(
                config,
                tokenizer,
                lambda: model_of(config, device=state.device),
                weights=lambda: local_directory(config.model_name_or_path, config.model_revision),
                log=Path(config.output_dir) / "server.log",
                autocast_dtype=autocast_dtype,
            ) as sampling:
                generate_responses(
                    tokenizer=tokenizer,
                    examples=examples,
                    directory=config.output_dir,
                    batch_size=config.generation_batch_size,
                    process_index=0 if is_server else state.process_index,
                    num_processes=1 if is_server else state.num_processes,
                    autocast_dtype=autocast_dtype,
                    model_id=_model_id(config),
                    **sampling,
                    **{key: getattr(config, key) for key in _SAMPLING},
                )
        state.wait_for_everyone()


def _model_id(config: SelfPlayConfig) -> str:
    from tspin.storage import model_hash

    if Path(config.model_name_or_path).is_dir():
        return model_hash(config.model_name_or_path)
    return f"{config.model_name_or_path}@{config.model_revision}"


def _train(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir", dataset=args.triplets)
    if args.iteration < 0:
        raise ValueError(f"--iteration: want 0 or more, got {args.iteration}")
    import pyarrow
    from accelerate import PartialState
    from datasets import Dataset
    from pyarrow import parquet

    from tspin.loading import add_adapter, lora_config, model_of, tokenizer_of, training_args_of
    from tspin.sharding import whole_weights
    from tspin.storage import run_lock, staged_directory
    from tspin.trainer import TSPINTrainer

    try:
        dataset = Dataset(parquet.read_table(args.triplets))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--triplets: want a whole parquet file, got {args.triplets}: {error}") from error
    tokenizer, final = tokenizer_of(config), Path(config.output_dir) / "model"
    training_args = training_args_of(config, args.iteration)
    training_args.rehearse()
    state: Any = PartialState()
    with run_lock(config.output_dir, state.process_index):
        trainer = TSPINTrainer(
            model_of(config, device=training_args.device),
            training_args,
            dataset,
            processing_class=tokenizer,
            peft_config=lora_config(config),
            iteration=args.iteration,
        )
        trainer.train()
        weights = whole_weights(trainer.model)
        if trainer.is_world_process_zero():
            model: Any = model_of(config, whole=True)
            if config.use_peft:
                model = add_adapter(model, lora_config(config), seed=config.seed)
            model.load_state_dict(weights, strict=False)
            with staged_directory(final) as staged:
                (model.merge_and_unload() if config.use_peft else model).save_pretrained(staged)
                tokenizer.save_pretrained(staged)
            print(f"saved {final}")


def _eval(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, dataset="unused")
    if config.eval_dataset is None and not config.tasks:
        raise ValueError("eval_dataset is required, or tasks: give --eval_dataset PATH for rows, or --tasks paper")
    from tspin.harness import Harness, benchmark_table, benchmarks
    from tspin.loading import model_of, tokenizer_of, training_args_of

    harness = Harness(benchmarks(config.tasks), config.include_path) if config.tasks else None
    training, tokenizer = training_args_of(config), tokenizer_of(config)
    from accelerate import PartialState

    from tspin.storage import fingerprint, package_versions, write_json

    state: Any = PartialState()
    model = model_of(config, device=state.device)
    result = {} if config.eval_dataset is None else _eval_rows(config, training, tokenizer, model)
    result["model"] = {
        "name": config.model_name_or_path,
        **fingerprint(config.model_name_or_path, config.model_revision)[0],
    }
    result["versions"] = package_versions(_PACKAGES)
    if harness is not None:
        result["tasks"] = harness.run(
            model,
            tokenizer,
            None if args.save is None else Path(args.save).with_suffix("") / "tasks",
            model_id=_model_id(config),
            batch_size=training.per_device_eval_batch_size,
            limit=config.tasks_limit,
            autocast_dtype=training.autocast_dtype,
        )
    if state.is_main_process:
        print(json.dumps(result, indent=2))
        if args.save is not None:
            write_json(args.save, result)
        if harness is not None:
            from rich.console import Console

            Console(stderr=True).print(benchmark_table(result["tasks"]))


def _eval_rows(config: SelfPlayConfig, training: Any, tokenizer: Any, model: Any) -> dict[str, Any]:
    """What `evaluate` gives for the held-out rows, dealt over the processes; the same on each."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from tspin.data import load_examples
    from tspin.evaluate import evaluate, merge_evaluations
    from tspin.scoring import scoring_options

    state: Any = PartialState()
    examples, _ = load_examples(config, tokenizer, split="eval")
    mine = examples[state.process_index :: state.num_processes]
    parts: list[dict[str, Any]] = []
    if mine:
        result = evaluate(
            model,
            tokenizer,
            mine,
            answer_pattern=config.answer_pattern,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.generation_batch_size,
            seed=config.seed,
            sampled=config.eval_sampled,
            autocast_dtype=training.autocast_dtype,
            **scoring_options(training, model),
        )
        parts.append(result)
    return merge_evaluations(gather_object(parts))


def _report(args: argparse.Namespace, words: list[str]) -> None:
    from tspin.report import write_report

    if missing := [run for run in args.runs if not Path(run).is_dir()]:
        raise FileNotFoundError(f"RUN: want a run directory, got {missing[0]}, which is none")
    print(f"wrote {write_report(args.runs, args.output_dir)}")


def _push(args: argparse.Namespace, words: list[str]) -> None:
    from tspin.push import push

    push(
        args.run,
        args.repo_id,
        triplets=args.triplets,
        iteration=args.iteration,
        private=args.private,
        dry_run=args.dry_run,
    )


def _env(args: argparse.Namespace, words: list[str]) -> None:
    import torch

    facts = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    facts["torch"] = torch.__version__
    devices = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    facts |= {"CUDA device": ", ".join(devices) or "none", "platform": platform.platform()}
    print("\n".join(f"{name:14}{value}" for name, value in facts.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check(args: argparse.Namespace, words: list[str]) -> None:
    check(_config(args, words), gpu=args.gpu, gpus=args.gpus, gpu_memory=args.gpu_memory, rows=args.rows)
