"""Run the teacher to score its units, once: the scores of one teacher, text and method are kept and reused.

Decides which method scores what. `student.prune.method` scores the widths; layers are scored by what it gives for them, or by
`student.prune.depth_method`. Only what is asked for is computed, on the teacher's own stages and shards:

    l1, l2            reads the weights once
    activation        one forward pass over the calibration text; block influence costs no further one
    block_influence   one forward pass
    leave_one_out     1 + L forward passes over the text, L the teacher's layers, heads included
    random            nothing

Scores are cached under a key made of what they depend on: the contents of the teacher's weight files and config, the
methods, and, as far as these look at them, the dtype, the rows of text and the seed. The layout is not in it. Does not
know formulas (`distill.importance`) or what is cut by the scores (`distill.prune`).

Legend: L layers.
Source: Siddiqui et al. 2024 and Kim et al. 2024 (Shortened LLaMA) for leaving out one layer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.atomic import build_once
from distill.config import Config
from distill.data import IGNORE, MicroBatch
from distill.evaluate import evaluate
from distill.forward import run_forward
from distill.importance import ActivationRecorder, gather_scores, random_scores, weight_scores
from distill.scores import Scores
from distill.structure import Sizes
from parallel.collectives import broadcast_object, gather_objects
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.p2p import Links


def depth_method_of(method: str, depth_method: str | None) -> str:
    """Return how layers are scored: by `depth_method`, or by what `method` gives for them."""
    return depth_method or ("block_influence" if method == "activation" else method)


def reads_text(method: str, depth_method: str | None) -> bool:
    """Return whether these methods look at a calibration text."""
    asked = {method, depth_method_of(method, depth_method)}
    return bool(asked & {"activation", "block_influence", "leave_one_out"})


def score_teacher(
    teacher: StageModel,
    mesh: Mesh,
    links: Links,
    microbatches: Sequence[MicroBatch],
    *,
    method: str,
    depth_method: str | None = None,
    seed: int = 0,
) -> Scores:
    """Score every unit of the teacher, on the stages and shards as they stand.

    Args:
        links: channels for K.
        microbatches: this replica's calibration text; not used by `l1`, `l2` and `random`.
        method: `activation`, `l1`, `l2` or `random`.
        depth_method: `block_influence`, `leave_one_out`, `random`, or None for what `method` gives for layers.
        seed: of `random`.
    Returns:
        The whole model's scores, on every rank.
    Raises:
        ValueError: the text has no token to judge by, or a score is not finite.
    Collectives: the forward passes, each followed by gathers over tp, dp and pp or an all-reduce over the world; for
        scores of weights the gathers alone.
    """
    sizes, depth = Sizes.of(teacher.config), depth_method_of(method, depth_method)
    wants = {"channels": method == "activation", "influence": depth == "block_influence"}
    if any(wants.values()):
        recorder = ActivationRecorder(teacher.layers, sizes, **wants)
        recorded = _record(recorder, teacher, mesh, links, microbatches)
    if method == "activation":
        scores = recorded
    elif method == "random":
        scores = random_scores(sizes, seed)
    else:
        scores = gather_scores(weight_scores(teacher.layers, sizes, method), mesh)
    if depth == "block_influence":
        scores = replace(scores, layers=recorded.layers, depth_method=depth)
    elif depth == "leave_one_out":
        rises = leave_one_out(teacher, mesh, links, microbatches)
        scores = replace(scores, layers=rises, depth_method=depth)
    elif depth == "random":
        scores = replace(scores, layers=random_scores(sizes, seed).layers, depth_method=depth)
    scores.check()
    return scores


def _record(
    recorder: ActivationRecorder,
    teacher: StageModel,
    mesh: Mesh,
    links: Links,
    microbatches: Sequence[MicroBatch],
) -> Scores:
    with recorder:
        run_forward(
            mesh,
            links,
            microbatches,
            teacher=teacher,
            before=recorder.look_at,
        )
    return gather_scores(recorder.measured, mesh)


def leave_one_out(
    teacher: StageModel, mesh: Mesh, links: Links, microbatches: Sequence[MicroBatch]
) -> dict[int, float]:
    """Return by how much the teacher's cross-entropy rises when one layer is left out, for each layer.

        score_l = CE(teacher without layer l) - CE(teacher)       nats per token of the calibration text

    Args: as `score_teacher`.
    Raises:
        ValueError: the text has no token to judge by.
    Collectives: 1 + L times those of `evaluate`, layers ascending on all ranks.
    """
    whole = evaluate(mesh, links, microbatches, teacher=teacher).loss
    rises: dict[int, float] = {}
    for layer in range(Sizes.of(teacher.config).layers):
        with teacher.without(layer):
            rises[layer] = evaluate(mesh, links, microbatches, teacher=teacher).loss - whole
    return rises


def cached_scores(
    config: Config,
    mesh: Mesh,
    *,
    teacher: StageModel,
    teacher_folder: Path,
    links: Links,
    microbatches: Sequence[MicroBatch],
) -> tuple[Scores, dict[str, Any]]:
    """Return the scores that the settings ask for, from `data.cache_dir`/scores or measured and kept there.

    A cached file that is damaged is told and made again. Hashing the teacher's files takes a second or so a GB.

    Returns:
        The scores, on every rank, and what they depend on, on rank 0 (empty elsewhere).
    Raises:
        ValueError: as `score_teacher`.
    Collectives: a gather of objects over dp, a broadcast over the world, and those of `score_teacher` unless cached.
    """
    prune = config.student.prune
    rows = gather_objects(_row_digests(microbatches), mesh.dp)
    depends: dict[str, Any] = {}
    found, path = None, Path()
    if mesh.world.is_first:
        depends = _depends(config, teacher_folder, sorted(digest for share in rows for digest in share))
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
        path = Path(config.data.cache_dir) / "scores" / f"{key}.safetensors"
        found = _load(config, path, depends)
    # Rank 0 looks for all: what the others see of a shared folder may lag behind.
    found = broadcast_object(found, mesh.world)
    if found is not None:
        return found, depends
    if mesh.world.is_first:
        text = f" on {prune.calibration_rows} rows of text" if "rows" in depends else ""
        print(f"scoring {config.teacher.model}{text}, to cut the student out of it ...", flush=True)
    scores = score_teacher(
        teacher,
        mesh,
        links,
        microbatches,
        method=prune.method,
        depth_method=prune.depth_method,
        seed=config.train.seed,
    )
    if mesh.world.is_first:
        build_once(path, lambda temporary: scores.save(temporary, depends))
    return scores, depends


def _load(config: Config, path: Path, depends: Mapping[str, Any]) -> Scores | None:
    """Return the scores in a cached file, or None if there is none that can be used."""
    if not path.exists():
        return None
    try:
        scores = Scores.load(path, depends)
    except ValueError as error:
        print(f"the scores are measured again, since the cached ones are damaged: {error}", flush=True)
        return None
    print(f"scores of {config.teacher.model}: those measured before, {path}", flush=True)
    return scores


def _depends(config: Config, teacher_folder: Path, rows: Sequence[str]) -> dict[str, Any]:
    """Return what scores depend on, as JSON can hold it: equal exactly when the scores may be shared."""
    prune = config.student.prune
    depth = depth_method_of(prune.method, prune.depth_method)
    files = [teacher_folder / "config.json", *teacher_folder.glob("*.safetensors")]
    depends: dict[str, Any] = {
        "teacher": {file.name: _content(file) for file in sorted(files)},
        "method": prune.method,
        "depth_method": depth,
    }
    if reads_text(prune.method, prune.depth_method):
        text = hashlib.sha256("".join(rows).encode()).hexdigest()
        depends |= {"rows": len(rows), "seq_len": config.data.seq_len, "text": text}
    if {prune.method, depth} != {"random"}:
        # Weights are read as they are loaded.
        depends |= {"dtype": config.train.dtype}
    if "random" in (prune.method, depth):
        depends |= {"seed": config.train.seed}
    return depends


def _content(file: Path) -> list[int | str]:
    """Return size and checksum of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return [os.path.getsize(file), digest]


def _row_digests(microbatches: Sequence[MicroBatch]) -> list[str]:
    """Return a checksum of each row that has a label; the rows that fill up a micro-batch have none."""
    return [
        hashlib.sha256(b"".join(column.cpu().numpy().tobytes() for column in row)).hexdigest()
        for batch in microbatches
        for row in zip(batch.input_ids_BS, batch.position_ids_BS, batch.labels_BS, strict=True)
        if (row[2] != IGNORE).any()
    ]
