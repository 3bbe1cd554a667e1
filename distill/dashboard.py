"""The run on Weights & Biases: opened, and closed with its summary and pictures. The only file that imports wandb."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import Config, ConfigError
from distill.convert import config_to_dict, flatten


def start_dashboard(config: Config, folder: Path) -> Any:
    """Open the wandb run of this folder; a run that goes on keeps its id, so that a later upload makes one run of it."""
    import wandb

    id_file = folder / "wandb" / "run_id"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    try:
        run = wandb.init(
            mode=config.log.wandb,
            project=config.log.wandb_project,
            name=folder.name,
            dir=folder,
            id=known,
            resume="allow",
            config=config_to_dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb={config.log.wandb} did not start ({str(error).partition(chr(10))[0]}); use offline or disabled"
        ) from error
    id_file.parent.mkdir(exist_ok=True)
    id_file.write_text(f"{run.id}\n", encoding="utf-8")
    return run


def finish_dashboard(run: Any, folder: Path, summary: Mapping[str, Any], *, failed: bool) -> None:
    """Hand over the summary and the pictures, and write out what wandb has buffered."""
    import wandb

    for picture in sorted(folder.glob("*.svg")):
        run.log({picture.stem: wandb.Html(picture.read_text(encoding="utf-8"), inject=False)})
    run.summary.update(flatten(summary))
    run.finish(exit_code=int(failed))
