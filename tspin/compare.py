"""`tspin compare`: the same self-play under several methods and seeds, as one resumable run that ends in one table.

An arm is a name and the keys in which it differs; every pair of arm and seed is a run directory of its own,
`<output_dir>/<arm>/seed_<seed>`, which `tspin run` on its config.yaml finds complete. What arms of one seed would make alike,
bit for bit (the evaluation of pi_0, its proto responses, its first synthetic ones), is made by the first and copied by
the others, with the hashes that they would have recorded. This module deliberately knows no method and no statistics.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tspin import storage
from tspin.config import SelfPlayConfig
from tspin.loop import RunResult, SelfPlay, wait_for_everyone
from tspin.trainer import TSPINConfig

logger = logging.getLogger(__name__)

METHODS: tuple[str, ...] = get_args(get_type_hints(TSPINConfig)["method"])
_PATHS = ("model_name_or_path", "tokenizer_name_or_path", "dataset", "eval_dataset")
# Keys that only the training after the first samples reads. Runs that differ in any other share nothing.
_OF_TRAINING = {
    *("method", "alpha", "beta", "beta_first_iteration", "lam", "spin_mix_previous", "loss_type", "logp_reduction"),
    *("entropy_coef", "sft_coef", "drop_identical", "iterations", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing"),
    *("logging_steps", "save_steps", "save_strategy", "save_total_limit", "disable_tqdm", "report_to"),
}


@dataclass(frozen=True)
class Arm:
    """A name, which is a directory's too, and the keys in which the arm differs from the common config.

    A name that is a method stands for that method unless the keys name one.

    Raises:
        ValueError: the name is no plain word, or the keys are those that the comparison sets itself.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"arm: want a name of letters, digits and . + - _, got {self.name!r}")
        if taken := {"seed", "output_dir"} & self.keys.keys():
            raise ValueError(
                f"arm {self.name}: {taken.pop()} may not be set: every arm has all seeds, in its directory"
            )
        if self.name in METHODS:
            object.__setattr__(self, "keys", {"method": self.name, **self.keys})

    @classmethod
    def from_text(cls, text: str) -> Arm:
        """`name`, or `name:key=value,key=value`; a value may be a list in brackets."""
        name, _, rest = text.partition(":")
        keys = {}
        for part in re.split(r",(?=\s*\w+\s*=)", rest) if rest.strip() else []:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"arm: want name:key=value,key=value, got {text!r}")
            keys[key.strip()] = value.strip()
        return cls(name.strip(), keys)


class Comparison:
    """Runs of every arm with every seed below one directory; `run` may be called in any state that a run left behind.

    Args:
        values: flat keys of the common config. `{seed}` in model_name_or_path, tokenizer_name_or_path, dataset or eval_dataset
            stands for the seed, for initial policies and data that differ by seed.
        arms: at least one; the others are compared with the first.
        seeds: at least one.
        output_dir: default the config's.
    Raises:
        ValueError: two arms or seeds are alike, or a config is bad; the arm is named.
    """

    def __init__(
        self, values: Mapping[str, Any], arms: Sequence[Arm], seeds: Sequence[int], output_dir: str | Path | None = None
    ):
        self.directory = Path(output_dir or values.get("output_dir") or "tspin-compare")
        for name, given in (("arms", [arm.name for arm in arms]), ("seeds", list(seeds))):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: want one or more, each once, got {given}")
        self.configs: dict[tuple[str, int], SelfPlayConfig] = {}
        for seed in seeds:
            for arm in arms:
                self.configs[arm.name, seed] = _arm_config(values, arm, seed, self.directory)

    def run(self) -> list[RunResult]:
        """Do what is not yet done, seed by seed, and return the results in the order of seeds, then of arms.

        Raises:
            ValueError: as `SelfPlay.run`; before anything is run, where an arm's directory belongs to another config.
        """
        for config in self.configs.values():
            SelfPlay(config).refuse_changes()
        results = []
        for (name, seed), config in self.configs.items():
            logger.info("arm %s, seed %d", name, seed)
            donors = [result.output_dir for result in results]
            results.append(SharingSelfPlay(config, donors).run(report=False))
        return results


def _arm_config(values: Mapping[str, Any], arm: Arm, seed: int, directory: Path) -> SelfPlayConfig:
    keys = {**values, **arm.keys, "seed": seed, "output_dir": str(directory / arm.name / f"seed_{seed}")}
    for key in _PATHS:
        if isinstance(keys.get(key), str):
            keys[key] = keys[key].replace("{seed}", str(seed))
    try:
        return SelfPlayConfig.from_dict(keys)
    except ValueError as error:
        raise ValueError(f"arm {arm.name}: {error}") from error


class SharingSelfPlay(SelfPlay):
    """SelfPlay that copies from finished or running `donors` what it would make alike, bit for bit."""

    def __init__(self, config: SelfPlayConfig, donors: Iterable[str | Path] = ()):
        super().__init__(config)
        self.donors = list(map(Path, donors))

    def _open(self) -> None:
        super()._open()
        if self.is_main:
            for name in self._shared_stages():
                if name not in self.done and (donor := next(filter(self._gives(name), self.donors), None)):
                    self._take(donor, name)
        wait_for_everyone()
        self.done = storage.read_json(self.directory / "state.json")["done"]

    def _shared_stages(self) -> list[str]:
        """The stages before the first training that this run has."""
        rounds = [self._training_args(t) for t in range(self.config.iterations)]
        has = {
            "eval_initial": bool(self.held_out),
            "proto": any("proto" in args.members_at(t) for t, args in enumerate(rounds)),
            f"{self._at(0).name}/synthetic": rounds[0].method != "sft",
        }
        return [name for name, needed in has.items() if needed]

    def _gives(self, name: str):
        own = storage.read_json(self.directory / "run.json")
        same = ("processes", "device", "platform", "versions", "model", "data", "eval_data")

        def gives(donor: Path) -> bool:
            if not (donor / "state.json").exists() or name not in storage.read_json(donor / "state.json")["done"]:
                return False
            theirs = storage.read_json(donor / "run.json")
            changed = {key for key, _, _ in self.config.diff(SelfPlayConfig.from_file(donor / "config.yaml"))}
            return changed <= _OF_TRAINING and all(own[key] == theirs[key] for key in same)

        return gives

    def _take(self, donor: Path, name: str) -> None:
        record = storage.read_json(donor / "state.json")["done"][name]
        path = self.directory / record["path"]
        # An evaluation's file has its answers beside it, in a directory of the same name.
        for source, target in {donor / record["path"]: path, donor / name: self.directory / name}.items():
            if source.is_dir():
                with storage.staged_directory(target) as staged:
                    shutil.copytree(source, staged, dirs_exist_ok=True)
            elif source.is_file():
                storage.write_atomic(target, source.read_bytes())
        if storage.content_hash(path) != record["sha256"]:
            logger.warning("%s of %s is altered: making it here", name, donor)
            return
        logger.info("%s, as in %s", name, donor)
        self.done = {**self.done, name: record}
        storage.write_json(self.directory / "state.json", {"done": self.done})
