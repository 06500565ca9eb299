"""Preference losses written out as a user would, for linear_sequence_loss; the package's own are not used here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tspin_kernels import SequenceStats


@dataclass(frozen=True)
class Preference:
    """A loss, the sequences it takes per group, and whether it reads reference log-probs."""

    loss_fn: Callable[..., torch.Tensor]
    group_size: int
    reference: bool = False


def logistic(z: torch.Tensor) -> torch.Tensor:
    return F.softplus(-z)


def means(s: SequenceStats) -> torch.Tensor:
    return s.logprobs / s.lengths.clamp(min=1)


def tspin(s: SequenceStats) -> torch.Tensor:
    real, synthetic, proto = s.logprobs.unbind(1)
    return logistic(real - synthetic) + 0.1 * logistic(synthetic - proto)


def tspin_ref(s: SequenceStats, ref: torch.Tensor) -> torch.Tensor:
    real, synthetic, proto = (s.logprobs - ref).unbind(1)
    return logistic(real - synthetic) + 0.1 * logistic(synthetic - proto)


def spin(s: SequenceStats, ref: torch.Tensor) -> torch.Tensor:
    real, synthetic = (s.logprobs - ref).unbind(1)
    return logistic(0.1 * (real - synthetic))


def dpo_with_sft(s: SequenceStats, ref: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (s.logprobs - ref).unbind(1)
    return logistic(0.5 * (chosen - rejected)) - 0.2 * means(s)[:, 0]


def simpo(s: SequenceStats) -> torch.Tensor:
    chosen, rejected = means(s).unbind(1)
    return logistic(2.0 * (chosen - rejected) - 0.5)


def orpo(s: SequenceStats) -> torch.Tensor:
    logp = means(s).clamp(max=-1e-3)
    odds = logp - torch.log(-torch.expm1(logp))
    return -logp[:, 0] + 0.1 * logistic(odds[:, 0] - odds[:, 1])


def exponential_means(s: SequenceStats) -> torch.Tensor:
    real, synthetic, proto = means(s).unbind(1)
    return torch.exp(-(real - synthetic)) + 0.5 * torch.exp(-(synthetic - proto))


def length_penalty(s: SequenceStats) -> torch.Tensor:
    return -(s.logprobs - 0.05 * s.lengths * math.log(2)).mean(1)


def entropy_bonus(s: SequenceStats) -> torch.Tensor:
    return tspin(s) - 0.3 * (s.entropy / s.lengths.clamp(min=1)).mean(1) + 0.01 * s.entropy[:, 0] * s.logprobs[:, 1]


PREFERENCES = {
    "tspin": Preference(tspin, 3),
    "tspin_ref": Preference(tspin_ref, 3, reference=True),
    "spin": Preference(spin, 2, reference=True),
    "dpo_with_sft": Preference(dpo_with_sft, 2, reference=True),
    "simpo": Preference(simpo, 2),
    "orpo": Preference(orpo, 2),
    "exponential_means": Preference(exponential_means, 3),
    "length_penalty": Preference(length_penalty, 2),
    "entropy_bonus": Preference(entropy_bonus, 3),
}
