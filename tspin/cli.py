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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tspin.config import SelfPlayConfig, default_of, loop_fields, read_values, training_fields, type_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tspin.data import Example

# What users can put right: bad values, missing files, missing extras. Anything else is a defect and shows its trace.
USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ImportError)
_SAMPLING = ("seed", "max_new_tokens", "temperature", "top_p", "top_k", "shard_size")
_PACKAGES = ("tspin", "torch", "triton", "transformers", "datasets", "accelerate", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after an error of the user's, told in one line on stderr.

    With TSPIN_DEBUG=1 in the environment such an error shows its traceback instead.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
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
        print(f"tspin: error: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    # Its threads, met alive by the end of the interpreter, now and then abort a process whose work is done.
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
    check = add_keyed(_check, "validate config, data, template, end token and model before a run")
    check.add_argument(
        "--gpu_memory", metavar="SIZE", help="of the GPU to check for, as 24GB (default: this machine's)"
    )
    check.add_argument("--rows", metavar="N", type=int, default=2, help="rows to show tokenised (default 2)")
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


def _tokenizer(config: SelfPlayConfig) -> PreTrainedTokenizerBase:
    from tspin.model import load_tokenizer

    name = config.tokenizer_name_or_path or config.model_name_or_path
    revision = None if config.tokenizer_name_or_path else config.model_revision
    return load_tokenizer(name, revision=revision, trust_remote_code=config.trust_remote_code)


def _model(config: SelfPlayConfig, device: Any = "cpu") -> Any:
    from tspin.model import load_model

    return load_model(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization,
        device=device,
    )


def _training_args(config: SelfPlayConfig, iteration: int = 0):
    from tspin.trainer import TSPINConfig

    return TSPINConfig(output_dir=config.output_dir, seed=config.seed, **config.training_at(iteration))


def _autocast(config: SelfPlayConfig) -> torch.dtype | None:
    import torch

    return torch.bfloat16 if (args := _training_args(config)).bf16 else torch.float16 if args.fp16 else None


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
    from tspin.storage import disk_errors, run_lock

    autocast_dtype, state, tokenizer = _autocast(config), PartialState(), _tokenizer(config)
    examples, _ = load_examples(config, tokenizer, split=args.split)
    with run_lock(config.output_dir, state.process_index), disk_errors(config.output_dir):
        generate_responses(
            _model(config, state.device),
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
    from datasets import Dataset
    from pyarrow import parquet

    from tspin.model import lora_config
    from tspin.trainer import TSPINTrainer

    try:
        dataset = Dataset(parquet.read_table(args.triplets))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--triplets: want a whole parquet file, got {args.triplets}: {error}") from error
    tokenizer, final = _tokenizer(config), Path(config.output_dir) / "model"
    training_args = _training_args(config, args.iteration)
    trainer = TSPINTrainer(
        _model(config, training_args.device),
        training_args,
        dataset,
        processing_class=tokenizer,
        peft_config=lora_config(config),
        iteration=args.iteration,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        (model.merge_and_unload() if config.use_peft else model).save_pretrained(final)
        tokenizer.save_pretrained(final)
        print(f"saved {final}")


def _eval(args: argparse.Namespace, words: list[str]) -> None:
    config = _config(args, words, "eval_dataset", dataset="unused")
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from tspin.data import load_examples
    from tspin.evaluate import evaluate, merge_evaluations
    from tspin.scoring import scoring_options

    training, tokenizer = _training_args(config), _tokenizer(config)
    autocast_dtype, state = _autocast(config), PartialState()
    examples, _ = load_examples(config, tokenizer, split="eval")
    mine = examples[state.process_index :: state.num_processes]
    parts: list[dict[str, Any]] = []
    if mine:
        model = _model(config, state.device)
        result = evaluate(
            model,
            tokenizer,
            mine,
            answer_pattern=config.answer_pattern,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.generation_batch_size,
            seed=config.seed,
            sampled=config.eval_sampled,
            autocast_dtype=autocast_dtype,
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
    config = _config(args, words)
    failed: list[str] = []

    def step(name: str, work: Callable, *needs: Any) -> Any:
        """Print what `work` finds, and return its result; None when it or something it needs has failed."""
        if any(need is None for need in needs):
            return print(f"--  {name}: not checked, as it needs what failed above")
        try:
            result, text = work(config, *needs)
        except USER_ERRORS as error:
            failed.append(name)
            return print(f"NO  {name}: {_one_line(error)}")
        print(f"ok  {name}: {text}")
        return result

    training = step("training", _check_training)
    tokenizer = step("tokenizer", _check_tokenizer)
    examples = step("data", _check_data, tokenizer, "train")
    held_out = step("eval data", _check_data, tokenizer, "eval")
    step("model", _check_model, training, tokenizer, examples, held_out)
    step("memory", partial(_check_memory, gpu_memory=args.gpu_memory, examples=examples or []), training)
    for example in (examples or [])[: args.rows]:
        print(f"\nrow {example.row}: {len(example.prompt_ids)} prompt and {len(example.response_ids)} response tokens")
        print(f"prompt    {_shown(tokenizer, example.prompt_ids)}")
        print(f"response  {_shown(tokenizer, example.response_ids)}")
    if failed:
        raise ValueError(f"check failed: {', '.join(failed)} (see above)")


def _check_training(config: SelfPlayConfig) -> tuple[Any, str]:
    iterations = [_training_args(config, t) for t in range(config.iterations)]
    texts = [f"{a.method}, beta {a.beta_at(t):g}, lr {a.learning_rate:g}" for t, a in enumerate(iterations)]
    return iterations, "; ".join(f"iteration {t}: {text}" for t, text in enumerate(texts))


def _check_tokenizer(config: SelfPlayConfig) -> tuple[Any, str]:
    from tspin.data import Encoder, end_token_ids

    tokenizer = _tokenizer(config)
    stop_ids = end_token_ids(config, tokenizer)
    Encoder(tokenizer, config.prompt_template, stop_ids)
    ends = _shown(tokenizer, stop_ids)
    return tokenizer, f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, start {tokenizer.bos_token}, ends {ends}"


def _check_data(config: SelfPlayConfig, tokenizer: Any, split: str) -> tuple[list[Example], str]:
    from tspin.data import load_examples
    from tspin.evaluate import extract_answer

    if split == "eval" and config.eval_dataset is None:
        return [], "none, so nothing will be measured on held-out rows"
    examples, report = load_examples(config, tokenizer, split=split)
    if split == "train":
        return examples, str(report)
    answers = {e.row: extract_answer(e.response, config.answer_pattern) for e in examples}
    without = [row for row, answer in answers.items() if answer is None]
    if without:
        raise ValueError(
            f"answer_pattern: want a match in every annotated response, got none for {config.answer_pattern!r} in "
            f"{len(without)} of {len(examples)} rows, first in row {without[0]}; correct the pattern"
        )
    return examples, f"{report}; first answer {answers[examples[0].row]!r}"


def _check_model(
    config: SelfPlayConfig, training: list[Any], tokenizer: Any, train: list[Example], held_out: list[Example]
) -> tuple[Any, str]:
    from tspin.fitting import model_without_weights
    from tspin.model import add_adapter, lora_config, probe_head

    path = Path(config.model_name_or_path)
    bare = path.is_dir() and not any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in path.iterdir())
    model = model_without_weights(config) if bare else _model(config)
    peft_config, examples = lora_config(config), [*train, *held_out]
    text = f"{type(model).__name__}, {model.num_parameters():,} parameters"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"tokenizer: want at most the model's {vocabulary} tokens, got {len(tokenizer)}; is it its own?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(e.prompt_ids) + max(len(e.response_ids), config.max_new_tokens) for e in examples)
    if positions is not None and longest > positions:
        raise ValueError(
            f"want rows of at most {positions} positions, got {longest}; lower max_length or max_new_tokens"
        )
    if bare:
        return model, f"{text}, of config.json alone: no weights to score with"
    if training[0].fused == "off":
        return model, text
    try:
        probe_head(model if peft_config is None else add_adapter(model, peft_config, seed=config.seed))
    except ValueError as refusal:
        if training[0].fused == "on":
            raise
        return model, f"{text}; fused='auto' will take its logits ({_one_line(refusal)})"
    return model, f"{text}, scores through its output head"


def _check_memory(
    config: SelfPlayConfig, training: list[Any], *, gpu_memory: str | None, examples: list[Example]
) -> tuple[Any, str]:
    import torch

    from tspin.fitting import MemoryCheck, parse_memory

    iteration = max(range(len(training)), key=lambda t: len(training[t].members_at(t)))
    args, size = training[iteration], None if gpu_memory is None else parse_memory(gpu_memory)
    if size is None and not args.use_cpu and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    if gpu_memory is not None and not args.fp16 and config.training_at(iteration).get("bf16") is None:
        args.bf16 = True  # the default on a GPU, which may not be this machine's
    response = max([config.max_new_tokens, *(len(e.response_ids) for e in examples)])
    prompt = max([len(e.prompt_ids) for e in examples] or [args.max_length - response, 1])
    check = MemoryCheck(config, args, iteration, prompt, response, size)
    print(*check.table(), sep="\n")
    return check, check.verdict()


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as the tokenizer names them, separated by bars, special ones in [[ ]]; the middle of a long list left out."""
    names = [
        f"[[{name}]]" if token in tokenizer.all_special_ids else str(name).replace("\n", "\\n")
        for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)))
    ]
    return " | ".join(names if len(names) <= 48 else [*names[:32], "...", *names[-16:]])
