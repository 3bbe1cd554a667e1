"""Options of a benchmark: a dataclass with a default for each, read from the command line's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from distill.config import ConfigError
from distill.convert import either

T = TypeVar("T")


def read_options(kind: type[T], given: Mapping[str, Any], *, least: Mapping[str, int]) -> T:
    """Return the options given over the defaults.

    Args:
        kind: dataclass whose fields are the options; where a default is a tuple, a list is expected, or its only entry.
        least: option -> the least that it, or each entry of its list, may be; these are whole numbers.
    Raises:
        ConfigError: no such option, or a number that is not whole or too small.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name not in defaults:
            raise ConfigError(f"{name} is no option; use {either(list(defaults))}")
        if isinstance(defaults[name], tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        for each in value if isinstance(value, tuple) else (value,):
            if name in least and (type(each) is not int or each < least[name]):
                raise ConfigError(f"{name}={each}; use a whole number, {least[name]} or more")
        chosen[name] = value
    return kind(**chosen)
