"""Write the student as a Hugging Face folder that plain `from_pretrained` and inference engines read.

Weights come from the distributed stages shard by shard; config, tokenizer and the kept indices of the pruning come
from the folder the student started as; the model card is written here. The folder appears whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from distill.config import Config
from distill.prune import KEPT_FOLDER, copy_companions, write_modeling_code
from parallel.collectives import barrier
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.weights import export_weights


def export_student(
    stages: Sequence[StageModel],
    mesh: Mesh,
    target: Path,
    *,
    source: Path,
    model_config: PretrainedConfig,
    card: str,
    dtype: torch.dtype,
) -> None:
    """Write the student to `target`, replacing an earlier export of the same run.

    Args:
        stages: this rank's stages, in ascending order.
        source: the folder that the student's training began with: tokenizer, generation config, kept indices.
        model_config: the student's config, as it is to be written.
        card: text of the model card.
        dtype: of the written weights.
    Collectives: those of `export_weights`; barriers over the world.
    """
    temporary = target.with_name(f".{target.name}.partial")
    if mesh.world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(mesh.world)
    export_weights(stages, mesh, temporary, dtype=dtype)
    if mesh.world.is_first:
        model_config.dtype = dtype
        model_config.save_pretrained(temporary)
        copy_companions(source, temporary)
        write_modeling_code(temporary, stages[0].causal_lm)
        if (source / KEPT_FOLDER).is_dir():
            shutil.copytree(source / KEPT_FOLDER, temporary / KEPT_FOLDER)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    barrier(mesh.world)


def model_card(config: Config, summary: Mapping[str, Any]) -> str:
    """Return the model card: where the student comes from, how it was trained, what it reaches."""
    loss, prune = config.loss, config.student.prune
    rows = [
        f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['perplexity']:.2f} | {row['agreement']:.1%} |"
        for row in summary["table"]
    ]
    cut = (
        f"pruned from it ({prune.method} importance)"
        if config.student.model is None
        else config.student.model
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, pruning, reflux]",
        "---",
        "",
        f"# Student of {config.teacher.model}",
        "",
        f"- Teacher: `{config.teacher.model}`; student: {cut}; kept indices under `{KEPT_FOLDER}/`.",
        f"- Loss: {loss.alpha} x cross-entropy + {1 - loss.alpha:g} x T^2 {loss.kind} at T = {loss.temperature}.",
        f"- Trained on {summary['tokens']:,} tokens of `{config.data.path}` in rows of {config.data.seq_len}.",
        "",
        "| model | parameters | held-out perplexity | agreement with the teacher's top-1 |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "The text was used as language modelling material only; judge the student on your own task before use.",
        "",
    ]
    return "\n".join(lines)
