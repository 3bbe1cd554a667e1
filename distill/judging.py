"""Who is judged by what: the held-out text and the questions of `evaluate.choices`, for student and teacher.

Decides that the teacher is judged once for the same things (`distill.levels`), and what the share of the gap is that a
distillation closed. The figures are those of `distill.evaluate` and `distill.choices`, under the names of the logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from distill.choices import ChoiceBatch, Task, choice_figures, load_task, microbatches, score_choices
from distill.config import Config
from distill.data import MicroBatch
from distill.evaluate import evaluate
from distill.levels import Figures, Levels
from distill.loading import Models, first_rank_does
from distill.pretrained import load_tokenizer
from distill.rows import HeldOut
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.p2p import Links


def load_tasks(config: Config, mesh: Mesh, tokenizer_folder: Path) -> list[Task]:
    """Read and encode the files of `evaluate.choices` on rank 0, for all ranks.

    Raises:
        ConfigError: a file or a line that is no question, or a choice that does not fit a row.
    Collectives: one broadcast over the world when there are files.
    """
    files, template, seq_len = config.evaluate.choices, config.evaluate.choices_template, config.data.seq_len

    def load() -> list[Task]:
        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=config.teacher.trust_remote_code)
        tasks = [
            load_task(Path(file).expanduser(), tokenizer, template=template, seq_len=seq_len)
            for file in files
        ]
        for task in tasks:
            if task.num_cut:
                print(
                    f"{task.name}: {task.num_cut} of {len(task.pieces)} choices with their questions are longer than "
                    f"data.seq_len={seq_len} and lose their beginning",
                    flush=True,
                )
        return tasks

    return first_rank_does(mesh, load) if files else []


@dataclass(frozen=True)
class Judge:
    """What models are judged with, on this rank.

    Every method is called on all ranks, and returns the same figures on all.
    """

    mesh: Mesh
    links: Links
    """Channels of their own: a teacher that is ahead has messages under way on the training's."""
    held_out: Sequence[MicroBatch]
    """This replica's share of the text."""
    held_out_print: str
    """What tells this text from another."""
    tasks: Sequence[tuple[Task, Sequence[ChoiceBatch]]]
    """The questions of each file, and this replica's share of them."""
    levels: Levels

    @classmethod
    def create(
        cls,
        config: Config,
        mesh: Mesh,
        models: Models,
        held_out: HeldOut,
        tasks: Sequence[Task],
        links: Links,
    ) -> Self:
        """Deal texts and questions out to the replicas."""
        shape = {"dp_rank": mesh.dp.rank, "dp_size": mesh.dp.size, "seq_len": config.data.seq_len}
        shares = [microbatches(task, microbatch_size=config.train.microbatch_size, **shape) for task in tasks]
        num_rows = min(config.evaluate.rows, len(held_out.rows))
        return cls(
            mesh=mesh,
            links=links,
            held_out=held_out.microbatches(config, mesh),
            held_out_print=f"{num_rows} rows of {held_out.rows.folder.name}",
            tasks=[
                (task, [batch.to(mesh.device) for batch in share])
                for task, share in zip(tasks, shares, strict=True)
            ],
            levels=Levels(
                Path(config.data.cache_dir) / "levels",
                models.teacher_folder,
                config.train.dtype,
                models.teacher_config.get_text_config().vocab_size,
            ),
        )

    def teacher(self, teacher: StageModel) -> tuple[Figures, bool]:
        """Return the teacher's figures on the text and all questions, and whether all were known from an earlier run.

        Collectives: those of `Levels.of` for the text and each file of questions.
        """
        measures = {self.held_out_print: partial(self._text, teacher=teacher)}
        for task, share in self.tasks:
            measures[task.fingerprint()] = partial(self._choices, task, share, teacher=teacher)
        judged = [self.levels.of(text, self.mesh, measure) for text, measure in measures.items()]
        figures = {name: value for part, _ in judged for name, value in part.items()}
        return figures, all(known for _, known in judged)

    def student(self, students: Sequence[StageModel], teacher: StageModel, *, with_choices: bool) -> Figures:
        """Return the student's figures on the text, against the teacher, and on the questions if asked for.

        Collectives: those of `evaluate`, and of `score_choices` for each file.
        """
        figures = dict(self._text(students=students, teacher=teacher))
        for task, share in self.tasks if with_choices else ():
            figures |= self._choices(task, share, students=students)
        return figures

    def _text(self, **models: Any) -> Figures:
        return evaluate(self.mesh, self.links, self.held_out, **models).named()

    def _choices(self, task: Task, share: Sequence[ChoiceBatch], **models: Any) -> Figures:
        scores_N = score_choices(self.mesh, self.links, share, num_choices=len(task.pieces), **models)
        return choice_figures(task, scores_N)


def gap_closed(evaluations: Sequence[Mapping[str, Any]], loss: float, *, round: int) -> float | None:
    """Return the share of the gap between student and teacher that a round's distillation has closed.

        (loss at the round's start - loss now) / (loss at the round's start - teacher's loss)

    Args:
        evaluations: lines of `evaluations.jsonl` so far; losses in nats per token of the same text.
        loss: of the student now.
        round: index of the round, whose first line is that of its start; the first round's is of step 0, or else the run went
            on from another run's checkpoint.
    Returns:
        1 when the student is as good as its teacher; None when it did not begin worse than the teacher, or nobody judged it.
    """
    teachers = [line["eval/loss"] for line in evaluations if line["model"] == "teacher"]
    students = [line for line in evaluations if (line["model"], line["round"]) == ("student", round)]
    starts = [line["eval/loss"] for line in students[:1] if round or line["step"] == 0]
    if not teachers or not starts or teachers[-1] is None or starts[0] is None:
        return None
    gap = starts[0] - teachers[-1]
    return (starts[0] - loss) / gap if gap > 0 else None
