"""An optimizer's state and mask over a cut: each entry that the new student has from the one before keeps its own.

Decides that the state (AdamW's moments, or what another rule has), and what is held at zero, follow the indices by which the
weights were cut (`distill.recut`), whichever layouts the two rounds have, and that what came back from the teacher, is a factor
of a low rank on either side, or is trained beside the model (projections) starts without any. Weights come from the cut student's folder. A cut of the residual width rescales norms
(`distill.prune`); their moments keep the old scale, which AdamW forgets within 1 / (1 - beta) steps. One whole tensor is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distill.kept import Kept
from distill.recut import recut
from distill.structure import Sizes, layout_of, student_name, teacher_name
from parallel.checkpoint_files import CheckpointError, CheckpointFiles
from parallel.optimizer import StageOptimizer


@torch.no_grad()
def carry_state(
    files: CheckpointFiles,
    optimizer: StageOptimizer,
    *,
    with_moments: bool,
    teacher_shapes: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    old: Kept,
    new: Kept,
) -> None:
    """Fill this rank's mask if it has one, and its state, from the checkpoint of a student that was cut differently.

    What that one does not have stays.

    Args:
        files: tensors of the checkpoint.
        optimizer: of the new student; its state has been reset.
        with_moments: whether the state comes too.
        teacher_shapes: shape of each parameter of the teacher, by name.
        sizes: the teacher's.
        old, new: units of the teacher that the checkpoint's student and the new one keep.
    Raises:
        CheckpointError: a tensor is missing, or has another shape than `old` says.
    """
    wanted = {"mask", *optimizer.kinds} if with_moments else {"mask"}
    for entry, parts in optimizer.state():
        name = teacher_name(entry.name, new)
        before = student_name(name, old) if name in teacher_shapes else None
        for kind, part in parts.items():
            if kind not in wanted or before is None or _is_factored(files, f"{kind}/{before}"):
                continue
            if kind == "mask" and f"{kind}/{before}" not in files.names:
                # Nothing was held in the round before.
                continue
            layout = layout_of(name, teacher_shapes[name], sizes)
            try:
                whole = recut(files.read(f"{kind}/{before}"), layout, sizes, old, new)
            except IndexError as error:
                raise CheckpointError(
                    f"{kind}/{before} is not that of the student before: {error}"
                ) from error
            if entry.shard is not None:
                whole = whole.narrow(entry.shard.dim, entry.shard.start, entry.shard.stop - entry.shard.start)
            part.write(whole.flatten()[part.start : part.stop])


def _is_factored(files: CheckpointFiles, name: str) -> bool:
    """Whether a checkpoint holds factors in place of a parameter."""
    return f"{name.rpartition('.')[0]}.first.weight" in files.names
