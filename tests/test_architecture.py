"""Rules about the source itself: where names resolve, who imports what, and how long a piece may get.

Import directions between the folders are import-linter's part (pyproject.toml); here stands what it cannot say.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("parallel", "distill", "recipes", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FILE_LINES, FUNCTION_LINES = 350, 60
"""Hard limits; a function's docstring does not count, since it is asked for."""
LONGER_FILES: dict[str, str] = {}
"""Files above the budget, each with its reason."""
LONGER_FUNCTIONS: dict[str, str] = {}
"""`file:function` above the budget, each with its reason."""

ONLY_IN = {
    "torch.distributed": ("parallel/", "launch/ranks.py", "launch/torchrun.py", "launch/benchmarks/"),
    "hydra": ("launch/config.py",),
    "omegaconf": ("launch/config.py",),
    "wandb": ("distill/dashboard.py",),
    "deepspeed": ("parallel/deepspeed_engine.py",),
    "bitsandbytes": ("parallel/eight_bit.py",),
    "datasets": ("distill/", "launch/benchmarks/_trl_peer.py"),
    "pickle": (),
}
"""Modules that only these files may import, also inside functions."""
READS_ENVIRONMENT = ("launch/",)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", FOLDERS)
def test_names_resolve_inside_the_repository(name: str) -> None:
    """An installed package of the same name (ROS ships a `launch`) must not be taken for ours."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT / name)


def test_budgets_of_files() -> None:
    long = {
        name: count
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
        if (name := name_of(path)) not in LONGER_FILES
    }
    assert not long, f"more than {FILE_LINES} lines: {long}"


def test_budgets_of_functions() -> None:
    long = {}
    for path in SOURCES:
        for function in functions(tree_of(path)):
            name = f"{name_of(path)}:{function.name}"
            count = length(function)
            if count > FUNCTION_LINES and name not in LONGER_FUNCTIONS:
                long[name] = count
    assert not long, f"more than {FUNCTION_LINES} lines: {long}"


def test_reasons_are_still_needed() -> None:
    known = {name_of(path) for path in SOURCES}
    assert {name.partition(":")[0] for name in (*LONGER_FILES, *LONGER_FUNCTIONS)} <= known


def test_modules_are_imported_only_where_they_belong() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in SOURCES
        for module in imported(tree_of(path))
        for guarded, places in ONLY_IN.items()
        if (module == guarded or module.startswith(f"{guarded}.")) and not name_of(path).startswith(places)
    ]
    assert not wrong, wrong


def test_the_environment_is_read_only_at_the_edge() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            is_environment = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            if is_environment and not name_of(path).startswith(READS_ENVIRONMENT):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, f"os.environ outside launch/: {wrong}"


def test_no_globals_wildcards_or_silenced_exceptions() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            silenced = isinstance(node, ast.ExceptHandler) and all(
                isinstance(part, ast.Pass) for part in node.body
            )
            broad = silenced and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            )
            wildcard = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            if isinstance(node, ast.Global) or broad or wildcard:
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, wrong


def test_every_module_says_what_it_decides() -> None:
    silent = [name_of(path) for path in SOURCES if not ast.get_docstring(tree_of(path))]
    assert not silent, silent


def test_public_functions_are_documented_and_typed() -> None:
    wrong = []
    for path in SOURCES:
        for function in functions(tree_of(path)):
            place = f"{name_of(path)}:{function.lineno} {function.name}"
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if untyped or function.returns is None:
                wrong.append(f"{place}: no types ({', '.join(untyped) or 'return'})")
    assert not wrong, wrong


def test_source_is_ascii() -> None:
    wrong = [name_of(path) for path in (*SOURCES, *TESTS) if not path.read_text(encoding="utf-8").isascii()]
    assert not wrong, wrong


def test_no_place_of_one_machine_is_named() -> None:
    files = [
        path
        for pattern in ("*.py", "*.yaml", "*.sh")
        for folder in (*FOLDERS, "tests")
        for path in (ROOT / folder).rglob(pattern)
    ]
    words = ("/" + "work/", "/" + "root/", "/" + "home/")
    wrong = [
        name_of(path) for path in files if any(word in path.read_text(encoding="utf-8") for word in words)
    ]
    assert not wrong, wrong


def test_each_test_file_has_its_source() -> None:
    """`tests/distill/test_losses.py` tests `distill/losses.py`; `equivalence/`, `commands/` and the files here test more than one.

    `launch/benchmarks/loss.py` is tested by `tests/launch/test_benchmark_loss.py`.
    """
    without = []
    for path in TESTS:
        inside = path.relative_to(ROOT / "tests")
        if path.name.startswith("test_") and inside.parts[0] in FOLDERS:
            tested = path.name.removeprefix("test_")
            sources = (
                ROOT / inside.parent / tested,
                ROOT / "launch/benchmarks" / tested.removeprefix("benchmark_"),
            )
            if not any(source.is_file() for source in sources) and name_of(path) not in SPANNING_TESTS:
                without.append(name_of(path))
    assert not without, without


SPANNING_TESTS = (
    "tests/launch/test_errors.py",
    "tests/launch/test_fuzz.py",
    "tests/launch/test_kubernetes.py",
    "tests/launch/test_slurm.py",
)
"""Tests of how several files work together, or of what is no Python."""
