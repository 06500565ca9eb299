"""Sampling by transformers' continuous batching: a row that ends makes room for the next at once, over a paged cache.

The draws are those of `tspin.generate`: row r's t-th token is the inverse of the policy's distribution function at the
t-th uniform number of row r, whatever is batched with it, so both backends give the same responses but for the rounding
of logits. Continuous batching would else draw from one stream shared by all requests, in an order that depends on the
clock. To this end its one list of logits processors holds only ours, which leaves each row a single token to choose;
nothing of the model's generation_config takes part.

Deliberately knows nothing of shards. The places of transformers that it relies on (its manager's `logit_processor`, and
a request's `position_offset`) are not public: what it gets is checked, and a version that has changed them is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from tspin.data import stop_token_ids
from tspin.generate import Generation, check_request, next_tokens, row_uniforms, text_of

if TYPE_CHECKING:
    from tspin.data import Example

# Tokens of a page of the cache, transformers' default.
_PAGE = 256


class _RowDraws(ContinuousBatchingLogitsProcessor):
    """Turns the logits of each request into its row's own draw: 0 for the token, -inf for all others.

    uniforms: [rows, max_new_tokens] float64 on the model's device. A request is named by its index among the rows.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, uniforms: torch.Tensor, prompt_lengths: Sequence[int], sampling: dict[str, Any]):
        self.uniforms, self.prompt_lengths, self.sampling = uniforms, prompt_lengths, sampling
        self.steps = [0] * len(prompt_lengths)
        self.saw_nan = torch.zeros((), dtype=torch.bool, device=uniforms.device)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """[requests] int32: where in the flattened uniforms the next draw of each request lies."""
        indices, count = [], self.uniforms.shape[1]
        for request in requests_with_new_token:
            state, index = request.state, 0
            if state.request_id.isdecimal():  # else a request that only warms up
                row = int(state.request_id)
                # The position is known when a token is asked for; the count of tokens lags behind in asynchronous batches.
                step = min(state.position_offset - self.prompt_lengths[row], count - 1)
                self.steps[row] = max(self.steps[row], step + 1)
                index = row * count + step
            indices.append(index)
        return torch.tensor(indices, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        self.saw_nan.logical_or_(scores.isnan().any())
        uniforms = self.uniforms.flatten()[tensor_arg[: len(scores)].long()]
        # NaN would point behind the last token, which on a GPU ends the process instead of reaching the error below.
        chosen = next_tokens(scores, uniforms, **self.sampling).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


def sample_continuous(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 32,
    autocast_dtype: torch.dtype | None = None,
    progress: tqdm | None = None,
) -> list[Generation]:
    """As `tspin.generate.sample_responses`, by continuous batching of at most `batch_size` requests at a time.

    autocast_dtype: None or the model's own; the paged cache has the dtype of the weights, so they must have it too.

    Raises:
        ValueError: as `sample_responses`; autocast to another dtype than the model's; transformers cannot batch this
            model continuously, or does it in a way this module does not know.
    """
    check_request(model, examples, max_new_tokens, temperature, top_p, top_k, batch_size)
    if not examples:
        return []
    if autocast_dtype not in (None, model.dtype):
        raise ValueError(
            f"autocast_dtype: want the model's own {model.dtype}, got {autocast_dtype}; load the model in it"
        )
    stop_ids = list(stop_token_ids(tokenizer, model.generation_config))
    uniforms = torch.stack([row_uniforms(seed, e.row, max_new_tokens) for e in examples]).to(model.device)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    draws = _RowDraws(uniforms, [len(e.prompt_ids) for e in examples], sampling)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    # The manager seeds the global generators.
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            tokens = _run(model, examples, draws, stop_ids, max_new_tokens, batch_size, progress)
        finally:
            model.train(was_training)
    if bool(draws.saw_nan):
        raise ValueError("model gave NaN logits while sampling; its weights are broken, or a lower precision overflows")
    generations = []
    for example, steps, ids in zip(examples, draws.steps, tokens):
        stopped = ids[-1:] != [] and ids[-1] in stop_ids
        if not (len(ids) <= steps and (stopped or len(ids) == max_new_tokens)):
            raise _unknown(f"row {example.row} got {len(ids)} tokens of {steps} draws")
        generations.append(Generation(ids, "stop" if stopped else "length", text_of(tokenizer, ids)))
    return generations


def _run(
    model: Any,
    examples: Sequence[Example],
    draws: _RowDraws,
    stop_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    progress: tqdm | None,
) -> list[list[int]]:
    """The token ids of each example, from a manager that lives as long as this call."""
    if not hasattr(model, "init_continuous_batching"):
        raise _unknown(f"{type(model).__name__} has no init_continuous_batching")
    lengths = [len(e.prompt_ids) + max_new_tokens for e in examples]
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else None
    limits = _limits(model, lengths, batch_size, free)
    if hasattr(ContinuousBatchingConfig, "auto_switch_to_flash"):
        # Flash kernels know no float32.
        limits["auto_switch_to_flash"] = model.dtype in (torch.float16, torch.bfloat16)
    config = ContinuousBatchingConfig(**limits, max_memory_percent=0.8, seed=0)
    hints = WorkloadHints(
        max_prompt_length=max(len(e.prompt_ids) for e in examples),
        max_generated_length=max_new_tokens,
        num_requests=len(examples),
    )
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
    )
    manager, results = None, {}
    try:
        manager = model.init_continuous_batching(greedy, config, hints)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([cast(Any, draws)]))
        processors.tensors_required = 1
        if not (hasattr(manager, "logit_processor") and processors.do_processing):
            raise _unknown("its manager has no logit_processor")
        manager.logit_processor = processors
        manager.warmup()
        for index, example in enumerate(examples):
            manager.add_request(list(example.prompt_ids), str(index), max_new_tokens, eos_token_id=stop_ids)
        manager.start()
        while len(results) < len(examples):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"its thread ended early: {manager.background_thread_status.fatal_error}")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                results[int(result.request_id)] = list(result.generated_tokens)
                if progress is not None:
                    progress.update()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, ValueError) and "generation_backend" in str(error):
            raise
        raise ValueError(
            f"generation_backend: continuous batching of {type(model).__name__} failed: {' '.join(str(error).split())[:300]}; "
            "lower generation_batch_size if memory ran out, or set generation_backend: transformers"
        ) from error
    finally:
        if manager is not None:
            manager.stop(block=True, timeout=60)
            manager.destroy()
    return [results[index] for index in range(len(examples))]


def _limits(model: Any, lengths: Sequence[int], batch_size: int, free: int | None) -> dict[str, Any]:
    """What the cache may be at most: as large as the longest requests need together, where `free` bytes of a GPU hold that.

    Left to itself it takes 60 % of a machine's memory, and 80 % of a GPU's whatever other processes have of it.
    """
    limits: dict[str, Any] = {"max_requests_per_batch": min(batch_size, len(lengths))}
    blocks = sum(-(-length // _PAGE) + 1 for length in sorted(lengths, reverse=True)[:batch_size])
    if free is None:
        return limits | {"num_blocks": blocks, "max_batch_tokens": max(256, batch_size)}
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = 2 * _PAGE * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return limits | ({"num_blocks": blocks} if blocks * block_bytes < free // 2 else {})


def _unknown(why: str) -> ValueError:
    import transformers

    return ValueError(
        f"generation_backend: continuous is not known to work with transformers {transformers.__version__} ({why}); "
        "set generation_backend: transformers"
    )
