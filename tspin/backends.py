"""The backend that `generation_backend` names: opened for one policy, and in a run for one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.generate import Backend


@contextmanager
def opened(
    config: SelfPlayConfig,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[], PreTrainedModel],
    *,
    weights: Callable[[], str],
    log: Path,
    autocast_dtype: torch.dtype | None,
) -> Iterator[dict[str, Any]]:
    """The arguments of `generate_responses` that say what samples: model and backend.

    Args:
        load: the policy, on this process's device.
        weights: the directory of the policy; asked for only where a server is to load it.
        log: file for the output of a server that is started.
    Raises:
        ValueError: the backend lacks a package, or its command cannot be run.
    """
    if config.generation_backend == "openai":
        from tspin.remote import Server

        server = Server(config, tokenizer, load, weights=weights(), log=log, autocast_dtype=autocast_dtype)
        try:
            yield {"model": None, "backend": server.backend}
        finally:
            server.close()
    elif config.generation_backend == "continuous":
        from tspin.continuous import sample_continuous

        # Its cache has the dtype of the weights, so what autocast would compute in is what they are rounded to.
        model: Any = load()
        model = model if autocast_dtype is None else model.to(autocast_dtype)
        yield {
            "model": model,
            "backend": Backend(sample_continuous, {"backend": "continuous", "dtype": str(model.dtype)}),
        }
    else:
        yield {"model": load(), "backend": None}


class Samplers(ExitStack):
    """What samples from pi_t, for the iterations of a run; at most one is open.

    read: pi_t on this process's device. weights: the directory of pi_t.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        tokenizer: PreTrainedTokenizerBase,
        read: Callable[[int], PreTrainedModel],
        weights: Callable[[int], str],
        log: Path,
        autocast_dtype: torch.dtype | None,
    ):
        super().__init__()
        self.config, self.tokenizer, self.read, self.weights = config, tokenizer, read, weights
        self.log, self.autocast_dtype = log, autocast_dtype
        self.iteration, self.arguments = -1, {}

    def at(self, t: int) -> dict[str, Any]:
        """The arguments that `opened` yields for pi_t, until the next call or `close`.

        A server of pi_t goes on; a model is read anew, so that no stage depends on what an earlier one did to it.
        """
        if self.iteration != t or self.config.generation_backend != "openai":
            self.close()
            made = opened(
                self.config,
                self.tokenizer,
                lambda: self.read(t),
                weights=lambda: self.weights(t),
                log=self.log,
                autocast_dtype=self.autocast_dtype,
            )
            self.arguments, self.iteration = self.enter_context(made), t
        return self.arguments

    def scorer(self, t: int) -> PreTrainedModel | None:
        """pi_t where it lies open as it is: batched decoding leaves it so, continuous batching may have rounded it."""
        is_whole = self.iteration == t and self.config.generation_backend == "transformers"
        return self.arguments["model"] if is_whole else None

    def close(self) -> None:
        """End the server and let go of the model."""
        self.iteration, self.arguments = -1, {}
        super().close()
        if torch.cuda.is_available():
            gc.collect()
