"""Sampling by a server of the OpenAI completions API: vLLM, SGLang, or `transformers serve`.

One request is one row, with the row's own seed. Before the first shard, and again before each one counts, the server must
continue a few prompts greedily as our own weights do: so a server of other weights is refused, be it wrong from the start
or restarted meanwhile. A request that fails is asked again, later and later, within bounds of count and time; a server of
our own that dies is started again.

Deliberately knows nothing of shards; what is said to the server is in `tspin.completions`, its process in `tspin.server`.
The key of a server goes into the header of a request and nowhere else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tspin.completions import AgainError, Answer, Text, TokenIds
from tspin.data import stop_token_ids
from tspin.generate import Backend, Generation, check_request, sample_responses, text_of
from tspin.model import vocabulary_size
from tspin.server import KEY_VARIABLE, ServerProcess, command_words, free_port, server_key, without_key

if TYPE_CHECKING:
    import httpx2

    from tspin.config import SelfPlayConfig
    from tspin.data import Example

logger = logging.getLogger(__name__)

TRIES, RESTARTS = 8, 3
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED_PAUSE = 0.5, 30.0, 120.0
PROBES, PROBE_TOKENS = 3, 8
HEALTH_SECONDS = 5
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True)
class _Probe:
    """A prompt's greedy continuation by our own weights: tokens, their log-probs and their leads over the next best, nats."""

    example: Example
    token_ids: list[int]
    logprobs: list[float]
    leads: list[float]


class Server:
    """Samples from one policy on a server; `backend` is what `generate_responses` takes.

    Args:
        load: our own copy of the policy; asked for once, before a server of ours is started, and let go of again.
        weights: the directory of the policy, which a server of ours is given.
        log: the file for its output.
    Raises:
        ValueError: httpx2 is missing, or the command cannot be run.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        tokenizer: Tokenizer,
        load: Callable[[], PreTrainedModel],
        *,
        weights: str,
        log: Path,
        autocast_dtype: torch.dtype | None = None,
    ):
        try:
            import httpx2  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "generation_backend: openai wants the package httpx2, which is missing; pip install 'tspin[server]'"
            ) from error
        port = free_port()
        self.config, self.tokenizer, self._load, self.weights = config, tokenizer, load, weights
        self.url = (config.generation_url or f"http://127.0.0.1:{port}/v1").rstrip("/")
        self.backend = Backend(self.sample, {"backend": "openai", "protocol": config.generation_protocol})
        self._autocast_dtype = autocast_dtype
        self._is_open, self._restarts = False, 0
        self._protocol: TokenIds | Text | None = None
        self._probes: list[_Probe] = []
        self._process: ServerProcess | None = None
        if config.generation_server_command is not None:
            self._process = ServerProcess(command_words(config.generation_server_command, weights, port), log)

    def close(self) -> None:
        """End the server if it is ours."""
        self._is_open = False
        if self._process is not None:
            self._process.stop()

    def sample(
        self,
        model: PreTrainedModel | None,
        tokenizer: Tokenizer,
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
        """As `tspin.generate.sample_responses`, by the server's random numbers; model, batch_size and autocast_dtype are its own.

        Raises:
            ValueError: as there; the server stays away, gives no usable answer, refuses, or serves other weights.
        """
        from anyio.from_thread import start_blocking_portal

        check_request(model, examples, max_new_tokens, temperature, top_p, top_k, batch_size)
        if not examples:
            return []
        self._prepare(examples)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        with start_blocking_portal() as portal:
            answers = portal.call(self._sample, examples, seed, max_new_tokens, sampling, progress)
        if inexact := sum(not answer.is_exact for answer in answers):
            logger.warning("%d of %d responses were encoded to other tokens than were sampled", inexact, len(answers))
        return [
            Generation(a.token_ids, "stop" if a.stopped else "length", text_of(tokenizer, a.token_ids)) for a in answers
        ]

    def _prepare(self, examples: Sequence[Example]) -> None:
        """What our own weights say to the first prompts, once."""
        if self._protocol is not None:
            return
        model: Any = self._load().eval()
        chosen = examples[:PROBES]
        stop_ids = stop_token_ids(self.tokenizer, model.generation_config)
        options = {"max_new_tokens": PROBE_TOKENS, "temperature": 0.0, "autocast_dtype": self._autocast_dtype}
        enabled = self._autocast_dtype is not None
        for example, greedy in zip(chosen, sample_responses(model, self.tokenizer, chosen, seed=0, **options)):
            ids = torch.tensor([[*example.prompt_ids, *greedy.token_ids]], device=model.device)
            with torch.no_grad(), torch.autocast(model.device.type, self._autocast_dtype, enabled=enabled):
                logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
            first, second = logits.float().log_softmax(-1).topk(2).values.T
            self._probes.append(_Probe(example, greedy.token_ids, first.tolist(), (first - second).tolist()))
        vocabulary = vocabulary_size(model)
        del model
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        speaks = TokenIds if self.config.generation_protocol == "token_ids" else Text
        name = self.config.generation_model or self.weights
        self._protocol = speaks(name, self.tokenizer, stop_ids, vocabulary)

    async def _sample(
        self,
        examples: Sequence[Example],
        seed: int,
        max_new_tokens: int,
        sampling: dict[str, Any],
        progress: tqdm | None,
    ) -> list[Answer]:
        import anyio
        import httpx2

        key, concurrency = server_key(), min(self.config.generation_concurrency, len(examples))
        client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(self.config.generation_timeout, connect=10, pool=None),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,  # a proxy is not for the loopback, and would see the prompts
        )
        self._reviving = anyio.Lock()
        answers: dict[int, Answer] = {}
        errors: list[ValueError] = []
        rows = iter(enumerate(examples))

        async def work() -> None:
            try:
                for index, example in rows:
                    answers[index] = await self._ask(client, example, seed, max_new_tokens, sampling)
                    if progress is not None:
                        progress.update()
            except ValueError as error:
                errors.append(error)
                workers.cancel_scope.cancel()

        async with client:
            if not self._is_open:
                if self._process is not None:
                    self._process.start()
                    await self._until_ready(client)
                await self._verify(client)
                self._is_open = True
            async with anyio.create_task_group() as workers:
                for _ in range(concurrency):
                    workers.start_soon(work)
            if errors:
                raise errors[0]
            await self._verify(client)
        self._restarts = 0
        return [answers[index] for index in range(len(examples))]

    async def _until_ready(self, client: httpx2.AsyncClient) -> None:
        import anyio

        assert self._process is not None
        process, wait = self._process, self.config.generation_wait
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            try:
                process.check_alive()
            except ChildProcessError as death:
                raise ValueError(f"generation_server_command: {death}") from death
            if await _is_up(client, self.url):
                return
            await anyio.sleep(0.1)
        raise ValueError(
            f"generation_server_command: the server is not ready after {wait:g} s; the end of {process.log}: "
            f"{process.last_words()!r}; raise generation_wait or repair the command"
        )

    async def _revive(self, client: httpx2.AsyncClient) -> None:
        """Start a server of ours again if it has died."""
        if self._process is None:
            return
        async with self._reviving:
            try:
                self._process.check_alive()
            except ChildProcessError as death:
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise ValueError(
                        f"generation_server_command: {death}; it was started again {RESTARTS} times"
                    ) from death
                logger.warning("%s; starting it again", death)
                self._process.start()
                await self._until_ready(client)

    async def _verify(self, client: httpx2.AsyncClient) -> None:
        """Compare the server's greedy continuations with those of our own weights."""
        assert self._protocol is not None
        compared, differences, limit = 0, [], self.config.generation_tolerance
        for probe in self._probes:
            answer = await self._ask(client, probe.example, 0, PROBE_TOKENS, _GREEDY, logprobs=True)
            for step, lead in enumerate(probe.leads):
                if not self._protocol.agrees(answer, probe.token_ids, step):
                    if lead > 4 * limit:
                        raise self._mismatch(
                            f"its greedy token {step} for row {probe.example.row} is not ours, by {lead:.3g} nats"
                        )
                    break
                compared += 1
                if answer.logprobs is not None:
                    differences.append(abs(answer.logprobs[step] - probe.logprobs[step]))
        mean = sum(differences) / len(differences) if differences else 0.0
        if not mean <= limit:  # a NaN too
            raise self._mismatch(f"its log-probs differ from ours by {mean:.3g} nats a token")
        if not compared:
            raise self._mismatch("none of its first greedy tokens is ours")
        logger.info(
            "the server agrees with %s in %d greedy tokens, log-probs within %.2g nats", self.weights, compared, mean
        )

    def _mismatch(self, what: str) -> ValueError:
        return ValueError(
            f"generation_backend: the server at {self.url} does not serve {self.weights}: {what}; start it with these "
            f"weights, or raise generation_tolerance ({self.config.generation_tolerance:g}) if its precision is lower"
        )

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        example: Example,
        seed: int,
        max_new_tokens: int,
        sampling: dict[str, Any],
        logprobs: bool = False,
    ) -> Answer:
        """The server's answer for one row, asked for until it is one.

        Raises:
            ValueError: it was wrong 8 times, the server was away for generation_wait, or it refuses.
        """
        import anyio

        assert self._protocol is not None
        body = self._protocol.request(example, seed, max_new_tokens, sampling) | ({"logprobs": 1} if logprobs else {})
        wrong, pause, away_since = 0, FIRST_PAUSE, None
        while True:
            try:
                return self._protocol.read(await self._post(client, body), example, max_new_tokens)
            except ValueError as error:
                raise ValueError(without_key(str(error))) from None
            except AgainError as again:
                # An answer may repeat the key, and be cut only where none is left.
                what = without_key(str(again))[:400]
                now = time.monotonic()
                if again.busy:
                    away_since = now if away_since is None else away_since
                else:
                    wrong, away_since = wrong + 1, None
                if wrong == TRIES or (away_since is not None and now - away_since > self.config.generation_wait):
                    raise ValueError(
                        f"generation_backend: no usable answer from the server at {self.url} for row {example.row}: {what}; "
                        "look into its log; the same command goes on from the last whole shard"
                    ) from None
                logger.info("row %d: %s; asking again", example.row, what)
                await self._revive(client)
                asked = min(again.pause, LONGEST_ASKED_PAUSE)
                await anyio.sleep(max(asked, pause * random.SystemRandom().uniform(0.5, 1)))
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Any:
        """The JSON value that one POST brings."""
        import anyio
        import httpx2

        timeout = self.config.generation_timeout
        try:
            with anyio.fail_after(timeout):  # the client's own limit is between two bytes
                response = await client.post(self.url + "/completions", json=body)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise AgainError(f"no answer within {timeout:g} s (generation_timeout)") from None
        except httpx2.LocalProtocolError as error:
            raise ValueError(
                f"generation_backend: no request can be sent to {self.url}: {error}; repair {KEY_VARIABLE} or generation_url"
            ) from error
        except httpx2.HTTPError as error:
            raise AgainError(f"{type(error).__name__} {error}", busy=True) from error
        status = response.status_code
        text = " ".join(without_key(response.content.decode(errors="replace")).split())[:300]
        if status in (429, 502, 503, 504):
            pause = _retry_after(response.headers.get("retry-after"))
            raise AgainError(f"HTTP {status}: {text}", busy=True, pause=pause)
        if status >= 500 or status in (408, 409, 425):
            raise AgainError(f"HTTP {status}: {text}")
        if status != 200:
            remedy = f"; set {KEY_VARIABLE} in the environment" if status in (401, 403) else ""
            raise ValueError(f"generation_backend: the server at {self.url} refuses: HTTP {status}: {text}{remedy}")
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise AgainError(f"no JSON: {error}") from error


def answers(url: str) -> bool:
    """Whether something that speaks HTTP listens at `url`; waits for 5 seconds at most."""
    import anyio
    import httpx2

    async def ask() -> bool:
        async with httpx2.AsyncClient(trust_env=False) as client:
            return await _is_up(client, url)

    return anyio.run(ask)


async def _is_up(client: httpx2.AsyncClient, url: str) -> bool:
    import anyio
    import httpx2

    # The client's own limit is between two bytes.
    with anyio.move_on_after(HEALTH_SECONDS), contextlib.suppress(httpx2.HTTPError):
        return (await client.get(_health(url))).status_code < 500
    return False


def _health(url: str) -> str:
    # Beside /v1, in vLLM, SGLang and transformers serve alike; a server without it says 404.
    return url.rstrip("/").removesuffix("/v1") + "/health"


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait, as a number or a date; 0 for none or nonsense."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
