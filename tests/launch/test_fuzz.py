"""Whatever is typed: settings that pass all checks, or one line that says what is wrong; never another exception."""

from __future__ import annotations

import contextlib
import io
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.checks import check_config
from distill.config import Config, ConfigError
from distill.convert import ROUND_KEYS, config_from_dict, config_to_dict, known_keys
from launch import distill, evaluate, plan, prune
from launch.command import Command, run_alone, run_command
from launch.config import compose_config, groups, parse_command_line

COMMANDS = (distill.COMMAND, prune.COMMAND, evaluate.COMMAND)
READY = {"teacher": {"model": "embedded"}, "data": {"path": "pydoc"}, "log": {"wandb": "disabled"}}
FAST, LONG = 90, 10_000
"""Examples of settings; of command lines, which Hydra takes a tenth of a second for, a thirtieth."""


def profile(examples: int) -> Callable[[Any], Any]:
    """Return settings with which an example may take as long as a slow machine needs; the fast ones are always the same."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 8, 64, 10**6, 2**31, 2**63, 10**30, 10**400]),
    st.integers(-3, 100),
    st.sampled_from(
        [0.0, -0.0, 0.5, 1.0, 1e-9, 5e-324, 1e30, 1e300, float("nan"), float("inf"), -float("inf")]
    ),
    st.floats(0, 4),
)
_TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "a",
            "embedded",
            "pydoc",
            "previous",
            "round-0",
            "auto",
            "none",
            "/",
            ".",
            "..",
            "~",
            "~x/y",
        ]
    ),
    st.sampled_from(
        [
            "50%",
            "70M",
            "-1B",
            "%",
            "nanM",
            "1e999",
            "/etc/passwd/x",
            "a/b/c",
            "x.gguf",
            "\0",
            "\udcff",
            "\u00e9\u2028",
        ]
    ),
    st.text(max_size=8),
)
_PLAIN = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_NONSENSE = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(-1, 9), inner, max_size=3)
    ),
    max_leaves=5,
)


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Return values of an annotated type, as YAML would give them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return st.one_of(*map(of_type, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(of_type(inner[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(of_type, inner)).map(list)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.fixed_dictionaries({each.name: of_type(hints[each.name]) for each in fields(hint)})
    if isinstance(origin, type) and issubclass(origin, typing.Mapping):
        return st.dictionaries(of_type(inner[0]), of_type(inner[1]), max_size=3)
    if hint is Any:
        return _NONSENSE
    return {type(None): st.none(), bool: st.booleans(), int: _NUMBERS, float: _NUMBERS, str: _TEXTS}[hint]


def hint_of(key: str) -> Any:
    """Return the annotated type of a dotted key."""
    hint: Any = Config
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    return hint


@st.composite
def changes(draw: st.DrawFn, *, inside: Sequence[str] = ()) -> dict[str, Any]:
    """Draw a few keys with values, some of the right type.

    Args:
        inside: keys, or groups of them, to stay in; empty: all but `rounds`.
    """
    keys = [
        key
        for key in known_keys()
        if key != "rounds" and (not inside or any(f"{key}.".startswith(f"{each}.") for each in inside))
    ]
    drawn: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True)):
        drawn[key] = draw(of_type(hint_of(key)) if draw(st.integers(0, 3)) else _NONSENSE)
    return drawn


def nested(flat: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return dotted keys as dictionaries in each other, laid over `base`."""
    whole = {name: dict(value) for name, value in (base or {}).items()}
    for key, value in flat.items():
        *path, last = key.split(".")
        place: Any = whole
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return whole


@st.composite
def round_entries(draw: st.DrawFn) -> list[Any]:
    """Draw the list `rounds`: entries with keys that a round may override, and others."""
    entry = st.one_of(
        st.just({}),
        changes(inside=ROUND_KEYS).map(nested),
        changes().map(nested),
        st.dictionaries(_TEXTS, _NONSENSE, max_size=2),
    )
    return draw(st.lists(entry, max_size=3))


def judge(build: Callable[[], Config], *, world_size: int) -> None:
    """Build settings and check them as each command does; a mistake must be one line, settings must go through YAML."""
    try:
        config = check_config(build(), world_size=world_size)
        for command in COMMANDS:
            command.check(config)
    except ConfigError as error:
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 2000, line
        return
    text = yaml.safe_dump(config_to_dict(config))
    text.encode()
    assert config_from_dict(yaml.safe_load(text)) == config


def fuzz_values(examples: int) -> None:
    """Try settings as dictionaries, which skips Hydra and so tries many."""

    @profile(examples)
    @given(changes(), st.none() | round_entries(), st.sampled_from([1, 2, 6]))
    def run(flat: dict[str, Any], rounds: list[Any] | None, world_size: int) -> None:
        values = nested(flat, READY)
        if rounds is not None:
            values["rounds"] = rounds
        judge(lambda: config_from_dict(values), world_size=world_size)

    run()


def typed(value: Any) -> str:
    """Return a value as one could type it in an override."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{typed(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if value in (None, True, False)
        else str(value)
    )


_ARGUMENTS = st.one_of(
    changes().map(lambda flat: [f"{key}={typed(value)}" for key, value in flat.items()]),
    round_entries().map(lambda rounds: [f"rounds={typed(rounds)}"]),
    st.lists(st.tuples(st.sampled_from(list(groups())), _TEXTS).map("=".join), min_size=1, max_size=2),
    st.lists(st.text(alphabet="abz.=+-~@{}[]$:,'\"\\ \n\0\u00e90", max_size=12), min_size=1, max_size=3),
    st.lists(st.sampled_from(
        ["--cfg", "job", "--help", "--multirun", "--config-dir", "/nowhere", "rounds.0.loss=1", "hydra.run.dir=x", "+a=1", "~data",
         "++data.path=1", "train.steps=1,2", "train.steps=range(3)", "train=default@x", "data@train=pydoc", "experiment=[a]",
         "data.path=${data.path}", "data.path=${oc.env:HOME}", "data.path=${x:1}", "train.steps=" + "9" * 5000, "train={steps:1}",
         "train.steps=0x10", "train.steps=1_000", "train.steps=1e3", "loss.temperature={kind:linear,start:4,end:1}", "=", "=1", "a"]
    ), min_size=1, max_size=3),
)  # fmt: skip


def fuzz_command_lines(examples: int) -> None:
    """Try what could be typed, through Hydra."""

    @profile(examples)
    @given(_ARGUMENTS)
    def run(arguments: list[str]) -> None:
        judge(
            lambda: compose_config(parse_command_line(["teacher=embedded", "data=pydoc", *arguments])),
            world_size=2,
        )

    run()


def exit_code(run: Callable[[], int]) -> int:
    """Return the exit code of a command; one that refuses says one line and nothing else."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run()
    if code:
        assert code == 2 and out.getvalue() == "", (code, out.getvalue())
        assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1, err.getvalue()
    return code


def fuzz_commands(examples: int) -> None:
    """Try the commands themselves, whose work is left out."""
    silent = [
        Command(each.usage, each.about, lambda *given: None, check=each.check, needs=each.needs)
        for each in COMMANDS
    ]

    @profile(examples)
    @given(_ARGUMENTS, st.sampled_from(silent))
    def run(arguments: list[str], command: Command) -> None:
        exit_code(
            lambda: run_command(command, ["teacher=embedded", "data=pydoc", "log.wandb=disabled", *arguments])
        )

    run()


@pytest.fixture(autouse=True)
def _aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no folder in the repository, whatever a name drawn means, and no handler of signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.command.listen", lambda *given, **named: None)


def test_values() -> None:
    fuzz_values(FAST)


def test_command_lines() -> None:
    fuzz_command_lines(FAST // 30)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_values() -> None:
    fuzz_values(LONG)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_command_lines() -> None:
    fuzz_command_lines(LONG // 30)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_commands() -> None:
    fuzz_commands(LONG // 60)


@pytest.mark.parametrize(
    "arguments",
    [["loss.alpha=2"], ["rounds=[{a: 1}]"], ["train.steps='a\nb'"], ["=1"], ["data.path=\udcff"], ["train.steps=" + "9" * 5000]],
    ids=range(6),
)  # fmt: skip
def test_a_command_refuses_with_one_line_and_exit_code_2(arguments: list[str]) -> None:
    settings_too = ["teacher=embedded", "data=pydoc", "log.wandb=disabled", *arguments]
    assert exit_code(lambda: run_command(distill.COMMAND, settings_too)) == 2
    assert exit_code(lambda: run_alone(lambda _: plan.plan(settings_too))) == 2


def test_the_drawn_keys_are_all_keys() -> None:
    """A new key is drawn without anyone thinking of it, and of its type."""
    for key in known_keys():
        assert of_type(hint_of(key)) is not None, key
