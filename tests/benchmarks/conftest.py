"""Puts the repository's root on the path: the benchmarks are run from it and never installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
