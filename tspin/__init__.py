"""Triplet self-play fine-tuning (T-SPIN, arXiv 2601.08198): generate, train, iterate, resume, report."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tspin.collator import TripletCollator
    from tspin.config import SelfPlayConfig
    from tspin.loop import SelfPlay
    from tspin.prefix import layout_inputs, share_prompts
    from tspin.tiling import tile_sequences
    from tspin.trainer import TSPINTrainer
    from tspin.training_args import TSPINConfig

_HOMES = {
    "SelfPlay": "tspin.loop",
    "SelfPlayConfig": "tspin.config",
    "TSPINConfig": "tspin.training_args",
    "TSPINTrainer": "tspin.trainer",
    "TripletCollator": "tspin.collator",
    "layout_inputs": "tspin.prefix",
    "share_prompts": "tspin.prefix",
    "tile_sequences": "tspin.tiling",
}
__all__ = [
    "SelfPlay",
    "SelfPlayConfig",
    "TSPINConfig",
    "TSPINTrainer",
    "TripletCollator",
    "layout_inputs",
    "share_prompts",
    "tile_sequences",
]


def __getattr__(name: str):
    # Imported on first use, so that `tspin --help` does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tspin' has no attribute {name!r}")
