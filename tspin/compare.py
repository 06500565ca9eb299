"""`tspin compare`: the same self-play under several methods and seeds, as one resumable run that ends in one table.

An arm is a name and the keys in which it differs; every pair of arm and seed is a run directory of its own,
`<output_dir>/<arm>_seed_<seed>`, which `tspin run` on its config.yaml finds complete. What arms of one seed would make alike,
bit for bit (the evaluation of pi_0, its proto responses, its first synthetic ones), is made by the first and copied by
the others, with the hashes that they would have recorded. This module deliberately knows no method and no statistics.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from accelerate import PartialState

from tspin import storage
from tspin.checkpoints import wait_for_everyone
from tspin.config import SelfPlayConfig
from tspin.ledger import Ledger
from tspin.loop import RunResult, SelfPlay
from tspin.report import write_report
from tspin.training_args import TSPINConfig

logger = logging.getLogger(__name__)

METHODS: tuple[str, ...] = get_args(get_type_hints(TSPINConfig)["method"])
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

    A name that is a method stands for that method unless the keys name one; any other needs keys that make it an arm.

    Raises:
        ValueError: the name is no plain word, it is no method and has no keys, or the keys are those that the comparison sets
            itself.
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
        elif not self.keys:
            raise ValueError(
                f"arm {self.name}: want a method ({', '.join(METHODS)}) or keys beside the name, got neither; "
                f"correct it, or write {self.name}:method=tspin"
            )

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
        values: flat keys of the common config, as `SelfPlayConfig.from_dict`. `{seed}` in model_name_or_path stands for the seed,
            for initial policies that differ by seed.
        arms: one or more; the others are compared with the first.
        seeds: one or more.
    Raises:
        ValueError: an arm or a seed comes twice, two arms have the same config, or a config is bad; the arm is named.
    """

    def __init__(self, values: Mapping[str, Any], arms: Sequence[Arm], seeds: Sequence[int]):
        values = {"output_dir": "tspin-compare", **values}
        self.directory = Path(values["output_dir"])
        for name, given in (("arms", [arm.name for arm in arms]), ("seeds", list(seeds))):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: want one or more, each once, got {given}")
        self.configs = {(arm.name, seed): _arm_config(values, arm, seed) for seed in seeds for arm in arms}
        for one, other in itertools.combinations(arms, 2):
            if not self.configs[one.name, seeds[0]].diff(self.configs[other.name, seeds[0]]):
                raise ValueError(
                    f"arms: want arms that differ in some key, got {one.name} and {other.name} with the same config; leave one out"
                )

    @property
    def runs(self) -> list[Path]:
        """The run directories: of the first seed all arms, then of the next."""
        return [Path(config.output_dir) for config in self.configs.values()]

    def run(self, note: str | None = None) -> list[RunResult]:
        """Do what is not yet done, write the report of all runs to `<output_dir>/report`, and return the results as `runs`.

        Args:
            note: for the head of the report.
        Raises:
            ValueError: as `SelfPlay.run`; before anything is run, where an arm's directory belongs to another config.
        """
        for config in self.configs.values():
            with storage.disk_errors(config.output_dir):
                SelfPlay(config).refuse_changes()
        results: list[RunResult] = []
        for (name, seed), config in self.configs.items():
            logger.info("arm %s, seed %d", name, seed)
            results.append(SharingSelfPlay(config, [result.output_dir for result in results]).run(report=False))
        if PartialState().is_main_process:
            try:
                write_report(self.runs, self.directory / "report", note)
            except Exception:
                # As in SelfPlay: a picture is no reason to lose the result.
                logger.exception("the runs are finished, but not their report; `tspin report` on them writes it")
        wait_for_everyone()
        return results


def read_comparison(
    values: Mapping[str, Any], methods: str | None = None, arms: Sequence[str] = (), seeds: str | None = None
) -> Comparison:
    """The comparison that a config file with the keys `arms` and `seeds` means, or that command-line words mean instead.

    Args:
        values: flat keys; `arms` maps a name to the keys of that arm (or null), `seeds` is a list.
        methods: names separated by commas; with `arms`, each as `Arm.from_text`, they replace those of `values`.
        seeds: numbers separated by commas.
    """
    values = dict(values)
    listed, numbers = values.pop("arms", None) or {}, values.pop("seeds", [])
    if not isinstance(listed, dict) or not all(isinstance(keys, (dict, NoneType)) for keys in listed.values()):
        raise ValueError(f"arms: want lines `name: {{key: value, ...}}`, got {listed!r}")
    made = [Arm(str(name), keys or {}) for name, keys in listed.items()]
    if methods or arms:
        made = [Arm.from_text(name) for name in (methods.split(",") if methods else [])] + list(
            map(Arm.from_text, arms)
        )
    try:
        numbers = [int(number) for number in (seeds.split(",") if seeds else numbers)]
    except (TypeError, ValueError):
        raise ValueError(f"seeds: want whole numbers separated by commas, got {seeds or numbers!r}") from None
    for name, given, option in (("arms", made, "--methods tspin,spin"), ("seeds", numbers, "--seeds 0,1,2")):
        if not given:
            raise ValueError(f"{name}: want one or more, got none; set {name} in the config file or give {option}")
    return Comparison(values, made, numbers)


def _arm_config(values: Mapping[str, Any], arm: Arm, seed: int) -> SelfPlayConfig:
    keys = {
        **values,
        **arm.keys,
        "seed": seed,
        "output_dir": str(Path(values["output_dir"]) / f"{arm.name}_seed_{seed}"),
    }
    if isinstance(model := keys.get("model_name_or_path"), str):
        keys["model_name_or_path"] = model.replace("{seed}", str(seed))
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
                if name not in self.ledger.done and (donor := next(filter(self._gives(name), self.donors), None)):
                    self._take(donor, name)
        wait_for_everyone()
        self.ledger.read()

    def _shared_stages(self) -> list[str]:
        """The stages before the first training that this run has."""
        rounds = [self._training_args(t) for t in range(self.config.iterations)]
        has = {
            "eval_initial": bool(self.held_out or self.harness),
            "proto": any("proto" in args.members_at(t) for t, args in enumerate(rounds)),
            f"{self._at(0).name}/synthetic": rounds[0].method != "sft",
        }
        return [name for name, needed in has.items() if needed]

    def _gives(self, name: str) -> Callable[[Path], bool]:
        """Whether a donor has done this stage on the same model, data, versions and machine, with the keys that it reads alike."""
        own = storage.read_record(self.directory / "run.json")
        same = ("processes", "device", "platform", "versions", "model", "data", "eval_data")

        def gives(donor: Path) -> bool:
            ledger = Ledger(donor)
            if ledger.path.exists():
                ledger.read()
            if name not in ledger.done:
                return False
            theirs, origin = storage.read_record(donor / "run.json"), ledger.origin_of(name)
            # What it was made with: config.yaml may have been edited since.
            made = (
                SelfPlayConfig.from_dict(origin["config"])
                if origin
                else SelfPlayConfig.from_file(donor / "config.yaml")
            )
            changed = {key for key, _, _ in self.config.diff(made)}
            return changed <= _OF_TRAINING and all(own[key] == theirs[key] for key in same)

        return gives

    def _take(self, donor: Path, name: str) -> None:
        theirs = Ledger(donor)
        theirs.read()
        made = theirs.done[name]
        for path in made:
            if (donor / path).is_dir():
                with storage.staged_directory(self.directory / path) as staged:
                    shutil.copytree(donor / path, staged, dirs_exist_ok=True)
            elif (donor / path).is_file():
                storage.write_atomic(self.directory / path, (donor / path).read_bytes())
        paths = [self.directory / path for path in made]
        if self.ledger.hashes(*paths) != made:
            logger.warning("%s of %s is altered: making it here", name, donor)
            return
        logger.info("%s, as in %s", name, donor)
        self.ledger.record(name, *paths)
