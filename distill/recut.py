"""Cut a trained student anew: units go, and units that an earlier cut dropped come back from the teacher.

Decides where each entry of the new student comes from. Kept indices always refer to the original teacher, so a cut of a
student is first composed with the student's own (`Kept.of_student`), and any two students of one teacher can be told apart
by their indices alone. An entry whose units are all in the current student is the student's, trained; every other one is
the teacher's, as `distill.prune` would cut it. Restored units thus meet weights that were trained without them: what they
compute is the teacher's, and the round that follows has to fit them in.

The scale of what a cut of the residual width leaves (c = sqrt(D/D'), see `distill.prune`) changes with the width. For
a weight w of the teacher, cut with factor c_old and trained to s, the new one is

    c_new * w + (s - c_old * w) * c_new / c_old

which is c_new / c_old * s, written so that an entry which training left alone is exactly what a cut from the teacher gives:
cuts and growths do not add up rounding. A restored entry is c_new * w.

One tensor of each folder is in memory at a time beside the shard being filled, and both folders are read strictly; where the
scale changes, also what it is computed from in float64 (of an embedding only for the families that scale theirs, as Gemma's).
The new student has the types of the current one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.cut_config import student_config
from distill.cut_files import Stored, stored_parameters
from distill.kept import Kept
from distill.prune import Rescale, refuse_existing, rescale_of, write_student
from distill.structure import (
    Layout,
    Sizes,
    cut,
    cut_shape,
    kept_entries,
    layout_of,
    student_name,
    teacher_name,
)
from parallel.model import build_meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def recut(
    tensor: Tensor,
    layout: Layout,
    sizes: Sizes,
    old: Kept,
    new: Kept,
    *,
    restored: Tensor | float = 0.0,
) -> Tensor:
    """Return the new student's tensor out of the current one's: a parameter, or a moment or master of its shape.

    Args:
        tensor: whole, in the current student's shape.
        layout: `layout_of` the teacher's parameter; its layer is in both students.
        sizes: the teacher's.
        old, new: units of the teacher in the current and in the new student.
        restored: for entries that the current student does not have: a number, or a tensor of the new shape.
    """
    if isinstance(restored, Tensor):
        result = restored.to(tensor.dtype, copy=True)
    else:
        result = tensor.new_full(cut_shape(layout, sizes, new), restored)
    places: list[Tensor] = []
    for dim in range(len(layout.dims)):
        have, want = (kept_entries(layout, dim, sizes, kept) for kept in (old, new))
        in_both = torch.isin(want, have)
        tensor = tensor.index_select(dim, torch.searchsorted(have, want[in_both]).to(tensor.device))
        places.append(in_both.nonzero().flatten().to(tensor.device))
    result[torch.meshgrid(*places, indexing="ij")] = tensor
    return result


def is_inside(layout: Layout, sizes: Sizes, old: Kept, new: Kept) -> bool:
    """Return whether the current student has every entry of the new one's parameter; arguments as `recut`."""
    return all(
        torch.isin(kept_entries(layout, dim, sizes, new), kept_entries(layout, dim, sizes, old)).all()
        for dim in range(len(layout.dims))
    )


@dataclass(frozen=True)
class _Recut:
    """Makes the new student's tensors."""

    sizes: Sizes
    old: Kept
    new: Kept
    rescale_old: Rescale
    rescale_new: Rescale
    teacher: Mapping[str, Stored]
    student: Mapping[str, Stored]
    """By the student's own names."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a parameter of the new student: that of the current one's, or of its embeddings."""
        current = self._current(name)
        if current is None:
            current = next(each for key, each in self.student.items() if key.endswith("embed_tokens.weight"))
        return current.dtype

    def produce(self, name: str) -> Tensor:
        """Return a parameter of the new student."""
        source = self.teacher[teacher_name(name, self.new)]
        layout = layout_of(source.name, source.shape, self.sizes)
        current = self._current(name)
        if current is None:
            tensor = cut(source.read(), layout, self.sizes, self.new)
            return self.rescale_new.apply(tensor, layout, name).to(self.dtype(name))
        factors = [rescale.factor(layout, name) for rescale in (self.rescale_old, self.rescale_new)]
        if factors == [1.0, 1.0]:
            restored: Tensor | float = 0.0
            if not is_inside(layout, self.sizes, self.old, self.new):
                restored = cut(source.read(), layout, self.sizes, self.new)
            return recut(current.read(), layout, self.sizes, self.old, self.new, restored=restored)
        whole = source.read()
        tensor = self.rescale_new.apply(cut(whole, layout, self.sizes, self.new).double(), layout, name)
        cut_before = self.rescale_old.apply(cut(whole, layout, self.sizes, self.old), layout, name)
        trained_by = current.read().double() - cut_before.to(current.dtype).double()
        tensor += recut(trained_by, layout, self.sizes, self.old, self.new) * (factors[1] / factors[0])
        return tensor.to(current.dtype)

    def _current(self, name: str) -> Stored | None:
        """Return the current student's parameter, None where its layer is restored."""
        own = student_name(teacher_name(name, self.new), self.old)
        return None if own is None else self.student[own]


def recut_checkpoint(
    teacher_folder: Path,
    student_folder: Path,
    target: Path,
    teacher_config: PretrainedConfig,
    old: Kept,
    new: Kept,
    *,
    provenance: Mapping[str, Any],
    max_shard_bytes: int = 2 * 2**30,
) -> PretrainedConfig:
    """Write the student that keeps `new` of the teacher, as far as possible with the weights of a trained student.

    Serves a smaller student, a larger one, and one that loses some units and gets others back. Runs on one process.

    Args:
        teacher_folder: the original teacher's, which `old` and `new` count the units of.
        student_folder: the current student's.
        target: the new student's folder; must not exist.
        teacher_config: the teacher's.
        old: what the current student keeps (`distill.prune.load_kept`).
        new: what the new one keeps.
        provenance: what to remember of the cut; plain JSON values.
        max_shard_bytes: largest weight file, and so the memory it takes to write.
    Returns:
        The new student's config.
    Raises:
        ConfigError: `target` exists; a shape that the family refuses; a folder whose tensors are not those of its model.
    """
    refuse_existing(target)
    config = student_config(teacher_config, new)
    teacher, before, after = (
        build_meta_model(each) for each in (teacher_config, student_config(teacher_config, old), config)
    )
    work = _Recut(
        sizes=Sizes.of(teacher_config),
        old=old,
        new=new,
        rescale_old=rescale_of(teacher, before),
        rescale_new=rescale_of(teacher, after),
        teacher=stored_parameters(teacher_folder, teacher, key="teacher.model"),
        student=stored_parameters(student_folder, before, key="student.model"),
    )
    write_student(
        target,
        config,
        after,
        {name: work.dtype(name) for name, _ in after.named_parameters()},
        work.produce,
        companions=student_folder,
        kept=new,
        provenance=provenance,
        max_shard_bytes=max_shard_bytes,
    )
    return config
