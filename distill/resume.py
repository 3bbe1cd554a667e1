"""Where a run goes on: the checkpoint it begins with, and what a round takes out of the one before.

Decides: a round with the student of the round before goes on from its weights and moments, bit for bit; one that cuts its
student anew takes the weights from the cut folder (so that a master of a bfloat16 run is rounded once, there) and cuts
the moments, unless they are reset, and what is held at zero by the same indices (`distill.carry`). Projections of hidden states
begin anew there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill.atomic import remove_whole
from distill.carry import carry_state
from distill.companions import read_settings
from distill.config import Config, ConfigError
from distill.convert import config_to_dict, flatten, show
from distill.deploy.from_checkpoint import export_checkpoint
from distill.failures import RunFailed
from distill.hidden_map import PROJECTION
from distill.loading import first_rank_does, is_there
from distill.prune import load_kept
from distill.rounds import Lineage, Progress, lineage_of, may_repeat
from distill.runfolder import CHECKPOINTS, is_foreign, read_resume
from distill.session import Session
from distill.structure import Sizes
from distill.student_config import Student
from parallel import checkpoint
from parallel.checkpoint_files import CheckpointFiles
from parallel.checkpoint_folders import DAMAGED, PassedOver, Sound, drop_after, newest_sound, verify
from parallel.checkpoint_manifest import MANIFEST, CheckpointError, CheckpointOutOfReach
from parallel.mesh import Mesh
from parallel.model import build_meta_model


@dataclass(frozen=True)
class Start:
    """Where a run goes on."""

    found: Path | None = None
    """The checkpoint; None where it begins anew."""
    progress: Progress = field(default_factory=Progress)
    passed: tuple[PassedOver, ...] = ()
    """The run's own newer ones, which cannot be used."""


def find_checkpoint(config: Config, mesh: Mesh) -> Start:
    """Return the checkpoint that `checkpoint.resume` names, if there is one, and how far it is; changes nothing.

    It is sound: each of its files has been read and has the content that was written. With `auto` it is the newest such.
    With one that is named a run only begins: the same command goes on from its own once it has some, as the settings in the
    folder tell, also when that one has gone.

    Raises:
        ConfigError: the one named is not sound, or of the run's own none is; or this run cannot go on from it.
        RunFailed: one cannot be read by some rank, which may pass.
    Collectives: those of `newest_sound` and `verify`, and a broadcast over the world.
    """
    choice, folder = config.checkpoint.resume, Path(config.run.dir)
    if choice == "none":
        return Start()
    foreign = is_foreign(choice, folder)
    sound: Sound | None = None
    passed: list[PassedOver] = []
    with _telling(choice):
        if choice == "auto" or foreign or _has_begun_with(choice, config, mesh):
            sound, passed = _newest_own(folder / CHECKPOINTS, mesh, choice)
            foreign = foreign and sound is None
        if sound is None and choice != "auto":
            sound = Sound(Path(choice), verify(Path(choice), mesh))
        if sound is None:
            return Start(passed=tuple(passed))
        progress = _progress(sound)
    if progress.round >= len(config.rounds) or (foreign and progress.round):
        raise ConfigError(
            f"checkpoint.resume={choice} is of round {progress.round}, which this run cannot begin with; give that round's "
            "student as student.model"
        )
    return Start(sound.folder, progress, tuple(passed))


def leave_other_ways(start: Start, rounds: Sequence[Config]) -> None:
    """Remove what a run has made on another way than the one that goes on from its checkpoint, and say so; on one rank.

    Checkpoints that cannot be used are set aside, those after it and the cuts of later rounds go. The settings are to be
    written after this: by them the same command goes on with this way, from the newest that is left.

    Raises:
        RunFailed: something cannot be moved or removed.
    """
    folder = Path(rounds[0].run.dir)
    try:
        for each in start.passed:
            aside = f", set aside as {each.folder.name}{DAMAGED}" if each.was_complete else ""
            print(f"passed over {each.folder.name}: {each.reason}{aside}", flush=True)
        if start.found is not None:
            for gone in drop_after(folder / CHECKPOINTS, start.progress.step, damaged=start.passed):
                print(
                    f"dropped {gone.name}: the run goes on from {start.found.name} on another way", flush=True
                )
        _drop_cuts(start.progress, rounds)
    except OSError as error:
        raise RunFailed(
            f"{error.filename or folder} cannot be moved or removed ({error.strerror or error}), as it must be before the run "
            "goes on; the same command tries again"
        ) from error


@contextmanager
def _telling(choice: str) -> Iterator[None]:
    """Give a block that reads checkpoints; of what is wrong with them, a rank's disk is no mistake.

    Args:
        choice: the value of `checkpoint.resume`.
    Raises:
        ConfigError: a checkpoint cannot be used.
        RunFailed: it cannot be read here and now, which may pass.
    """
    try:
        yield
    except CheckpointOutOfReach as error:
        raise RunFailed(
            f"{error}; the same command tries again; a checkpoint that stays out of reach may be moved away"
        ) from error
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume={choice}: {error}") from error


def _has_begun_with(choice: str, config: Config, mesh: Mesh) -> bool:
    return choice == first_rank_does(mesh, lambda: read_resume(Path(config.run.dir)))


def _newest_own(root: Path, mesh: Mesh, choice: str) -> tuple[Sound | None, list[PassedOver]]:
    """Return the run's newest sound checkpoint and what was passed over.

    Args:
        choice: the value of `checkpoint.resume`.
    Raises:
        ConfigError: there are checkpoints, and none is sound.
    """
    sound, passed = newest_sound(root, mesh)
    damaged = [each for each in passed if each.was_complete]
    if sound is None and damaged:
        raise ConfigError(
            f"checkpoint.resume={choice}: no checkpoint in {root} is sound ({damaged[0].reason}); move that folder away to "
            "begin anew"
        )
    return sound, passed


def _progress(sound: Sound) -> Progress:
    """Return how far a checkpoint is. Raises: CheckpointError, it says impossible things."""
    try:
        progress = Progress.from_dict(sound.manifest.extras)
    except ValueError as error:
        raise CheckpointError(f"{sound.folder / MANIFEST} cannot be read: {error}") from error
    if progress.step != sound.manifest.step:
        raise CheckpointError(
            f"{sound.folder / MANIFEST} cannot be read: extras.step is {progress.step}, step {sound.manifest.step}"
        )
    return progress


def _drop_cuts(progress: Progress, rounds: Sequence[Config]) -> None:
    """Remove what later rounds were cut from other students than those that this way comes to.

    Where a round ends, the next one's cut stays: it was made there, of the same student. Where the round may be trained again
    it goes, for it may be of a later training; made anew of the same student, it is the same.
    """
    settings = rounds[progress.round]
    ends = progress.round_step == settings.train.steps and not may_repeat(settings.gate, progress.attempt)
    for index in range(progress.round + (2 if ends else 1), len(rounds)):
        lineage = lineage_of(rounds, index)
        for folder in (lineage.begins, lineage.factored) if lineage.made_in == index else ():
            if folder is not None and folder.exists():
                remove_whole(folder)


def bring_student(found: Path, settings: Config, lineage: Lineage, mesh: Mesh) -> None:
    """Make the folder of the round's student out of a checkpoint, where it is not there and would be cut anew.

    A cut that is made again could keep other units, which the checkpoint's weights do not belong to. Only where the teacher
    has another name by now it is made again.

    Raises:
        ConfigError: the checkpoint holds no student, or another one than is asked for.
        RunFailed: it cannot be read here and now.
    Collectives: two broadcasts over the world.
    """
    target = lineage.factored if settings.student.low_rank.is_asked else lineage.begins
    if target is None or is_there(target, mesh):
        return

    def bring() -> None:
        with _telling(settings.checkpoint.resume):
            theirs = read_settings(found)
        _check_student(found, theirs.student, settings.student)
        if theirs.teacher.model == settings.teacher.model:
            export_checkpoint(found, target, low_rank="factored", for_training=True)

    first_rank_does(mesh, bring)


def _check_student(found: Path, theirs: Student, ours: Student) -> None:
    """Raise ConfigError if a checkpoint's student was made otherwise than is asked for."""
    made = [flatten(config_to_dict(replace(each, sparsity=Student().sparsity))) for each in (theirs, ours)]
    for key, value in made[1].items():
        if made[0].get(key) != value:
            raise ConfigError(
                f"{found} belongs to another student: student.{key}={show(made[0].get(key))} there, {show(value)} here; use "
                "the same, or checkpoint.resume=none"
            )


def take_over(found: Path, settings: Config, session: Session, *, begins: bool, recut: bool) -> None:
    """Bring weights and moments of a checkpoint into a session, as far as the round goes on with them.

    Args:
        settings: of the round.
        begins: whether the checkpoint is that of an earlier training, at whose end this one begins.
        recut: whether the session's student was cut anew since.
    Raises:
        ConfigError: the checkpoint does not fit; the same on every rank.
        RunFailed: a rank cannot read it here and now; the same on every rank.
    Collectives: those of `checkpoint.restore`, or of `checkpoint.read_together` and two `StageOptimizer.gather`.
    """
    optimizer, moments = session.step.optimizer, settings.optimizer.moments
    with _telling(settings.checkpoint.resume):
        if not begins or not recut:
            checkpoint.restore(
                found,
                optimizer,
                session.step.mesh,
                optional=lambda name: begins and _of_a_round(name),
            )
            if begins and moments == "reset":
                optimizer.reset_moments()
        elif moments == "keep" or session.sparsifier is not None:
            _carry(found, session, with_moments=moments == "keep")


def _of_a_round(name: str) -> bool:
    """Whether a round may have a checkpoint's tensor where the round before has none, or another: masks, projections."""
    kind, _, parameter = name.partition("/")
    return kind == "mask" or parameter.startswith(PROJECTION)


def _carry(found: Path, session: Session, *, with_moments: bool) -> None:
    models, optimizer = session.models, session.step.optimizer
    shapes = {
        name: tuple(each.shape) for name, each in build_meta_model(models.origin_config).named_parameters()
    }
    optimizer.reset_moments()

    def carry(files: CheckpointFiles) -> None:
        carry_state(
            files,
            optimizer,
            with_moments=with_moments,
            teacher_shapes=shapes,
            sizes=Sizes.of(models.origin_config),
            old=load_kept(models.previous_folder)[0],
            new=load_kept(models.student_folder)[0],
        )

    manifest, _ = checkpoint.read_together(found, session.step.mesh, carry)
    if with_moments:
        optimizer.set_updates(manifest.updates)
