"""What the rounds that have not begun would refuse, found before the first step: settings and the models' configs show it.

Decides that a round's teacher which an earlier round will leave is looked at as it is planned, and that a ready student can
be cut in a later round only if its folder tells which units of the first round's teacher it has. What only the text or the
weights show comes when the round begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import Config, ConfigError
from distill.convert import show
from distill.hidden_map import check_widths, shared_with, was_cut
from distill.loading import first_rank_does
from distill.planned_student import checked_student, planned_configs
from distill.pretrained import check_tokenizers, load_config, resolve_model
from distill.rounds import lineage_of, round_folder
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_later_rounds(rounds: Sequence[Config], mesh: Mesh, *, after: int) -> None:
    """Check the rounds after the one under way, which `find_models` checks itself.

    Args:
        rounds: settings of each round (`rounds_of`), `mesh.dp` filled in.
        after: index of the round under way.
    Raises:
        ConfigError: the first mistake, with the round's index.
    Collectives: a broadcast over the world.
    """
    if after + 1 < len(rounds):
        first_rank_does(mesh, lambda: _check(rounds, after))


def _check(rounds: Sequence[Config], after: int) -> None:
    checks = _Checks(rounds)
    for index in range(len(rounds)):
        try:
            checks.look_at(index, judges=index > after)
        except ConfigError as error:
            # What the rounds before are refused for is told without their number where they are opened.
            raise ConfigError(f"rounds[{index}]: {error}" if index > after else str(error)) from error


class _Checks:
    """Goes through the rounds in order, and remembers what each student will look like."""

    def __init__(self, rounds: Sequence[Config]) -> None:
        self._rounds = rounds
        self._students: list[PretrainedConfig] = []
        self._found: dict[tuple[str, str], tuple[Path, PretrainedConfig]] = {}
        self._folder = Path(rounds[0].run.dir or ".")
        self._origin_folder, self._origin = self._find(rounds[0], rounds[0].teacher.model, "teacher.model")

    def _find(self, config: Config, name: str, key: str) -> tuple[Path, PretrainedConfig]:
        """Return a model's folder and config; each model is looked at once."""
        if (name, key) not in self._found:
            trust, cache = config.teacher.trust_remote_code, Path(config.data.cache_dir)
            folder = resolve_model(name, cache_dir=cache, trust_remote_code=trust, key=key)
            self._found[name, key] = folder, load_config(folder, trust_remote_code=trust, key=key)
        return self._found[name, key]

    def look_at(self, index: int, *, judges: bool) -> None:
        """Plan the student of a round, and check the round if asked to; what has begun was checked when it did."""
        settings, lineage = self._rounds[index], lineage_of(self._rounds, index)
        folder, ready = None, None
        if lineage.begins is None:
            folder, ready = self._find(settings, settings.student.model, "student.model")
        if not judges:
            self._students.append(ready or planned_configs(settings, self._origin)[0])
            return
        teacher_folder, teacher = self._teacher(index)
        if lineage.made_in == index:
            self._check_ready(index)
        student = checked_student(settings, teacher, ready, origin_config=self._origin)
        check_widths(
            settings,
            student_width=student.hidden_size,
            teacher_width=teacher.hidden_size,
            shares_channels=self._may_share(settings, folder, teacher_folder),
        )
        self._students.append(student)

    def _may_share(self, settings: Config, student: Path | None, teacher: Path | None) -> bool:
        """Return whether the teacher may have the student's channels; None: a folder that is not there yet."""
        if teacher is None or teacher == self._origin_folder and student is None:
            return True
        if student is None:
            return was_cut(teacher, self._rounds[0].teacher.model)
        return shared_with(student, teacher, settings.teacher.model).channels is not None

    def _teacher(self, index: int) -> tuple[Path | None, PretrainedConfig]:
        """Return a round's teacher, which speaks the language of the first round's; None for what a round will leave."""
        settings = self._rounds[index]
        name = settings.teacher.model
        for earlier, student in enumerate(self._students):
            if name == str(round_folder(self._folder, earlier)):
                return None, student
        if name == self._rounds[0].teacher.model:
            return self._origin_folder, self._origin
        folder, config = self._find(settings, name, "teacher.model")
        check_tokenizers(
            folder,
            self._origin_folder,
            key="teacher.model",
            trust_remote_code=settings.teacher.trust_remote_code,
        )
        return folder, config

    def _check_ready(self, index: int) -> None:
        """Check that a student that was ready can be cut anew in round `index`, and is told how."""
        first, before, settings = self._rounds[0], self._rounds[index - 1], self._rounds[index]
        name = first.student.model
        if name is None or lineage_of(self._rounds, index - 1).made_in > 0:
            return
        folder, _ = self._find(first, name, "student.model")
        if not was_cut(folder, first.teacher.model):
            raise ConfigError(
                f"student.model={show(name)} was not cut out of {first.teacher.model}, so no round can cut or factor it anew; "
                "leave student.prune and student.low_rank as they are in the first round"
            )
        if settings.student.prune == before.student.prune:
            raise ConfigError(
                f"student.low_rank factors what student.prune cuts, but how student.model={show(name)} was cut is not in the "
                "settings; set student.prune for this round too"
            )
