"""From a command line to a `Config`: the one file that knows Hydra and OmegaConf.

Decides: every command composes `recipes/config.yaml` with Hydra's overrides, groups and experiments. Hydra's compose
interface is used instead of its decorator: nothing is written, no folder is changed, no logger is set up, every rank
composes the same settings, and each mistake can be told in one line. Assumes that the values in the recipes are
plain; their types and names are checked by `distill.convert`. Does not judge values (`distill.checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes
from distill.config import Config, ConfigError
from distill.convert import config_from_dict, config_to_dict, either, known_keys, unknown_key

RECIPES = Path(recipes.__file__).parent
_SEARCH_PATH = "hydra.searchpath"


@dataclass(frozen=True)
class CommandLine:
    """What a user typed: overrides, and perhaps a wish to see something instead of running it."""

    overrides: tuple[str, ...] = ()
    shows: str | None = None
    """`help`, `config`, or None to run the command."""
    recipe_dir: str | None = None
    """A folder of the user's own recipes, searched after `recipes/`."""


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Split arguments into overrides and the few options that a command has.

    Raises:
        ConfigError: an option that does not exist here, or one without its value.
    """
    line = CommandLine()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, _, value = argument.partition("=")
        if not argument.startswith("-"):
            line = replace(line, overrides=(*line.overrides, argument))
        elif option in ("--help", "-h"):
            line = replace(line, shows="help")
        elif option in ("--cfg", "-c"):
            value = value or (rest.pop(0) if rest else "")
            if value != "job":
                raise ConfigError(f"{option} {value} is not known; use {option} job")
            line = replace(line, shows=line.shows or "config")
        elif option in ("--config-dir", "-cd"):
            value = value or (rest.pop(0) if rest else "")
            if not value or not _is_folder(value):
                raise ConfigError(f"{option} {value} is no folder; use one that holds experiment/NAME.yaml")
            line = replace(line, recipe_dir=value)
        elif option in ("--multirun", "-m"):
            raise ConfigError(
                f"{option} is not supported: a command is one run; start it once for each setting"
            )
        else:
            raise ConfigError(
                f"there is no option {option}; use --help, --cfg job, --config-dir DIR or key=value"
            )
    return line


def compose_config(line: CommandLine) -> Config:
    """Compose the recipes with the overrides of a command line.

    Returns:
        Settings of the right types, values not yet checked; `run.dir` is filled in.
    Raises:
        ConfigError: an unknown key, group option or experiment, an override or a recipe that cannot be read.
    """
    for override in _parse(line.overrides):
        _check_override(override)
    overrides = list(line.overrides)
    if line.recipe_dir is not None:
        overrides.append(f"{_SEARCH_PATH}=['file://{Path(line.recipe_dir).resolve()}']")
    values, experiment = _compose(overrides)
    if "experiment" in values:
        # Hydra puts a recipe without that line below the name of its folder.
        raise ConfigError(f"recipe experiment={experiment} needs the first line `# @package _global_`")
    config = config_from_dict(values)
    if config.run.dir is None:
        config = replace(config, run=replace(config.run, dir=f"runs/{experiment or 'default'}"))
    return config


def parse_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` arguments as a dictionary, with Hydra's reading of the values but no recipes.

    Raises:
        ConfigError: an argument that is not of that form.
    """
    options = {}
    for override in _parse(arguments):
        if override.is_sweep_override() or override.is_delete() or override.is_add():
            raise _unsupported(override)
        options[override.key_or_group] = override.value()
    return options


def config_text(config: Config) -> str:
    """Return the composed settings as YAML, as `--cfg job` prints them."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, width=110)


def groups() -> dict[str, list[str]]:
    """Return the groups under `recipes/` with their options."""
    found: dict[str, list[str]] = {}
    for path in sorted(RECIPES.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def _parse(arguments: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            hint = f"experiment={argument}" if argument in groups()["experiment"] else "key=value"
            raise ConfigError(f"the argument {argument} is not an override; use {hint}")
        try:
            parsed.append(parser.parse_override(argument))
        except (HydraException, ValueError, RecursionError) as error:
            # Python itself refuses a number of more than 4,300 digits, and brackets that are too deep.
            raise ConfigError(
                f"the override {argument} cannot be read ({_first_line(error)}); quote a text with special "
                "characters inside the shell's quotes, as in 'key=\"a text\"'"
            ) from error
    return parsed


def _check_override(override: Override) -> None:
    """Refuse what Hydra would refuse in many lines, or accept without any effect here."""
    key = override.key_or_group
    if override.is_sweep_override() or override.is_delete():
        raise _unsupported(override)
    if key.startswith("hydra.") and key != _SEARCH_PATH:
        raise ConfigError(
            f"{key} has no effect here: no Hydra job is started; use run.dir for the run's folder"
        )
    options = groups()
    if not key:
        raise ConfigError(f"{override.input_line} names no key; use key=value")
    if key in options and not isinstance(override.value(), (str, dict)):
        raise ConfigError(f"{override.input_line} does not name a recipe; use {key}={either(options[key])}")
    known = known_keys()
    branches = {name.rpartition(".")[0] for name in known} | set(options) | {_SEARCH_PATH}
    if key.startswith("rounds."):
        raise ConfigError(f"{key} is part of a list, and lists are replaced whole; use 'rounds=[{{...}}]'")
    if key not in known and key not in branches:
        raise unknown_key(key, known)


def _unsupported(override: Override) -> ConfigError:
    text = override.input_line or override.key_or_group
    if override.is_sweep_override():
        key, _, values = text.partition("=")
        return ConfigError(
            f"{text} is a sweep, and a command is one run; a list is written '{key}=[{values}]'"
        )
    return ConfigError(
        f"{text} is not supported: keys are neither added nor removed; use key=value, or key=null"
    )


def _compose(overrides: list[str]) -> tuple[dict[str, Any], str | None]:
    """Return the composed plain values, and the name of the experiment."""
    try:
        with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
            composed = compose("config", overrides=overrides, return_hydra_config=True)
        experiment = composed.hydra.runtime.choices.get("experiment")
        job = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
        values = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if not group or not error.options:
            raise ConfigError(_first_line(error)) from error
        raise ConfigError(f"there is no recipe {group}={option}; use {either(error.options)}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"a recipe is no valid YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ is not None else ""
        raise ConfigError(f"{_first_line(error).rstrip('.')}{cause}") from error
    except (ValueError, TypeError, OSError, RecursionError) as error:
        # Hydra's own way with what it did not expect in a command line: a NUL, brackets that are too deep.
        raise ConfigError(
            f"{' '.join(overrides)} cannot be composed ({_first_line(error)}); see --help for the keys"
        ) from error
    assert isinstance(values, dict), values
    return values, experiment


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        # A name that is too long, or with a NUL.
        return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
