"""What is asked of a completions server, and what its answers mean, in the two protocols that `tspin.remote` speaks.

`TokenIds` sends and receives token ids (`return_token_ids`: vLLM >= 0.10.2, SGLang since July 2026). `Text` is for
`transformers serve`, which knows none: a prompt must survive decoding, and a response is encoded anew, which may give other
tokens than were sampled. Each names every sampling parameter, so that nothing of a server's defaults or of the model's
generation_config takes part. Deliberately opens no connection: JSON values in, JSON values out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from tspin.generate import row_seed, text_of

if TYPE_CHECKING:
    from tspin.data import Example

# transformers fills the gaps of a request's generation config from the model's own.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
_NEUTRAL |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_length": 0, "renormalize_logits": False}


class AgainError(Exception):
    """An answer worth asking for again after at least `pause` seconds; `busy` where the server is away or occupied."""

    def __init__(self, what: str, *, busy: bool = False, pause: float = 0.0):
        super().__init__(what)
        self.busy, self.pause = busy, pause


@dataclass(frozen=True)
class Answer:
    """A response: `token_ids` ends with the stop token where `stopped`.

    logprobs: of the tokens, nats, where the server gave them. is_exact: False where encoding gave another number of tokens
    than were sampled.
    """

    token_ids: list[int]
    stopped: bool
    logprobs: list[float] | None = None
    is_exact: bool = True


@dataclass(frozen=True)
class TokenIds:
    """name: of the model on the server. vocabulary: number of tokens that the model knows."""

    name: str
    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    vocabulary: int

    def request(self, example: Example, seed: int, max_new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """The body of a POST; sampling: temperature, top_p, top_k as in `sample_responses`."""
        return {
            "model": self.name,
            "prompt": list(example.prompt_ids),
            "max_tokens": max_new_tokens,
            "seed": _seed(seed, example),
            "temperature": sampling["temperature"],
            "top_p": sampling["top_p"],
            "top_k": sampling["top_k"] or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stream": False,
            "ignore_eos": False,
            "stop_token_ids": list(self.stop_ids),
            "return_token_ids": True,
        }

    def read(self, answer: Any, example: Example, max_new_tokens: int) -> Answer:
        """What the answer says.

        Raises:
            AgainError: it is none, as a server that is ending or broken sends.
            ValueError: it is of another model or prompt, or of a server that cannot be used.
        """
        choice, row = _choice(answer, self.name), example.row
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise ValueError(
                "generation_protocol: the server returns no token ids; want vLLM >= 0.10.2 or an SGLang that knows "
                "return_token_ids, or, for transformers serve, generation_protocol: text"
            )
        if isinstance(prompt, list) and prompt != list(example.prompt_ids):
            raise ValueError(f"generation_backend: the server read another prompt than that of row {row}")
        is_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < self.vocabulary for i in ids)
        if not is_ids or len(ids) > max_new_tokens:
            raise AgainError(f"want at most {max_new_tokens} token ids below {self.vocabulary}, got {ids}")
        logprobs = _token_logprobs(choice, len(ids))
        stopped = bool(ids) and ids[-1] in self.stop_ids
        if not stopped and choice["finish_reason"] == "stop":
            named = choice.get("stop_reason") or choice.get("matched_stop")
            if named not in self.stop_ids and len(self.stop_ids) > 1:
                raise ValueError(
                    f"generation_backend: the server ended row {row} without one of {list(self.stop_ids)}; it stops at other "
                    "tokens than the tokenizer and the generation config name"
                )
            ids, logprobs, stopped = [*ids, named if named in self.stop_ids else self.stop_ids[0]], None, True
        elif not stopped and len(ids) < max_new_tokens:
            raise _cut(row, len(ids), max_new_tokens)
        if set(ids[:-1]) & set(self.stop_ids):
            raise _went_on(row)
        return Answer(ids, stopped, logprobs)

    def agrees(self, answer: Answer, ours: Sequence[int], step: int) -> bool:
        """Whether the answer has our token at `step`, given that it has those before."""
        return answer.token_ids[step : step + 1] == [ours[step]]


@dataclass(frozen=True)
class Text:
    """As `TokenIds`, over text; its seeds are global to the server, so only one request at a time repeats exactly."""

    name: str
    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    vocabulary: int

    def request(self, example: Example, seed: int, max_new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """As `TokenIds.request`.

        Raises:
            ValueError: the prompt does not survive decoding.
        """
        temperature = sampling["temperature"]
        generation = _NEUTRAL | {"do_sample": temperature > 0, "temperature": temperature or 1.0}
        generation |= {"top_p": sampling["top_p"], "top_k": sampling["top_k"]}
        generation |= {"eos_token_id": list(self.stop_ids), "pad_token_id": self.stop_ids[0]}
        return {
            "model": self.name,
            "prompt": self._prompt(example),
            # One more tells a response that ended with its last token from one that was cut.
            "max_tokens": max_new_tokens + 1,
            "seed": _seed(seed, example),
            "generation_config": json.dumps(generation),
        }

    def _prompt(self, example: Example) -> str:
        """Text that the server's tokenizer, which adds its special tokens, turns into the prompt's ids."""
        tokenizer: Any = self.tokenizer
        text = tokenizer.decode(example.prompt_ids, clean_up_tokenization_spaces=False)
        for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
            if tokenizer(candidate).input_ids == list(example.prompt_ids):
                return candidate
        raise ValueError(
            f"generation_protocol: the prompt of row {example.row} does not survive decoding, and its text would prompt the "
            "server with other tokens; use a server that takes token ids and generation_protocol: token_ids"
        )

    def read(self, answer: Any, example: Example, max_new_tokens: int) -> Answer:
        """As `TokenIds.read`; the tokens are those of the text."""
        choice = _choice(answer, self.name)
        text, usage = choice.get("text"), answer.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not _is_text(text) or type(count) is not int or not 0 < count <= max_new_tokens + 1:
            raise AgainError(f"want text and its number of tokens, got {choice}")
        # Servers leave special tokens out; what spells one here is made of ordinary tokens.
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        if set(ids) & set(self.stop_ids):
            raise _went_on(example.row)
        if count <= max_new_tokens:
            if choice["finish_reason"] == "length":
                raise _cut(example.row, count, max_new_tokens)
            return Answer([*ids, self.stop_ids[0]], True, is_exact=len(ids) == count - 1)
        if not ids:
            raise ValueError(
                f"generation_protocol: the response to row {example.row} has only special tokens, which its text does not "
                "show; use a server that returns token ids and generation_protocol: token_ids"
            )
        return Answer(ids[:max_new_tokens], False, is_exact=len(ids) in (count - 1, count))

    def agrees(self, answer: Answer, ours: Sequence[int], step: int) -> bool:
        """As `TokenIds.agrees`, of the texts: tokens that were encoded anew may be others that say the same."""
        theirs, so_far = text_of(self.tokenizer, answer.token_ids), text_of(self.tokenizer, ours[: step + 1])
        if ours[step] in self.stop_ids:
            return answer.stopped and theirs == so_far
        # The rest of a character may be in the next token.
        return theirs.startswith(so_far.rstrip("\ufffd"))


def _cut(row: int, count: int, most: int) -> ValueError:
    return ValueError(
        f"generation_backend: the server cut row {row} after {count} of {most} tokens; raise its longest context "
        "(vLLM: --max-model-len)"
    )


def _went_on(row: int) -> ValueError:
    return ValueError(f"generation_backend: the server went on after a stop token in row {row}")


def _is_text(value: Any) -> bool:
    """Whether it is text without lone surrogates, which JSON may bring and no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _seed(seed: int, example: Example) -> int:
    # 31 bits fit the seeds of every server.
    return row_seed(seed, example.row) >> 32


def _choice(answer: Any, wanted: str) -> dict[str, Any]:
    name = answer.get("model") if isinstance(answer, dict) else None
    if not isinstance(name, str):
        raise AgainError(f"no completion: {answer}")
    # transformers serve appends the revision.
    if name not in (wanted, f"{wanted}@main"):
        raise ValueError(
            f"generation_model: want {wanted!r}, the server answers as {name!r}; start it with these weights, or set "
            "generation_model to its name for them"
        )
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise AgainError(f"want one choice, got {choices}")
    if choices[0].get("finish_reason") not in ("stop", "length"):
        raise AgainError(f"want the finish reason stop or length, got {choices[0].get('finish_reason')!r}")
    return choices[0]


def _token_logprobs(choice: dict[str, Any], count: int) -> list[float] | None:
    detail = choice.get("logprobs")
    values = detail.get("token_logprobs") if isinstance(detail, dict) else None
    if not isinstance(values, list) or len(values) != count:
        return None
    return values if all(isinstance(value, (int, float)) for value in values) else None
