"""The sweep over timm's families (`benchmarks/zoo.py`), as a module."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("zoo", Path(__file__).parents[2] / "benchmarks" / "zoo.py")
zoo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo)
