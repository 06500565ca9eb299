"""`tspin check`: what a config, its data and its model come to, and whether they fit, found before a run.

Each step prints one line and the next goes on, so that one call shows everything that is at fault. Imports torch only once a step
needs it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tspin.config import SelfPlayConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tspin.data import Example

# What users can put right: bad values, missing files, missing extras. Anything else is a defect and shows its trace.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ImportError,
)


def one_line(error: Exception) -> str:
    """The message of an error, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def check(
    config: SelfPlayConfig, *, gpu: str | None = None, gpus: int = 1, gpu_memory: str | None = None, rows: int = 2
) -> None:
    """Print what training arguments, tokenizer, data, model, memory and cost come to, and the first rows as tokens.

    gpu: a name of `tspin.cost.GPUS`, to price the run for. gpus: over which FSDP2 divides the model. gpu_memory: of each, as
    "24GB"; default that of `gpu`, else of this machine's. Raises ValueError naming the steps that failed.
    """
    failed: list[str] = []
    if gpus < 1:
        raise ValueError(f"gpus: want 1 or more, got {gpus}")
    if gpu is not None:
        from tspin.cost import gpu_named

        gpu_memory = gpu_memory or str(gpu_named(gpu).gigabytes)

    def step(name: str, work: Callable, *needs: Any) -> Any:
        """Print what `work` finds, and return its result; None when it or something it needs has failed."""
        if any(need is None for need in needs):
            return print(f"--  {name}: not checked, as it needs what failed above")
        try:
            result, text = work(config, *needs)
        except USER_ERRORS as error:
            failed.append(name)
            return print(f"NO  {name}: {one_line(error)}")
        print(f"ok  {name}: {text}")
        return result

    training = step("training", partial(_check_training, gpu=gpu_memory is not None))
    tokenizer = step("tokenizer", _check_tokenizer)
    examples = step("data", _check_data, tokenizer, "train")
    held_out = step("eval data", _check_data, tokenizer, "eval")
    if config.tasks:
        step("tasks", _check_tasks)
    step("model", _check_model, training, tokenizer, examples, held_out)
    step("generation", _check_generation)
    step("memory", partial(_check_memory, gpu_memory=gpu_memory, gpus=gpus, examples=examples or []), training)
    if gpu is not None:
        step("cost", partial(_check_cost, gpu=gpu, gpus=gpus), training, examples, held_out)
    for example in (examples or [])[:rows]:
        print(f"\nrow {example.row}: {len(example.prompt_ids)} prompt and {len(example.response_ids)} response tokens")
        print(f"prompt    {_shown(tokenizer, example.prompt_ids)}")
        print(f"response  {_shown(tokenizer, example.response_ids)}")
    if failed:
        raise ValueError(f"check failed: {', '.join(failed)} (see above)")


def _check_training(config: SelfPlayConfig, *, gpu: bool) -> tuple[Any, str]:
    import torch

    from tspin.loading import training_args_of

    # Arguments meant for a GPU that this machine lacks are refused, unless the CPU is chosen outright.
    elsewhere = {"use_cpu": True} if gpu and not torch.cuda.is_available() else {}
    iterations = [training_args_of(config, t, **elsewhere) for t in range(config.iterations)]
    for t, args in enumerate(iterations):
        args.rehearse()
        if gpu:
            # The default on a GPU, which may not be this machine's.
            args.bf16 = args.bf16 or (not args.fp16 and config.training_at(t).get("bf16") is None)
    texts = [f"{a.method}, beta {a.beta_at(t):g}, lr {a.learning_rate:g}" for t, a in enumerate(iterations)]
    return iterations, "; ".join(f"iteration {t}: {text}" for t, text in enumerate(texts))


def _check_tokenizer(config: SelfPlayConfig) -> tuple[Any, str]:
    from tspin.data import Encoder, end_token_ids
    from tspin.loading import tokenizer_of

    tokenizer = tokenizer_of(config)
    stop_ids = end_token_ids(config, tokenizer)
    Encoder(tokenizer, config.prompt_template, stop_ids)
    ends = _shown(tokenizer, stop_ids)
    return tokenizer, f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, start {tokenizer.bos_token}, ends {ends}"


def _check_data(config: SelfPlayConfig, tokenizer: Any, split: str) -> tuple[list[Example], str]:
    from tspin.data import load_examples
    from tspin.evaluate import extract_answer

    if split == "eval" and config.eval_dataset is None:
        return [], "none, so nothing will be measured on held-out rows"
    examples, _ = load_examples(config, tokenizer, split=split)
    prompts, responses = (
        [len(ids) for ids in column] for column in zip(*((e.prompt_ids, e.response_ids) for e in examples))
    )
    text = (
        f"{len(examples)} rows, prompts of {min(prompts)} to {max(prompts)} tokens, responses of {min(responses)} to "
    )
    text += f"{max(responses)}"
    if split == "train":
        return examples, text
    answers = {e.row: extract_answer(e.response, config.answer_pattern) for e in examples}
    without = [row for row, answer in answers.items() if answer is None]
    if without:
        raise ValueError(
            f"answer_pattern: want a match in every annotated response, got none for {config.answer_pattern!r} in "
            f"{len(without)} of {len(examples)} rows, first in row {without[0]}; correct the pattern"
        )
    first = answers[examples[0].row] or ""
    return examples, f"{text}; first answer {first[:60]!r}{'...' if len(first) > 60 else ''}"


def _check_tasks(config: SelfPlayConfig) -> tuple[Any, str]:
    from tspin.harness import Harness, benchmarks

    wanted = benchmarks(config.tasks or [])
    harness = Harness(wanted, config.include_path)
    shots = (f"{b.name} {'its own' if b.shots is None else b.shots}" for b in wanted)
    return harness, f"lm-evaluation-harness has all {len(wanted)}; shots: {', '.join(shots)}; data not looked at"


def _check_model(
    config: SelfPlayConfig, training: list[Any], tokenizer: Any, train: list[Example], held_out: list[Example]
) -> tuple[Any, str]:
    from tspin import tiling
    from tspin.fitting import model_without_weights
    from tspin.loading import add_adapter, lora_config, model_of
    from tspin.model import disable_dropout, probe_head, vocabulary_size
    from tspin.prefix import refusal

    path = Path(config.model_name_or_path)
    bare = path.is_dir() and not any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in path.iterdir())
    model: Any = model_without_weights(config) if bare else model_of(config)
    peft_config, examples = lora_config(config), [*train, *held_out]
    text = f"{type(model).__name__}, {model.num_parameters():,} parameters"
    if len(tokenizer) > (vocabulary := vocabulary_size(model)):
        raise ValueError(
            f"tokenizer: want at most the model's {vocabulary} tokens, got {len(tokenizer)}; is it its own?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(e.prompt_ids) + max(len(e.response_ids), config.max_new_tokens) for e in examples)
    if positions is not None and longest > positions:
        raise ValueError(
            f"want rows of at most {positions} positions, got {longest}; lower max_length or max_new_tokens"
        )
    if training[0].sequence_tiling == "on":
        disable_dropout(model)  # as the trainer does
        if why := tiling.refusal(model):
            raise ValueError(f"sequence_tiling: want 'off', got 'on': {why}")
    why = None if training[0].prefix_sharing == "off" else refusal(model)
    if why is not None and training[0].prefix_sharing == "on":
        raise ValueError(f"prefix_sharing: {why}, so its prompts cannot be shared; use prefix_sharing='off'")
    text += f"; a row of its own for every response, as {why}" if why is not None else ""
    if bare:
        return model, f"{text}, of config.json alone: no weights to score with"
    if training[0].fused == "off":
        return model, text
    try:
        probe_head(model if peft_config is None else add_adapter(model, peft_config, seed=config.seed))
    except ValueError as error:
        if training[0].fused == "on":
            raise
        return model, f"{text}; fused='auto' will take its logits ({one_line(error)})"
    return model, f"{text}, scores through its output head"


def _check_generation(config: SelfPlayConfig) -> tuple[Any, str]:
    backend = config.generation_backend
    if backend == "transformers":
        return backend, "by transformers, in this process"
    if backend == "continuous":
        from tspin.continuous import sample_continuous

        return sample_continuous, "by continuous batching, in this process"
    from tspin.remote import answers
    from tspin.server import command_words

    if config.generation_server_command is not None:
        words = command_words(config.generation_server_command, config.model_name_or_path, 0)
        return words, f"by {words[0]}, started for the weights of each iteration; they are compared when it runs"
    assert config.generation_url is not None
    if not answers(config.generation_url):
        raise ValueError(
            f"generation_url: want a server that answers, got none at {config.generation_url}; start it first"
        )
    return backend, f"by the server at {config.generation_url}, which answers; its weights are compared when it is used"


def _check_memory(
    config: SelfPlayConfig, training: list[Any], *, gpu_memory: str | None, gpus: int, examples: list[Example]
) -> tuple[Any, str]:
    import torch

    from tspin.fitting import MemoryCheck, parse_memory
    from tspin.memory import Context

    iteration = max(range(len(training)), key=lambda t: len(training[t].members_at(t)))
    args, size = training[iteration], None if gpu_memory is None else parse_memory(gpu_memory)
    if size is None and not args.use_cpu and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    members, new = len(args.members_at(iteration)), config.max_new_tokens
    pairs = [(len(e.prompt_ids), len(e.response_ids)) for e in examples] or [(max(args.max_length - new, 1), new)]
    # The longest triplets that data and max_length allow, in one micro-batch: samples end where max_length does.
    contexts = [Context(p, (r, *[max(1, min(new, args.max_length - p))] * (members - 1))) for p, r in pairs]
    apart = args.prefix_sharing == "off"
    size_of = lambda c: members * (c.prompt + max(c.responses)) if apart else c.tokens
    longest: Any = heapq.nlargest(args.per_device_train_batch_size, contexts, key=size_of)
    longest = longest if examples else longest[0]
    try:
        check = MemoryCheck.of_run(config, args, longest, size, gpus=gpus)
        print(*check.spared().table(), sep="\n")
        return check, check.verdict()
    except USER_ERRORS:
        raise
    except Exception as error:  # of a model's own code, on tensors without data
        return None, f"not predicted, as the model does not run without data: {type(error).__name__}, {one_line(error)}"


def _check_cost(
    config: SelfPlayConfig, training: list[Any], train: list[Example], held_out: list[Example], *, gpu: str, gpus: int
) -> tuple[Any, str]:
    from tspin.cost import Cost, gpu_named
    from tspin.fitting import model_without_weights

    lengths, answers = ([(len(e.prompt_ids), len(e.response_ids)) for e in rows] for rows in (train, held_out))
    cost = Cost(config, model_without_weights(config), training, lengths, answers, gpu_named(gpu))
    print(*cost.table(), sep="\n")
    return cost, cost.verdict(gpu, gpus)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as the tokenizer names them, separated by bars, special ones in [[ ]]; the middle of a long list left out."""
    names = [
        f"[[{name}]]" if token in tokenizer.all_special_ids else str(name).replace("\n", "\\n")
        for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)))
    ]
    return " | ".join(names if len(names) <= 48 else [*names[:32], "...", *names[-16:]])
