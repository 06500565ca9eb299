"""Log-probs and entropy of a language model's targets straight from its hidden states, without the [N, V] logits.

Imports torch, and triton where it is installed; never transformers.
"""

from tspin_kernels._filter import FilterReport
from tspin_kernels._inputs import TokenLogprobs
from tspin_kernels._linear_logprobs import linear_logprobs
from tspin_kernels._losses import sft_loss, spin_loss, tspin_loss, tspin_ref_loss
from tspin_kernels._reference import linear_logprobs_reference
from tspin_kernels._sequence_loss import linear_sequence_loss, linear_tspin_loss
from tspin_kernels._sequences import SequenceStats, sequence_loss

__all__ = [
    "FilterReport",
    "SequenceStats",
    "TokenLogprobs",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_sequence_loss",
    "linear_tspin_loss",
    "sequence_loss",
    "sft_loss",
    "spin_loss",
    "tspin_loss",
    "tspin_ref_loss",
]
