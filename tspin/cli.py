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
_PACKAGES = ("tspin", "torch", "triton", "transformers", "datasets", "accelerate", "peft")


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
            raise ValueError(f"unrecognised: {' '.join(words)}; see `tspin {args.name} --help`")
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
    generate = add_keyed(_generate, "sample responses of a model to a data set into output_dir")
    generate.add_argument("--split", choices=("train", "eval"), default="train", help="dataset or eval_dataset")
    train = add_keyed(_train, "train one iteration on given triplets into output_dir/model")
    train.add_argument("--triplets", metavar="PATH", required=True, help="parquet file as the loop writes it")
    train.add_argument("--iteration", metavar="N", type=int, default=0, help="which values and which beta (default 0)")
    add_keyed(_eval, "exact match and log-likelihood of a model on eval_dataset")
    checked = add_keyed(_check, "validate config, data, template, end token and model before a run")
    checked.add_argument(
        "--gpu_memory", metavar="SIZE", help="of the GPU to check for, as 24GB (default: this machine's)"
    )
    checked.add_argument("--rows", metavar="N", type=int, default=2, help="rows to show tokenised (default 2)")
    report = add(_report, "tables and plots of finished or running runs", takes_words=False)
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    add(_env, "versions and devices, for a bug report", takes_words=False)
    return parser


def _keys_help() -> str:
    from tspin.trainer import TSPINConfig

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
    for key in required:
        if values.get(key) is None:
            raise ValueError(f"{key} is required: set it in the config file or give --{key} VALUE")
    return SelfPlayConfig.from_dict(values)


def _demo(args: argparse.Namespace, words: list[str]) -> int | None:
    from tspin.demo import main as demo

    return demo(words)


def _run(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir")
    from tspin.loop import SelfPlay

    SelfPlay(config).run()


def _generate(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir")
    from accelerate import PartialState

    from tspin.data import load_examples
    from tspin.generate import generate_responses
    from tspin.loading import model_of, tokenizer_of, training_args_of
    from tspin.storage import disk_errors, run_lock

    state: Any = PartialState()
    autocast_dtype, tokenizer = training_args_of(config).autocast_dtype, tokenizer_of(config)
    examples, _ = load_examples(config, tokenizer, split=args.split)
    with run_lock(config.output_dir, state.process_index), disk_errors(config.output_dir):
        generate_responses(
            model_of(config, device=state.device),
            tokenizer,
            examples,
            config.output_dir,
            batch_size=config.generation_batch_size,
            process_index=state.process_index,
            num_processes=state.num_processes,
            autocast_dtype=autocast_dtype,
            model_id=_model_id(config),
            **{key: getattr(config, key) for key in _SAMPLING},
        )
        state.wait_for_everyone()


def _model_id(config: SelfPlayConfig) -> str:
    from tspin.storage import hash_files, hash_json

    if Path(config.model_name_or_path).is_dir():
        return hash_json(hash_files(config.model_name_or_path, "*.safetensors"))
    return f"{config.model_name_or_path}@{config.model_revision}"


def _train(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "output_dir", dataset=args.triplets)
    if args.iteration < 0:
        raise ValueError(f"--iteration: want 0 or more, got {args.iteration}")
    import pyarrow
    from accelerate import PartialState
    from datasets import Dataset
    from pyarrow import parquet

    from tspin.loading import lora_config, model_of, tokenizer_of, training_args_of
    from tspin.storage import disk_errors, run_lock, staged_directory
    from tspin.trainer import TSPINTrainer

    try:
        dataset = Dataset(parquet.read_table(args.triplets))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--triplets: want a whole parquet file, got {args.triplets}: {error}") from error
    tokenizer, final = tokenizer_of(config), Path(config.output_dir) / "model"
    training_args = training_args_of(config, args.iteration)
    state: Any = PartialState()
    with run_lock(config.output_dir, state.process_index), disk_errors(config.output_dir):
        trainer = TSPINTrainer(
            model_of(config, device=training_args.device),
            training_args,
            dataset,
            processing_class=tokenizer,
            peft_config=lora_config(config),
            iteration=args.iteration,
        )
        trainer.train()
        if trainer.is_world_process_zero():
            model: Any = trainer.accelerator.unwrap_model(trainer.model)
            with staged_directory(final) as staged:
                (model.merge_and_unload() if config.use_peft else model).save_pretrained(staged)
                tokenizer.save_pretrained(staged)
            print(f"saved {final}")


def _eval(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "eval_dataset", dataset="unused")
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from tspin.data import load_examples
    from tspin.evaluate import evaluate, merge_evaluations
    from tspin.loading import model_of, tokenizer_of, training_args_of
    from tspin.scoring import scoring_options

    state: Any = PartialState()
    training, tokenizer = training_args_of(config), tokenizer_of(config)
    examples, _ = load_examples(config, tokenizer, split="eval")
    mine = examples[state.process_index :: state.num_processes]
    parts: list[dict[str, Any]] = []
    if mine:
        model = model_of(config, device=state.device)
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
    parts = gather_object(parts)
    if state.is_main_process:
        print(json.dumps(merge_evaluations(parts), indent=2))


def _report(args: argparse.Namespace, words: list[str]) -> None:
    from tspin.report import write_report

    if missing := [run for run in args.runs if not Path(run).is_dir()]:
        raise FileNotFoundError(f"RUN: want a run directory, got {missing[0]}, which is none")
    for run in map(Path, args.runs):
        write_report(run)
        print(f"wrote {run / 'report'}")


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
    check(_config(args, words), gpu_memory=args.gpu_memory, rows=args.rows)
