"""Write the student as a Hugging Face folder that plain `from_pretrained` and inference engines read.

Weights come from the distributed stages shard by shard; config, tokenizer and the kept indices of the pruning come
from the folder the student started as; the model card is written here. Factored linears are merged, or kept with the code
that loads them, which is copied into the folder. The folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from distill.config import Config
from distill.convert import config_to_dict, show
from distill.cut_config import AUTO_MAP
from distill.deploy import modeling_reflux_low_rank
from distill.prune import KEPT_FOLDER, copy_companions, write_modeling_code
from distill.saved_config import save_config
from parallel.collectives import barrier
from parallel.factored import CONFIG_KEY, ranks_of
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.weights import export_weights

_MODELING = modeling_reflux_low_rank.__name__.rpartition(".")[2]
_FACTORED_MAP = {
    "AutoModelForCausalLM": f"{_MODELING}.{modeling_reflux_low_rank.RefluxLowRankForCausalLM.__name__}"
}
_FACTORS = {
    "merged": "- Linears are products of two factors of a low rank, merged here: the parameters counted are the factors'.",
    "factored": "- Linears are two factors of a low rank (`reflux_low_rank` in config.json): load with `trust_remote_code=True`; "
    "without it transformers builds dense ones, reports them as missing, and the model is not this one.",
}
"""What the model card says of factored linears, by `export.low_rank`."""
_LAYERWISE = (
    "- Layers differ in width (`per_layer_config` in config.json): load with `trust_remote_code=True`, which runs the few lines "
    "beside this file that build them; transformers alone does not."
)


def export_student(
    stages: Sequence[StageModel],
    mesh: Mesh,
    target: Path,
    *,
    source: Path,
    model_config: PretrainedConfig,
    card: str,
    dtype: torch.dtype,
    merge_factors: bool = True,
) -> None:
    """Write the student to `target`, replacing an earlier export of the same run.

    Args:
        stages: this rank's stages, in ascending order.
        source: the folder that the student's training began with: tokenizer, generation config, kept indices.
        model_config: the student's config, as it is to be written.
        card: text of the model card.
        dtype: of the written weights.
        merge_factors: write factored linears as one matrix each; else as they are, with the code that loads them.
    Collectives: those of `export_weights`; barriers over the world.
    """
    temporary = target.with_name(f".{target.name}.partial")
    if mesh.world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(mesh.world)
    export_weights(stages, mesh, temporary, dtype=dtype, merge_factors=merge_factors)
    if mesh.world.is_first:
        write_config(model_config, temporary, dtype=dtype, merge_factors=merge_factors)
        copy_companions(source, temporary)
        write_modeling_code(temporary, stages[0].causal_lm)
        if (source / KEPT_FOLDER).is_dir():
            shutil.copytree(source / KEPT_FOLDER, temporary / KEPT_FOLDER)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    barrier(mesh.world)


def merged_config(model_config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config in which no linear is factored."""
    merged = copy.deepcopy(model_config)
    if ranks_of(merged):
        delattr(merged, CONFIG_KEY)
    return merged


def write_config(
    model_config: PretrainedConfig, folder: Path, *, dtype: torch.dtype, merge_factors: bool
) -> None:
    """Write config.json, and beside it the code that loads factored linears if there are any and they stay.

    Where layers differ in width there is no such code: the folder is one that training goes on from.

    Args:
        dtype: of the written weights.
        merge_factors: whether the weights of factored linears are written as one matrix each.
    """
    written = merged_config(model_config) if merge_factors else copy.deepcopy(model_config)
    written.dtype = dtype
    if getattr(written, "auto_map", AUTO_MAP) != AUTO_MAP:
        # Of code that came with the model that the student began as, and is not copied.
        del written.auto_map
    if ranks_of(written) and not written.is_heterogeneous:
        written.auto_map = _FACTORED_MAP
        shutil.copyfile(modeling_reflux_low_rank.__file__, folder / f"{_MODELING}.py")
    save_config(written, folder)


def model_card(
    config: Config,
    summary: Mapping[str, Any],
    *,
    origin: str,
    model_config: PretrainedConfig,
) -> str:
    """Return the model card: where the student comes from, how it was trained, what it reaches.

    Args:
        config: of the round.
        summary: of the run, with `tokens` and its `table`; or with the `step` that it has come to; with neither the student
            has not been trained.
        origin: the model that the student was cut out of, as the settings name it; the kept indices count its units.
        model_config: the student's, as it is trained.
    """
    prune = config.student.prune
    cut = (
        f"pruned out of `{origin}` ({prune.method} importance)"
        if config.student.model is None
        else f"`{config.student.model}`"
    )
    zeros = ""
    if "sparsity" in summary:
        share, pattern = summary["sparsity"]["share"], summary["sparsity"]["pattern"]
        zeros = f" {share:.1%} of the weights of the layers' linears are zero ({pattern}), in dense tensors."
    notes = [_FACTORS[config.export.low_rank]] if ranks_of(model_config) else []
    notes += [_LAYERWISE] if model_config.is_heterogeneous else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, pruning, reflux]",
        "---",
        "",
        f"# Student of {Path(str(config.teacher.model)).name}",
        "",
        f"- Teacher: `{config.teacher.model}`; student: {cut}; kept indices under `{KEPT_FOLDER}/`.{zeros}",
        *notes,
        *_training(config, summary),
        "",
        "The text was used as language modelling material only; judge the student on your own task before use.",
        "",
    ]
    return "\n".join(lines)


def _training(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Return the lines on how the student was trained, and what it reaches."""
    if not summary.keys() & {"table", "step"}:
        return ["- Not trained since; a distillation brings back what the cut has cost."]
    loss = config_to_dict(config.loss)
    alpha, temperature = show(loss["alpha"]), show(loss["temperature"])
    return [
        f"- Loss: alpha x cross-entropy + (1 - alpha) x T^2 {loss['kind']}; alpha: {alpha}, T: {temperature}.",
        f"- Trained on {summary['tokens']:,} tokens of `{show(config.data.path)}` in rows of {config.data.seq_len}.",
        "",
        *(_judged(summary["table"]) if "table" in summary else _not_judged(summary["step"])),
    ]


def _judged(table: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "| model | parameters | held-out perplexity | agreement with the teacher's top-1 |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['perplexity']:.2f} | {row['agreement']:.1%} |"
            for row in table
        ),
    ]


def _not_judged(step: int) -> list[str]:
    return [
        f"Exported from the checkpoint of step {step}; the run's `evaluations.jsonl` says what was measured."
    ]
