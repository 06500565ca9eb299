"""TRL's preference trainers on `linear_logprobs`: their log-probs and entropies come from it, all else stays TRL's own.

    from trl import DPOTrainer
    from tspin.integrations.trl import fused

    trainer = fused(DPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer))
    trainer.train()

No loss of theirs is copied. TRL scores by `model(..., labels=labels, fused_lm_head=True)`, whose per-token results come from one
call of its autograd function `ChunkedLogProbFunction`: while a trainer that `fused` has seen computes a loss, that name stands for
an object of the same signature that calls `linear_logprobs`. CPO and SimPO still build logits; their `concatenated_forward`,
which turns them into log-probs, is replaced by one that asks for the same fused head.

N tokens, V vocabulary, D hidden width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from tspin_kernels import linear_logprobs

try:
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError("tspin.integrations.trl: needs trl; pip install 'tspin[trl]'") from error

_SEAM = "_ChunkedLogProbFunction"
_BUDGET = 2**28
TrainerT = TypeVar("TrainerT", bound=Trainer)


def fused(trainer: TrainerT, *, memory_budget: int | None = None) -> TrainerT:
    """Let one of TRL's preference trainers compute its log-probs and entropies by `linear_logprobs`.

    Args:
        trainer: a DPOTrainer, KTOTrainer or CPOTrainer (which is SimPO too), or a subclass, before train(). Changed in place;
            other trainers of the process keep TRL's own.
        memory_budget: bytes for logits, as in `linear_logprobs`.
    Returns:
        The trainer. Its losses, gradients and metrics are those of TRL within rounding; CPO's `logits/chosen` and
        `logits/rejected` are means over response tokens, as DPO's, where TRL averages over prompt and padding too.
        Reference log-probs that `precompute_ref_log_probs` took while the trainer was made are TRL's.
    Raises:
        ValueError: another trainer, an encoder-decoder, an adapter on the output head, DeepSpeed ZeRO-3 (whose head is gone by
            the backward), or a TRL that does not score the way described above; its version and the remedy are named.
    """
    ours = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "trl"}
    if not ours & {"DPOTrainer", "KTOTrainer", "CPOTrainer"}:
        raise ValueError(f"trainer: want a DPOTrainer, KTOTrainer or CPOTrainer of TRL, got {type(trainer).__name__}")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "trainer: want at most DeepSpeed ZeRO-2, got ZeRO-3, which takes the head away before the backward"
        )
    _check_seam()
    if (known := vars(trainer).get("_scoring")) is not None:
        known.memory_budget = memory_budget
        return trainer
    scoring = _Scoring(memory_budget)
    names = ["compute_loss", "compute_ref_log_probs"]
    if "CPOTrainer" in ours:
        names = ["concatenated_forward"]
        _add_fused_head(trainer)
    for name in names:
        if hasattr(trainer, name):
            setattr(trainer, name, scoring.of(getattr(trainer, name)))
    trainer._scoring = scoring  # type: ignore[attr-defined]
    return trainer


class _Scoring:
    """Stands for TRL's autograd function: `apply` has its signature and returns what it returns."""

    def __init__(self, memory_budget: int | None = None):
        self.memory_budget = memory_budget
        self.calls = 0

    def of(self, method: Callable) -> Callable:
        """The method, with this in the place of TRL's function while it runs."""

        @functools.wraps(method)
        def scored(*args: Any, **kwargs: Any) -> Any:
            calls, theirs = self.calls, getattr(trl_utils, _SEAM)
            setattr(trl_utils, _SEAM, self)
            try:
                result = method(*args, **kwargs)
            finally:
                setattr(trl_utils, _SEAM, theirs)
            if self.calls == calls:
                raise _other_trl(f"{method.__qualname__} computed log-probs without {_SEAM[1:]}")
            return result

        return scored

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(log-prob, entropy, ln sum p^2, mean logit, whether the target is the argmax), each [N] or None; two differentiable."""
        self.calls += 1
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        head: dict[str, Any] = {"logit_scale": logit_scale, "softcap": final_logit_softcapping}
        score = functools.partial(
            linear_logprobs, hidden, weight, targets, bias, ignore_index=None, memory_budget=self.memory_budget, **head
        )
        mode = "grad" if "entropy" in outputs else "value" if "is_top1" in outputs else False
        logprobs, entropy, logsumexp = score(temperature=temperature, entropy=mode)
        log_sum_sq_probs = mean_logits = is_top1 = None
        with torch.no_grad():
            blocks = functools.partial(
                _logits, weight=weight, bias=bias, temperature=temperature, budget=self.memory_budget or _BUDGET, **head
            )
            if "log_sum_sq_probs" in outputs:
                # The squares of the probabilities are those of twice the logits, up to the normaliser.
                log_sum_sq_probs = score(temperature=temperature / 2, entropy=False).logsumexp - 2 * logsumexp
            if "mean_logits" in outputs:
                if final_logit_softcapping is None:
                    # The mean of linear logits is the product with the mean row of the weight.
                    mean_logits = hidden.float() @ weight.mean(0, dtype=torch.float32)
                    mean_logits = (
                        (mean_logits + (0 if bias is None else bias.float().mean())) * logit_scale / temperature
                    )
                else:
                    mean_logits = torch.cat([z.mean(1) for z in blocks(hidden)] or [logprobs])
            if "is_top1" in outputs:
                assert entropy is not None
                # A probability above 1/2 is the largest; the largest is at least exp(-entropy). Few rows lie in between.
                is_top1, unsure = logprobs > -0.69, (logprobs <= -0.69) & (logprobs >= -entropy - 0.01)
                best = [z.argmax(1) for z in blocks(hidden[unsure])]
                is_top1[unsure] = torch.cat(best or [targets[:0]]) == targets[unsure]
        return logprobs, entropy if "entropy" in outputs else None, log_sum_sq_probs, mean_logits, is_top1


def _logits(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget: int,
) -> Iterator[Tensor]:
    """Blocks [rows, V] of logits in float32, for what is logged of them; product, float32 and one temporary fit the budget."""
    rows = max(1, budget // (12 * len(weight)))
    for start in range(0, len(hidden), rows):
        z = F.linear(hidden[start : start + rows], weight, bias).float() * logit_scale
        yield (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def _other_trl(found: str) -> ValueError:
    return ValueError(
        f"trl {version('trl')}: want its preference trainers to score by {_SEAM[1:]}, as trl 1.16 does, but {found}; "
        "install the trl of the extra, pip install 'tspin[trl]', or train without fused()"
    )


@functools.cache
def _check_seam() -> None:
    """Raise ValueError unless TRL's function is there, takes what `_Scoring.apply` takes, and returns the same numbers."""
    theirs = getattr(trl_utils, _SEAM, None)
    if theirs is None:
        raise _other_trl("it has no such function")
    got, want = (list(inspect.signature(f).parameters)[1:] for f in (theirs.forward, _Scoring.apply))
    if got != want:
        raise _other_trl(f"that function takes {got}, not {want}")
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    problem = (draw(6, 4), 2 * draw(9, 4), draw(9), torch.arange(6), 0.7, 5, 3.0, 1.5)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        pairs: list[Any] = list(zip(theirs.apply(*problem), _Scoring().apply(*problem), strict=True))
    if not all(torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4) for a, b in pairs):
        raise _other_trl("that function returns other numbers")


def _add_fused_head(trainer: Any) -> None:
    """Let a CPOTrainer score by TRL's fused head."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    if trainer.is_encoder_decoder:
        raise ValueError(f"trainer: want a decoder-only model, got {type(model).__name__}, an encoder-decoder")
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "trainer: want no adapter on the output head, which TRL's fused head does not see; leave it out of target_modules"
        )
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
    trainer.concatenated_forward = functools.partial(_concatenated_forward, trainer)
    functools.update_wrapper(trainer.concatenated_forward, type(trainer).concatenated_forward)


def _concatenated_forward(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """What CPOTrainer.concatenated_forward returns, with the mean logits of response tokens where it returns all logits."""
    inputs = trainer.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=trainer.pad_token_id, device=trainer.accelerator.device
    )
    routing = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    scored = model(
        inputs["concatenated_input_ids"],
        attention_mask=inputs["concatenated_attention_mask"],
        labels=inputs["concatenated_labels"],
        fused_lm_head=True,
        **routing,
    )
    sums, counts, B = scored.log_probs.sum(1), scored.label_mask.sum(1), len(batch["chosen_labels"])
    nll = -sums[:B].sum() / counts[:B].sum() if trainer.cpo_alpha else sums.new_zeros(())
    logps = sums / counts if trainer.loss_type in ("ipo", "simpo") else sums
    logits = [scored.mean_logits[side][scored.label_mask[side]] for side in (slice(B), slice(B, None))]
    auxiliary = (scored.aux_loss,) if trainer.aux_loss_enabled else ()
    return (logps[:B], logps[B:], *logits, nll, *auxiliary)
