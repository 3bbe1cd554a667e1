"""The state of a run that all its rounds share: how far it is, its newest checkpoint, what it has to tell.

Knows no models: those are a round's (`distill.session`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.health import Health
from distill.metrics import RunLog
from distill.rounds import Progress
from distill.stop import Stop
from parallel.checkpoint import Saver
from parallel.mesh import Mesh


@dataclass
class Running:
    """The settings, where the run stands, and what it tells; one for the whole process."""

    config: Config
    rounds: tuple[Config, ...]
    mesh: Mesh
    stop: Stop
    progress: Progress
    health: Health
    newest: Path | None
    """The newest checkpoint of the way that this run has come: the one that it began with, or one written since."""
    log: RunLog = field(init=False)
    """Opened when the first round's models are loaded: a mistake leaves no log behind."""
    unsaved: str | None = None
    """Why the last checkpoint of a round could not be written."""
    sparsity: dict[str, Any] | None = None
    """Pattern and share of the weights that the latest student holds at zero."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def settings(self) -> Config:
        """The settings of the round that runs."""
        return self.rounds[self.progress.round]

    @property
    def total_steps(self) -> int:
        """The step at which the run ends, if no round from here on is trained again."""
        left = self.settings.train.steps - self.progress.round_step
        return (
            self.progress.step
            + left
            + sum(each.train.steps for each in self.rounds[self.progress.round + 1 :])
        )

    def tell(self, saver: Saver) -> None:
        """Remember what has become of a round's checkpoints, and say which could not be written."""
        self.newest = saver.newest or self.newest
        self.unsaved = saver.failure
        for failure in saver.check():
            self.log.say(f"warning: {failure}")

    @property
    def words(self) -> str:
        """The round, where there are several."""
        return f"round {self.progress.round}: " if len(self.rounds) > 1 else ""
