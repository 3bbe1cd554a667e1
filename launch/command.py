"""What every command does around its work: read the settings, refuse mistakes in one line, join the ranks.

Decides: mistakes that the settings alone show are refused by every rank on its own, before torch is imported and
before any rank waits for another; rank 0 prints one line and all leave with the same exit code. The others let it leave
first: torchrun ends all ranks as soon as one has failed, said or not. Does not know what the commands do.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.checks import check_config
from distill.config import Config, ConfigError
from distill.failures import RunFailed
from distill.stop import Stop
from launch.config import compose_config, config_text, parse_command_line
from launch.environment import FAILURE, USER_ERROR, World
from launch.help import help_text
from launch.signals import listen

if TYPE_CHECKING:
    from parallel.mesh import Mesh

RANK_0_SPEAKS_S = 5.0
"""How long another rank waits with a mistake that the settings alone show; rank 0 has started at the same time."""


@dataclass(frozen=True)
class Command:
    """One command: how it is called and what it does."""

    usage: str
    """The line a user types."""
    about: str
    """What it does, for `--help`."""
    run: Callable[[Config, Mesh, Stop], None]
    """The work itself, called on every rank."""
    check: Callable[[Config], None] = lambda config: None
    """Refuses, before the ranks meet, what this command cannot do."""
    needs: tuple[str, ...] = ("teacher.model", "data.path")
    """Keys that must be given."""
    stops_between_steps: bool = False
    """Whether it looks at `Stop` and ends by itself; the others are ended by the first signal."""


def run_command(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command on this rank and return the exit code.

    Args:
        arguments: the command line after the command's name; None takes that of the process.
    """
    world = World.from_environment()
    say = print if world.rank == 0 else _say_nothing
    try:
        line = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        if line.shows == "help":
            say(help_text(command.usage, command.about))
            return 0
        config = compose_config(line)
        if line.shows == "config":
            say(config_text(config), end="")
            return 0
        config = check_config(config, world_size=world.size, needs=command.needs)
        command.check(config)
        _run(command, config, world)
    except ConfigError as error:
        if world.rank > 0:
            _let_rank_0_speak()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return FAILURE
    return 0


def run_alone(work: Callable[[Sequence[str]], None]) -> int:
    """Run a command of one process that reads its own command line; return the exit code.

    Args:
        work: what it does with the arguments; a `ConfigError` or `RunFailed` of it is told in one line.
    """
    try:
        work(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILURE
    return 0


def _let_rank_0_speak() -> None:
    """Wait for the end that torchrun brings when rank 0 leaves; one who comes back alone has seen the mistake."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(RANK_0_SPEAKS_S)


def _run(command: Command, config: Config, world: World) -> None:
    stop = Stop()
    listen(stop, announces=world.rank == 0, waits=command.stops_between_steps)
    # Imported late: torch takes seconds, and a mistake should be told before.
    from launch.ranks import joined

    with joined(config, world, stop) as mesh:
        command.run(config, mesh, stop)


def _say_nothing(*values: object, **options: object) -> None:
    """Stand in for `print` on the ranks that do not speak."""
