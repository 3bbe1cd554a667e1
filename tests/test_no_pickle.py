"""Nothing that a user can feed is unpickled or run: what the source calls, and what a run opens."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.tiny_run import make_inputs

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for part in ("parallel", "distill", "launch", "recipes") for file in (ROOT / part).rglob("*.py")
)
_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "imp",
}
"""Modules that load objects or code."""
_CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "pd.read_pickle",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "np.fromfile",
}
_WORDS = {"weights_only", "allow_pickle"}
"""Arguments that are only needed where something may be unpickled."""


def faults(source: str) -> Iterator[str]:
    """Yield what a source may not do."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{each.name}" for each in node.names)]
        yield from (f"import {name}" for name in names if name.split(".")[0] in _MODULES or name in _CALLS)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in _CALLS or called in ("eval", "exec", "__import__", "compile"):
                yield called
            given = {each.arg: each.value for each in node.keywords}
            yield from _WORDS & given.keys()
            trust = given.get("trust_remote_code")
            if isinstance(trust, ast.Constant) and trust.value is not False:
                yield "trust_remote_code"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "import pickle"),
        ("def f():\n    from joblib import load", "import joblib"),
        ("from torch import load", "import torch.load"),
        ("x = torch.load(path, weights_only=True)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=True)", "trust_remote_code"),
        ("yaml.load(text, Loader=x)", "yaml.load"),
        ("eval(text)", "eval"),
    ],
)
def test_the_search_finds(source: str, fault: str) -> None:
    assert fault in set(faults(source))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_loads_objects_or_code(file: Path) -> None:
    assert list(faults(file.read_text(encoding="utf-8"))) == []


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


_WATCHED = """
import json, sys
planted, *arguments = sys.argv[1:]
seen, on = [], True
def watch(event, given):
    if on and (event == "pickle.find_class" or (event == "open" and "planted" in str(given[0]))):
        seen.append([event, *map(str, given[:2])])
from launch import distill, evaluate, prune
from launch.command import run_command
import torch, transformers, datasets
sys.addaudithook(watch)
codes = [run_command(command, [*arguments, f"run.dir={planted}/{command.run.__name__}"])
         for command in (distill.COMMAND, prune.COMMAND, evaluate.COMMAND)]
on = False
print("SEEN " + json.dumps([codes, seen]))
"""


def test_a_run_opens_no_pickle_that_lies_beside_its_inputs(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    corpus = inputs.folder / "corpus"
    corpus.mkdir()
    inputs.corpus.rename(corpus / "corpus.jsonl")
    cache = inputs.folder / "cache"
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    places = (inputs.teacher, corpus, cache, cache / "corpora" / "rows", cache / "levels", tmp_path)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in (
            "planted.bin",
            "planted.pt",
            "planted.pth",
            "planted.pkl",
            "planted.npy",
            "planted.npz",
            "planted.py",
        ):
            (place / name).write_bytes(bomb)
        for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
            (place / name).symlink_to(place / "planted.bin")
    settings = inputs.settings(tmp_path / "run", f"data.path={corpus}", "train.steps=1", "evaluate.rows=2")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _WATCHED,
            str(tmp_path),
            *(each for each in settings if not each.startswith("run.dir")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN "))
    codes, seen = json.loads(line.removeprefix("SEEN "))
    assert codes == [0, 0, 0], done.stderr
    assert seen == [] and not (tmp_path / "exploded").exists()
