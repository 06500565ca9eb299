"""The configuration of a run: one flat YAML file, `--key value` overrides, and the values of each iteration.

The loop's own keys are the fields of `SelfPlayConfig`; every other key must be a field of `tspin.training_args.TSPINConfig`
and lands in `training`. Nothing is evaluated: values are text, numbers, booleans, lists and plain mappings, coerced by
the declared type of their field. This module deliberately reads no model and no data, and imports the trainer only for
the names and types of its keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

_OWNED_BY_THE_LOOP = {
    "data_seed": "it follows from `seed`",
    "run_name": "the loop names each iteration",
    "resume_from_checkpoint": "a run resumes by itself: give the same command again",
    "ignore_data_skip": "a resumed run must see the same batches",
    "do_train": "`tspin train` trains",
    "do_eval": "set `eval_dataset` instead",
    "eval_strategy": "set `eval_dataset` instead: the loop evaluates after each iteration",
    "eval_on_start": "set `eval_dataset` instead: the loop evaluates before the first iteration too",
    "load_best_model_at_end": "each iteration hands on its last weights",
    "remove_unused_columns": "the collator picks its columns itself",
    "label_names": "batches carry no labels",
    "local_rank": "`accelerate launch` sets it",
    "push_to_hub": "`tspin push` uploads what a run made; a token does not belong in config.yaml",
}
_NOT_COMPARED = ("output_dir", "allow_config_change", "generation_url", "generation_concurrency")
_NOT_COMPARED += ("generation_timeout", "generation_wait", "generation_tolerance")
_REQUIRED = dataclasses.MISSING
_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}


def _key(default: Any, group: str, text: str) -> Any:
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(kw_only=True)
class SelfPlayConfig:
    """Everything `SelfPlay` needs; see the help of each field, or `tspin run --help`.

    Raises:
        ValueError: a key is unknown, belongs to the loop, is missing, or has a value of the wrong type or range. The
            message names the key, what was wanted, what came, and the remedy.
    """

    model_name_or_path: str = _key(_REQUIRED, "model", "pi_0: a directory or hub name with safetensors")
    tokenizer_name_or_path: str | None = _key(None, "model", "default: the model's own")
    model_revision: str | None = _key(None, "model", "branch, tag or commit on the hub; pin it to reproduce a run")
    torch_dtype: Literal["float32", "bfloat16"] = _key("float32", "model", "bfloat16 rounds a step of 5e-7 away")
    attn_implementation: str | None = _key(None, "model", "as in transformers, e.g. sdpa")
    trust_remote_code: bool = _key(False, "model", "run Python code that comes with the checkpoint")
    use_peft: bool = _key(False, "model", "train LoRA adapters (needs the extra `peft`)")
    quantization: Literal["none", "nf4", "int8"] = _key(
        "none", "model", "bits of the frozen weights under the adapters, as QLoRA (needs the extra `quantization`)"
    )
    lora_r: int = _key(16, "model", "rank of the adapters")
    lora_alpha: int = _key(32, "model", "scale of the adapters is lora_alpha / lora_r")
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"group": "model", "help": "as in peft"}
    )

    dataset: str = _key(_REQUIRED, "data", "a .jsonl, .json or .parquet file, a directory of them, or a hub name")
    dataset_config: str | None = _key(None, "data", "configuration on the hub; locally a subdirectory, if there is one")
    dataset_split: str = _key("train", "data", "split on the hub; in a directory, the files that start with this name")
    prompt_column: str | None = _key(None, "data", "column of prompts, e.g. question; default: recognised")
    response_column: str | None = _key(None, "data", "column of annotated responses, e.g. answer; default: recognised")
    conversation_round: Literal["last", "first"] = _key(
        "last", "data", "which answer of a conversation is the annotated response; what follows it is left out"
    )
    max_rows: int | None = _key(None, "data", "read only the first rows")
    on_bad_row: Literal["error", "skip"] = _key("error", "data", "what to do with a row that cannot be used")
    overlong: Literal["drop", "cut", "error"] = _key("drop", "data", "responses that end beyond max_length")
    prompt_template: str = _key(_TEMPLATE, "data", "text with one {prompt} (default: the paper's), or chat")

    eval_dataset: str | None = _key(None, "evaluation", "held-out rows, as `dataset`")
    eval_split: str = _key("test", "evaluation", "as `dataset_split`")
    eval_rows: int | None = _key(None, "evaluation", "use only the first rows")
    answer_pattern: str | None = _key(None, "evaluation", "regex; the last group of its last match is the answer")
    choices_column: str | None = _key(
        None, "evaluation", "column of held-out rows with the answers to choose among: accuracy is measured too"
    )
    eval_sampled: bool = _key(True, "evaluation", "also measure exact match of a sample at temperature 1")
    tasks: str | list[str] | None = field(
        default=None,
        metadata={
            "group": "evaluation",
            "help": "of lm-evaluation-harness: names, name:shots, YAML paths, or paper (needs the extra `lm-eval`)",
        },
    )
    include_path: str | None = _key(None, "evaluation", "directory of further task YAMLs for `tasks`")
    tasks_limit: int | None = _key(None, "evaluation", "only the first questions of each task, for a try")

    max_new_tokens: int = _key(256, "generation", "longest sampled response (SPIN's value; the paper states none)")
    temperature: float = _key(1.0, "generation", "1 samples the policy itself, 0 is greedy")
    top_p: float = _key(1.0, "generation", "1 turns nucleus sampling off")
    top_k: int = _key(0, "generation", "0 turns it off")
    generation_batch_size: int = _key(32, "generation", "prompts decoded together on each process")
    shard_size: int = _key(512, "generation", "rows a killed run may lose")
    generation_backend: Literal["transformers", "continuous", "openai"] = _key(
        "transformers",
        "generation",
        "batches; continuous batching; or a server of the OpenAI API (needs the extra `server`)",
    )
    generation_server_command: str | None = _key(
        None,
        "generation",
        "starts a server of {model} on {port}, e.g. vllm serve {model} --host 127.0.0.1 --port {port}",
    )
    generation_url: str | None = _key(
        None, "generation", "of the server, e.g. http://127.0.0.1:8000/v1; default: that of the command"
    )
    generation_model: str | None = _key(None, "generation", "name of the weights on the server; default: their path")
    generation_protocol: Literal["token_ids", "text"] = _key(
        "token_ids", "generation", "text: for transformers serve; responses are encoded anew"
    )
    generation_concurrency: int = _key(64, "generation", "rows asked of the server at a time")
    generation_timeout: float = _key(600.0, "generation", "seconds that one answer of the server may take")
    generation_wait: float = _key(900.0, "generation", "seconds to wait for a server that starts or is away")
    generation_tolerance: float = _key(
        0.1, "generation", "nats a token that the server's log-probs may differ from our own weights'"
    )

    output_dir: str = _key("tspin-run", "loop", "the run directory")
    iterations: int = _key(5, "loop", "rounds of self-play (the paper's 0 to 4)")
    seed: int = _key(42, "loop", "of sampling, order and initialisation alike")
    allow_config_change: bool = _key(False, "loop", "go on with a run directory made by another config")

    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for key in loop_fields():
            setattr(self, key, _coerce(key, getattr(self, key), hints[key]))
        self.training = {key: _coerce_training(key, value) for key, value in self.training.items()}
        _validate(self)

    @classmethod
    def from_file(cls, path: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> SelfPlayConfig:
        """The config in a flat YAML file (None: no file) with overrides on top; see `read_values` for both."""
        return cls.from_dict(read_values(path, overrides))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SelfPlayConfig:
        """The config of flat keys, loop and training keys side by side."""
        loop = loop_fields()
        # A misspelt key first: it may be the one that is missing.
        training = {key: _coerce_training(key, value) for key, value in values.items() if key not in loop}
        missing = [key for key, f in loop.items() if f.default is _REQUIRED and key not in values]
        if missing:
            raise ValueError(f"{missing[0]} is required: set it in the config file or give --{missing[0]} VALUE")
        return cls(**{key: value for key, value in values.items() if key in loop}, training=training)

    def to_dict(self) -> dict[str, Any]:
        """Flat and YAML-safe: every loop key in the order of the class, then the given training keys by name."""
        return {key: getattr(self, key) for key in loop_fields()} | dict(sorted(self.training.items()))

    def save(self, path: str | Path) -> None:
        """Write the flat YAML that `from_file` reads back to an equal config."""
        text = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
        Path(path).write_text(text, encoding="utf-8")

    def diff(self, other: SelfPlayConfig) -> list[tuple[str, Any, Any]]:
        """The keys whose effective values differ, as (key, ours, theirs); a key left out counts as its default.

        Keys that do not change a run's result are not compared: `output_dir`, `allow_config_change`, and how a server is reached
        and waited for.
        """
        pairs = [(k, getattr(self, k), getattr(other, k)) for k in loop_fields() if k not in _NOT_COMPARED]
        for key in sorted(self.training.keys() | other.training.keys()):
            default = default_of(training_fields()[key])
            pairs.append((key, self.training.get(key, default), other.training.get(key, default)))
        return [(key, ours, theirs) for key, ours, theirs in pairs if ours != theirs]

    def training_at(self, iteration: int) -> dict[str, Any]:
        """The training keys of one iteration: a per-iteration list gives its entry, its last one ever after."""
        hints = _training_hints()
        return {
            key: value[min(iteration, len(value) - 1)] if _is_per_iteration(value, hints[key]) else value
            for key, value in self.training.items()
        }

    def training_value(self, key: str) -> Any:
        """A training key that is the same in all iterations: the given value, else the default of TSPINConfig."""
        return self.training.get(key, default_of(training_fields()[key]))


def loop_fields() -> dict[str, dataclasses.Field]:
    """The fields of the loop's own keys, in order."""
    return {f.name: f for f in dataclasses.fields(SelfPlayConfig) if f.name != "training"}


def training_fields() -> dict[str, dataclasses.Field]:
    """The fields of TSPINConfig that a config may set beside the loop's own. Imports torch."""
    from tspin.training_args import TSPINConfig

    taken = loop_fields().keys() | _OWNED_BY_THE_LOOP.keys()
    fields = [f for f in dataclasses.fields(TSPINConfig) if f.init and not f.name.startswith("hub_")]
    return {f.name: f for f in fields if f.name not in taken}


def read_values(path: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> dict[str, Any]:
    """Flat keys and values of a YAML file with overrides on top, not yet checked against any field.

    Args:
        path: the YAML file; None reads none.
        overrides: a mapping, or command-line words: `--key value`, `--key=value`, or `--key` alone for true. Dashes in
            a key count as underscores, the text `null` as None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a flat YAML mapping, or the words do not form overrides.
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise FileNotFoundError(f"config: want a YAML file, got {path}, which does not exist or is no file")
        try:
            loaded = yaml.load(path.read_bytes().decode("utf-8-sig"), Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"config: {path} is not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ValueError(f"config: want `key: value` lines in {path}, got a {type(loaded).__name__}")
        values = loaded or {}
    values |= overrides if isinstance(overrides, Mapping) else _parse_words(overrides)
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"config: want keys that are words, got {reprlib.repr(wrong[0])}; is it indented wrongly?")
    return values


def _parse_words(words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"overrides: want --key value, got {word!r}; a value with spaces needs quotes")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if equals:
            values[key] = value
        elif rest and not rest[0].startswith("--"):
            values[key] = rest.pop(0)
        else:
            values[key] = True
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars (5e-7 is a number; on, off and 12:30 are text); no aliases, tags or repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "aliases and tags are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, and escapes line ends."""

    def represent_str(self, data):
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _tag, _pattern in (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$")),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"^(?:[-+]?(?:0|[1-9]\d*))$")),
    ("float", _FLOAT),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


@functools.cache
def _training_hints() -> dict[str, Any]:
    from tspin.training_args import TSPINConfig

    hints = typing.get_type_hints(TSPINConfig)
    return {key: hints[key] for key in training_fields()}


def typed_value(key: str, value: Any) -> Any:
    """The value of a loop or training key as its field's type; ValueError where it is not one."""
    hints = typing.get_type_hints(SelfPlayConfig)
    return _coerce(key, value, hints[key]) if key in loop_fields() else _coerce_training(key, value)


def _coerce_training(key: str, value: Any) -> Any:
    """A training key's value, or the list of its values per iteration."""
    if why := _OWNED_BY_THE_LOOP.get("push_to_hub" if key.startswith("hub_") else key):
        raise ValueError(f"{key} may not be set: {why}")
    hints = _training_hints()
    if key not in hints:
        close = difflib.get_close_matches(key, [*loop_fields(), *hints, "config"], n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown key {key!r}{suggestion} (`tspin run --help` lists the keys)")
    if isinstance(value, str) and value.startswith("["):
        value = _parse_text(value)
    if not _is_per_iteration(value, hints[key]):
        return _coerce(key, value, hints[key])
    if not value or key == "max_length":
        raise ValueError(f"{key}: want one value{' or more' * (key != 'max_length')}, got {reprlib.repr(value)}")
    return [_coerce(key, entry, hints[key]) for entry in value]


def _is_per_iteration(value: Any, hint: Any) -> bool:
    return isinstance(value, list) and not any(_kind(member) in (list, Any) for member in _members(hint))


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """The value as its field's type; text may stand for any type, as on the command line."""
    members = _members(hint)
    for member in members:
        try:
            return _read(value, member)
        except (TypeError, KeyError, ValueError, OverflowError, RecursionError):
            continue
    remedy = "; put it in quotes" if str in members and isinstance(value, (bool, int, float)) else ""
    raise ValueError(f"{key}: want {type_name(hint)}, got {reprlib.repr(value)} ({type(value).__name__}){remedy}")


def _members(hint: Any) -> list[Any]:
    """The alternatives of a union, strictest first; str takes any text, so it comes last."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if union else [hint]
    order = [types.NoneType, Literal, bool, int, float, list, dict, enum.Enum, str, Any]
    return sorted(members, key=lambda member: order.index(_kind(member)) if _kind(member) in order else len(order))


def _kind(member: Any) -> Any:
    if isinstance(member, type) and issubclass(member, enum.Enum):
        return enum.Enum
    return typing.get_origin(member) or member


def _read(value: Any, member: Any) -> Any:
    """The value read as one plain type; TypeError, KeyError, ValueError or OverflowError when it is not one."""
    kind = _kind(member)
    if kind is Any:
        return value
    if kind is types.NoneType and (value is None or value == "null"):
        return None
    if kind is bool and isinstance(value, (bool, str)):
        return _BOOLEANS[str(value).lower()]
    if kind in (int, float) and not isinstance(value, bool):
        return _read_number(value, kind)
    if kind is Literal and any(value == choice and type(value) is type(choice) for choice in typing.get_args(member)):
        return value
    if kind in (list, dict):
        parsed: Any = _parse_text(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
        inner = (typing.get_args(member) or (Any,))[-1]
        if isinstance(parsed, kind):
            if isinstance(parsed, dict):
                return {name: _coerce(str(name), entry, inner) for name, entry in parsed.items()}
            return [_coerce("entry", entry, inner) for entry in parsed]
    if kind is enum.Enum:
        return member(value).value
    if kind is str and isinstance(value, str):
        return value.encode("utf-8").decode("utf-8")
    raise TypeError(f"not a {kind}")


def _read_number(value: Any, kind: type) -> int | float:
    if kind is int and not isinstance(value, float):
        with contextlib.suppress(ValueError):
            return int(value)
    number = float(value)
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise ValueError("not such a number")
    return kind(number)


def _parse_text(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text


def type_name(hint: Any) -> str:
    """A type as a user reads it, e.g. `error or skip`, `list of text`."""
    if len(members := _members(hint)) > 1:
        return " or ".join(map(type_name, members))
    kind, args = _kind(hint), typing.get_args(hint)
    if kind in (Literal, enum.Enum):
        return " or ".join(str(getattr(choice, "value", choice)) for choice in args or hint)
    if kind in (list, dict) and args:
        return f"{kind.__name__} of {type_name(args[-1])}"
    return {types.NoneType: "null", str: "text", bool: "true or false", Any: "anything"}.get(kind, kind.__name__)


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _validate(config: SelfPlayConfig) -> None:
    least = dict.fromkeys(("iterations", "max_new_tokens", "generation_batch_size", "shard_size"), 1)
    least |= {
        "lora_r": 1,
        "lora_alpha": 1,
        "max_rows": 1,
        "eval_rows": 1,
        "tasks_limit": 1,
        "generation_concurrency": 1,
    }
    least |= {"top_k": 0, "temperature": 0, "seed": 0, "generation_tolerance": 0}
    for key, bound in least.items():
        _want(config, key, (value := getattr(config, key)) is None or bound <= value < 2**32, f"{bound} or more")
    for key in ("model_name_or_path", "dataset", "dataset_split", "eval_split", "output_dir"):
        _want(config, key, bool(getattr(config, key).strip()), "a name that is not empty")
    _want(config, "quantization", config.use_peft or config.quantization == "none", "use_peft: true beside it")
    for key in ("generation_timeout", "generation_wait"):
        _want(config, key, 0 < getattr(config, key) < 2**32, "a number of seconds above 0")
    plain = config.generation_backend == "transformers"
    _want(config, "generation_backend", plain or config.quantization == "none", "transformers beside quantization")
    if config.generation_backend == "openai":
        from tspin.server import check_settings

        check_settings(config)
    _want(config, "top_p", 0 < config.top_p <= 1, "more than 0 and at most 1")
    is_template = config.prompt_template == "chat" or config.prompt_template.count("{prompt}") == 1
    _want(config, "prompt_template", is_template, "text that contains {prompt} once, or the word chat")
    is_pair = config.prompt_column is None or config.response_column is not None
    _want(config, "prompt_column", is_pair, "response_column beside it")
    try:
        re.compile(config.answer_pattern or "")
    except re.error as error:
        raise ValueError(f"answer_pattern: want a regular expression, got {config.answer_pattern!r}: {error}") from None


def _want(config: SelfPlayConfig, key: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key}: want {wanted}, got {reprlib.repr(getattr(config, key))}")
