"""Where a run goes on: the checkpoint it begins with, and what a round takes out of the one before.

Decides: a round with the student of the round before goes on from its weights and moments, bit for bit; one that cuts its
student anew takes the weights from the cut folder (so that a master of a bfloat16 run is rounded once, there) and cuts
the moments by the same indices (`distill.carry`), unless they are reset. Projections of hidden states begin anew there.
"""

from __future__ import annotations

from pathlib import Path

from distill.carry import carry_moments
from distill.config import Config, ConfigError
from distill.hidden_map import PROJECTION
from distill.prune import load_kept
from distill.rounds import Progress
from distill.session import Session
from distill.structure import Sizes
from parallel import checkpoint
from parallel.mesh import Mesh
from parallel.model import build_meta_model


def find_checkpoint(config: Config, mesh: Mesh) -> tuple[Path | None, Progress]:
    """Return the checkpoint that `checkpoint.resume` names, if there is one, and how far it is.

    Collectives: broadcasts and a barrier over the world.
    """
    choice, root = config.checkpoint.resume, Path(config.run.dir) / "checkpoints"
    foreign = choice not in ("auto", "none") and Path(choice).resolve().parent != root.resolve()
    if choice == "none":
        return None, Progress()
    if choice == "auto" or foreign:
        # With another run's checkpoint this run only begins: the same command goes on from its own, once it has one.
        own = checkpoint.latest(root, mesh)
        found, foreign = (own, False) if own is not None or choice == "auto" else (Path(choice), True)
    else:
        found = Path(choice)
    if found is None:
        return None, Progress()
    try:
        manifest = checkpoint.read_manifest(found)
        progress = Progress(**manifest.extras)
    except (checkpoint.CheckpointError, TypeError) as error:
        raise ConfigError(f"checkpoint.resume={choice}: {error}") from error
    if progress.round >= len(config.rounds) or (foreign and progress.round):
        raise ConfigError(
            f"checkpoint.resume={choice} is of round {progress.round}, which this run cannot begin with; give that round's "
            "student as student.model"
        )
    checkpoint.drop_after(root, manifest.step, mesh)
    return found, progress


def take_over(found: Path, settings: Config, session: Session, *, begins: bool, recut: bool) -> None:
    """Bring weights and moments of a checkpoint into a session, as far as the round goes on with them.

    Args:
        settings: of the round.
        begins: whether the checkpoint is that of an earlier training, at whose end this one begins.
        recut: whether the session's student was cut anew since.
    Raises:
        ConfigError: the checkpoint does not fit.
    Collectives: those of `checkpoint.restore`, or none.
    """
    optimizer, moments = session.step.optimizer, settings.optimizer.moments
    try:
        if not begins or not recut:
            checkpoint.restore(
                found,
                optimizer,
                session.step.mesh,
                optional=lambda name: begins and _of_a_round(name),
            )
            if begins and moments == "reset":
                optimizer.reset_moments()
        elif moments == "keep":
            _carry(found, session)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"checkpoint.resume={settings.checkpoint.resume}: {error}") from error


def _of_a_round(name: str) -> bool:
    """Whether a round may have a checkpoint's tensor where the round before has none, or another: masks, projections."""
    kind, _, parameter = name.partition("/")
    return kind == "mask" or parameter.startswith(PROJECTION)


def _carry(found: Path, session: Session) -> None:
    models = session.models
    manifest = checkpoint.read_manifest(found)
    shapes = {
        name: tuple(each.shape) for name, each in build_meta_model(models.origin_config).named_parameters()
    }
    with checkpoint.open_files(found, manifest) as files:
        carry_moments(
            files,
            session.step.optimizer,
            updates=manifest.updates,
            teacher_shapes=shapes,
            sizes=Sizes.of(models.origin_config),
            old=load_kept(models.previous_folder)[0],
            new=load_kept(models.student_folder)[0],
        )
