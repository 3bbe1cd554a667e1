"""Run one of the benchmarks, each against its peers in the same run.

Decides the table and the JSON file; `launch/benchmarks/NAME.py` decides what is measured and which options it takes.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import launch.benchmarks
from distill.config import ConfigError
from distill.convert import either
from distill.places import writable_file
from launch.command import run_alone
from launch.config import parse_options
from launch.report import table

OUT_KEY = "bench.out"
COLUMNS = ("case", "ours", "peer", "peer_name", "ratio", "bound")
"""Keys of a row, in the order of the table; `ratio` = ours / peer, smaller is better."""


def bench(arguments: Sequence[str]) -> None:
    """Run the benchmark that the first argument names, print its table and write its rows.

    Raises:
        ConfigError: no such benchmark, or an option that cannot be read or is not known to it.
    """
    names = benchmark_names()
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"python -m launch.bench NAME [KEY=VALUE ...] [{OUT_KEY}=FILE.json]; NAME is {either(names)}")
        return
    name, *rest = arguments
    if name not in names:
        raise ConfigError(f"there is no benchmark {name}; use {either(names)}")
    module = importlib.import_module(f"launch.benchmarks.{name}")
    if rest and rest[0] in ("--help", "-h"):
        print(module.__doc__)
        return
    options = parse_options(rest)
    out = writable_file(OUT_KEY, options.pop(OUT_KEY, None))
    rows: list[dict[str, Any]] = module.run(options)
    print(table([{name: row.get(name) for name in COLUMNS} for row in rows]), flush=True)
    if out is not None:
        out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def benchmark_names() -> list[str]:
    """Return the names of the modules in `launch/benchmarks`."""
    found = pkgutil.iter_modules(launch.benchmarks.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


if __name__ == "__main__":
    sys.exit(run_alone(bench))
