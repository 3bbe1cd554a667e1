"""Between plain dictionaries (YAML, JSON) and the frozen dataclasses of `distill.config`, strictly both ways.

Decides: a key that does not exist is an error that names the nearest one; a value of another type is an error; a
whole number is taken where a fraction is meant, and nothing else is converted. Does not judge values.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from distill.annealing import EXAMPLE, is_schedule
from distill.config import Config, ConfigError

ROUND_KEYS = (
    *(
        "student.prune",
        "student.low_rank",
        "student.sparsity",
        "loss",
        "teacher",
        "gate",
        "data.weights",
        "data.seq_len",
    ),
    *("train.steps", "train.tokens", "train.global_batch_size", "train.microbatch_size"),
    *(
        "optimizer.lr",
        "optimizer.warmup_steps",
        "optimizer.schedule",
        "optimizer.min_lr_ratio",
        "optimizer.moments",
    ),
)
"""What an entry of `rounds` may override: these keys and the ones below them."""

_TOO_LARGE = 10**300
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested plain values; keys left out take their defaults.

    Raises:
        ConfigError: an unknown key or a value of the wrong type, anywhere.
    """
    return _build(Config, values, prefix="")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the nested plain dictionary of a dataclass, tuples as lists: what YAML and JSON can hold."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def round_config(config: Config, index: int) -> Config:
    """Return the settings of one round: `config` with the overrides of `rounds[index]` laid over it.

    `train.tokens` is turned into `train.steps`; an entry that names its steps does not inherit tokens.

    Raises:
        ConfigError: the entry names a key that a round may not override, or a value of the wrong type.
    """
    entry = config.rounds[index]
    for key in flatten(entry):
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in ROUND_KEYS):
            raise ConfigError(f"rounds[{index}].{key} cannot differ between rounds; use {either(ROUND_KEYS)}")
    base = {**config_to_dict(config), "rounds": [{}]}
    if "train.steps" in flatten(entry):
        base["train"] = {**base["train"], "tokens": None}
    settings = _build(Config, _merge(base, entry), prefix=f"rounds[{index}].")
    train = settings.train
    if train.tokens:
        step_tokens = max(1, train.global_batch_size * settings.data.seq_len)
        settings = replace(settings, train=replace(train, steps=-(-train.tokens // step_tokens)))
    return settings


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"train.steps": 100, ...}` of nested dictionaries; lists and schedules are values, not branches."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not is_schedule(value):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def known_keys() -> list[str]:
    """Return every dotted key that a `Config` has, in order."""
    return list(flatten(config_to_dict(Config())))


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that does not exist, with the nearest of the known dotted keys."""
    names = list(known)
    last = key.rpartition(".")[2]
    nearest = [name for name in names if name.rpartition(".")[2] == last]
    if not nearest:
        nearest = difflib.get_close_matches(key, names, n=1)
    if not nearest:
        close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in names], n=1)
        nearest = [name for name in names if name.rpartition(".")[2] in close]
    return ConfigError(
        f"there is no key {key}; " + (f"did you mean {either(nearest)}?" if nearest else "see --help")
    )


def either(choices: Iterable[Any]) -> str:
    """Return `a, b or c`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def show(value: Any) -> str:
    """Return a value as a user would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}: {show(item)}' for name, item in value.items())}}}"
    if isinstance(value, int) and abs(value) > _TOO_LARGE:
        # Python refuses to write out the digits of larger ones.
        return f"a number of {value.bit_length()} bits"
    return str(value)


def _build(cls: type, values: Any, prefix: str) -> Any:
    """Build one dataclass from a mapping; `prefix` is its dotted key, for messages."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.')}={show(values)} is not a group of keys; {prefix}KEY=VALUE sets one of it"
        )
    hints = typing.get_type_hints(cls)
    built = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise unknown_key(key, (f"{prefix}{known}" for known in flatten(config_to_dict(cls()))))
        hint = hints[name]
        built[name] = _build(hint, value, f"{key}.") if is_dataclass(hint) else _typed(hint, value, key)
    return cls(**built)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Return the value as the annotated type, or raise the error that names the key and the type."""
    for choice in typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,):
        matches, converted = _match(choice, value)
        if matches:
            return converted
    raise ConfigError(f"{key}={show(value)} must be {_describe(hint)}")


def _match(hint: Any, value: Any) -> tuple[bool, Any]:
    """Return whether the value fits one plain type, and the value in that type."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _match_tuple(typing.get_args(hint), value)
    if origin is Mapping:
        return _match_mapping(typing.get_args(hint), value)
    if origin is typing.Literal:
        return value in typing.get_args(hint), value
    if is_dataclass(hint):
        return _match_fields(hint, value)
    if hint is Any:
        return True, value
    if hint is float and type(value) is int:
        # An integer of hundreds of digits is no float.
        return (True, float(value)) if abs(value) < _TOO_LARGE else (False, value)
    return type(value) is hint, value


def _match_tuple(hints: Sequence[Any], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    if hints[-1] is Ellipsis:
        hints = [hints[0]] * len(value)
    pairs = [_match(hint, item) for hint, item in zip(hints, value, strict=False)]
    return len(hints) == len(value) and all(fits for fits, _ in pairs), tuple(item for _, item in pairs)


def _match_mapping(hints: tuple[Any, Any], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    pairs = [tuple(_match(hint, part) for hint, part in zip(hints, item)) for item in value.items()]
    fits = all(matches for item in pairs for matches, _ in item)
    return fits, {name: converted for (_, name), (_, converted) in pairs}


def _match_fields(hint: Any, value: Any) -> tuple[bool, Any]:
    """Return whether a mapping has just the fields of a dataclass that is one value, and that value."""
    hints = typing.get_type_hints(hint)
    if not isinstance(value, Mapping) or value.keys() != hints.keys():
        return False, value
    built = {name: _match(hints[name], value[name]) for name in hints}
    if not all(matches for matches, _ in built.values()):
        return False, value
    return True, hint(**{name: converted for name, (_, converted) in built.items()})


def _describe(hint: Any) -> str:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return either(dict.fromkeys(_describe(choice) for choice in choices))
    if is_dataclass(hint):
        return f"a schedule like {EXAMPLE}"
    if origin is tuple and choices[-1] is Ellipsis:
        return f"a list of entries that are each {_describe(choices[0])}"
    if origin is tuple:
        return f"a list of {len(choices)} entries that are each {_describe(choices[0])}"
    return "a group of keys" if origin is Mapping else _WORDS[hint]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the branches of `over` laid over it; what is a branch, `base` says, which has all keys."""
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        branches = isinstance(value, Mapping) and isinstance(below, Mapping) and not is_schedule(below)
        merged[name] = _merge(below, value) if branches else value
    return merged


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
