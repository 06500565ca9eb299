"""A comparison's runs are the runs of its arms alone, bit for bit; it refuses what a run refuses, before it spends anything."""

from pathlib import Path

import pytest
from test_loop import make_toy, outcome, toy_config

from tspin import storage
from tspin.compare import Arm, Comparison
from tspin.config import SelfPlayConfig
from tspin.loop import SelfPlay

ARMS = [Arm("tspin"), Arm("spin", {"learning_rate": 3e-4}), Arm("sft"), Arm("ref", {"method": "tspin_ref"})]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


def values_of(toy: Path, **changes) -> dict:
    return toy_config(toy, toy / "unused", **changes).to_dict()


def records(directory: Path) -> dict:
    done = storage.read_record(directory / "state.json")["done"]
    # metrics.jsonl holds times
    return {name: record for name, record in done.items() if not name.endswith("/train")}


@pytest.fixture(scope="module")
def compared(toy, tmp_path_factory):
    return Comparison(values_of(toy), ARMS, [0, 1], tmp_path_factory.mktemp("compare")).run()


def test_every_arm_is_the_run_that_its_config_makes_alone(compared, tmp_path):
    for number, result in enumerate(compared):
        alone = tmp_path / str(number)
        config = SelfPlayConfig.from_file(result.output_dir / "config.yaml", {"output_dir": str(alone)})
        assert SelfPlay(config).run(report=False).model_hash == result.model_hash
        assert outcome(alone) == outcome(result.output_dir)
        assert records(alone) == records(result.output_dir)
