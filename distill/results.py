"""What a run hands over: each round's student as a Hugging Face folder, the table of results, the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.deploy.export import export_student, model_card
from distill.loading import DTYPES
from distill.metrics import RunLog
from distill.rounds import STUDENT_FOLDER, Progress, rounds_of
from distill.session import Session
from parallel.mesh import Mesh


def export_round(
    log: RunLog,
    config: Config,
    settings: Config,
    mesh: Mesh,
    session: Session,
    target: Path,
    progress: Progress,
    *,
    sparsity: Mapping[str, Any] | None = None,
) -> None:
    """Write the student of a round that has ended to `target`, with its model card.

    Args:
        config, settings: of the run, and of the round.
        sparsity: pattern and share of the weights that are zero.
    Collectives: those of `export_student`.
    """
    card = ""
    if mesh.world.is_first:
        summary = {"tokens": progress.tokens, "table": result_table(log, config, progress)}
        summary |= {} if sparsity is None else {"sparsity": sparsity}
        card = model_card(
            settings,
            summary,
            origin=session.models.origin,
            model_config=session.student_config,
        )
    export_student(
        session.students,
        mesh,
        target,
        source=session.models.student_folder,
        model_config=session.student_config,
        card=card,
        dtype=DTYPES[config.train.dtype],
        # A student that goes on into another round is cut as a plain one.
        merge_factors=config.export.low_rank == "merged" or target.name != STUDENT_FOLDER,
    )


def run_summary(
    log: RunLog,
    config: Config,
    rounds: Sequence[Config],
    progress: Progress,
    *,
    sparsity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `summary.json` says of a run that has ended, beside what the log knows."""
    table = result_table(log, config, progress)
    return {
        "finished": True,
        "tokens": progress.tokens,
        "round_steps": [settings.train.steps for settings in rounds],
        "rounds_done": progress.round + 1,
        "table": table,
        "gap_closed": table[-1]["gap_closed"],
        "student": str(Path(config.run.dir) / STUDENT_FOLDER),
        "parameters": {"teacher": table[0]["parameters"], "student": table[-1]["parameters"]},
        **({} if sparsity is None else {"sparsity": sparsity}),
    }


def result_table(log: RunLog, config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Return the rows teacher, then for each round its student as it started and as it ended.

    The start is left out where it was not judged: of a round that cuts nothing, or of a run that went on from another
    run's checkpoint. A round whose teacher is not the first round's names it: its students are held against that one.
    """
    judged = log.evaluations
    teacher = next(line for line in judged if line["model"] == "teacher")
    named = [("teacher", teacher, 0.0)]
    rounds = rounds_of(config)
    for index in range(progress.round + 1):
        name = rounds[index].teacher.model
        taught = f" (teacher {Path(name).name})" if name != rounds[0].teacher.model else ""
        words = f"round {index}{taught}: " if len(rounds) > 1 else ""
        start = "pruned" if config.student.model is None or index else "student"
        lines = [line for line in judged if line["model"] == "student" and line["round"] == index]
        trained = [line["step"] for line in log.steps if line["round"] == index]
        prune_s = sum(progress.prune_s[: index + 1])
        begins = lines[0]["step"] == 0 or (index > 0 and (not trained or lines[0]["step"] < trained[0]))
        if len(lines) > 1 and begins:
            named.append((f"{words}{start}", lines[0], prune_s))
        named.append((f"{words}{start} + distilled", lines[-1], prune_s))
    asked = [name for name in named[-1][1] if name.startswith("eval/choices/")]
    return [
        {
            "model": name,
            "parameters": line["parameters"],
            "perplexity": line["eval/perplexity"],
            "agreement": line["eval/agreement"],
            "loss": line["eval/loss"],
            "kl": line["eval/kl"],
            "gap_closed": line.get("eval/gap_closed"),
            **{name.removeprefix("eval/"): line.get(name) for name in asked},
            "seconds": prune_s + (log.seconds_before(line["step"]) if line is not teacher else 0.0),
        }
        for name, line, prune_s in named
    ]
