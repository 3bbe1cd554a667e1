"""The run on Weights & Biases: opened, fed, and closed with its summary and pictures. The only file that imports wandb.

Decides that nothing here ends a run or holds it up: `metrics.jsonl` has the same numbers. wandb is opened and fed on a thread of
its own, on which it may fail or hang; a failure is told in one line and nothing more is sent. An online run that cannot be
opened becomes an offline one, which `wandb sync` uploads later; what was logged meanwhile goes there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.convert import config_to_dict, flatten
from parallel.background import Background

_OPEN_S, _FINISH_S = 60, 60
"""How long wandb may take to open a run, and to upload the rest at its end."""
_PATIENCE_S = 15
"""How much longer it is waited for than it has promised."""
_OPEN_SHARE, _END_SHARE = 0.25, 0.5
"""Of `train.timeout_s` that both may take at most: the other ranks may be waiting for this one, which must not look like a hang."""


class Dashboard:
    """The wandb run of a folder, open or about to be; a run that goes on keeps its id, so that an upload makes one run of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._run: Any = None
        self._failed = False
        self._beside = Background("wandb", yields=True)
        self._beside.give(self._open)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Hand numbers over; returns at once and raises nothing."""
        self._beside.give(partial(self._try, lambda: self._run.log(dict(values), step=step)))

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Hand over the summary and the pictures, and write out what wandb has buffered; waits, but not for ever."""
        self._beside.give(partial(self._try, partial(self._finish, summary, failed=failed)))
        done = self._beside.submit(lambda: None)
        limit_s = _FINISH_S + _PATIENCE_S + (_OPEN_S if self._run is None else 0)
        limit_s = min(limit_s, _END_SHARE * self._config.train.timeout_s)
        if not wait([done], limit_s).done:
            _warn(f"wandb did not come to an end in {limit_s:g} s; it is left behind")
            return
        self._beside.close()

    def _open(self) -> None:
        modes = ["online", "offline"] if self._config.log.wandb == "online" else [self._config.log.wandb]
        for mode in modes:
            try:
                self._run = _start(self._config, self._folder, mode)
            except Exception as error:  # noqa: BLE001 - a server, a network, a disk: nothing that ends a run
                then = "it goes on offline" if mode == "online" else "the run goes on without"
                _warn(f"log.wandb={mode} did not start ({_first_line(error)}); {then}")
            else:
                return
        self._failed = True

    def _try(self, work: Any) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run has its numbers in its own files
            self._failed = True
            _warn(f"wandb takes no more numbers ({_first_line(error)}); metrics.jsonl has them all")

    def _finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        import wandb

        for picture in sorted(self._folder.glob("*.svg")):
            html = wandb.Html(picture.read_text(encoding="utf-8"), inject=False)
            self._run.log({picture.stem: html})
        self._run.summary.update(flatten(summary))
        self._run.finish(exit_code=int(failed))


def _start(config: Config, folder: Path, mode: str) -> Any:
    import wandb

    open_s = min(_OPEN_S, _OPEN_SHARE * config.train.timeout_s)
    id_file = folder / "wandb" / "run_id"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    run = wandb.init(
        mode=mode,
        project=config.log.wandb_project,
        name=folder.name,
        dir=folder,
        id=known,
        resume="allow",
        config=config_to_dict(config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=open_s,
            login_timeout=open_s,
            finish_timeout=_FINISH_S,
        ),
    )
    id_file.parent.mkdir(exist_ok=True)
    id_file.write_text(f"{run.id}\n", encoding="utf-8")
    return run


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
