"""Which layer of the teacher each mapped layer of the student is held against, and how widths are brought together.

Decides the map: the layer that a student's layer was cut from, where the student was cut out of this very teacher, else the
one of the same relative depth. It depends on the models and the settings alone, so it is the same whatever holds which
layer. The residual stream of a cut student keeps the teacher's scale (`distill.prune` corrects norms and embeddings, not
the stream), so a projection that starts as the selection of its channels needs no factor. A student's kept indices count the
units of the run's first teacher; they say something of a round's teacher only where that is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import Config, ConfigError, Hidden
from distill.kept import Kept
from distill.prune import KEPT_FILE, KEPT_FOLDER, load_kept

PROJECTION = "hidden_projection."
"""What the names of projections begin with, in optimizer and checkpoints; no model's parameter does."""


class Pair(NamedTuple):
    """Layers that are held against each other, by global index."""

    student: int
    teacher: int


def mapped_layers(hidden: Hidden, num_layers: int) -> list[int]:
    """Return the student's layers that are compared, ascending: those of the pairs, or each n-th from the last on down."""
    if hidden.layers is not None:
        return sorted(student for student, _ in hidden.layers)
    return sorted(range(num_layers - 1, -1, -hidden.every))


def layer_pairs(
    hidden: Hidden, *, student_layers: int, teacher_layers: int, kept: Kept | None = None
) -> list[Pair]:
    """Return the pairs of layers that are compared, ascending by the student's.

    Without pairs given and without `kept`, student's layer i takes round((i + 1) * teacher_layers / student_layers) - 1,
    the first one at least.

    Args:
        hidden: the settings.
        student_layers, teacher_layers: of the whole models.
        kept: units of this teacher that the student keeps; None where it was not cut out of it.
    """
    if hidden.layers is not None:
        return sorted(Pair(*pair) for pair in hidden.layers)
    layers = mapped_layers(hidden, student_layers)
    if kept is not None:
        return [Pair(layer, kept.layers[layer]) for layer in layers]
    depths = (round((layer + 1) * teacher_layers / student_layers) - 1 for layer in layers)
    return [Pair(layer, max(0, depth)) for layer, depth in zip(layers, depths, strict=True)]


def kept_of(folder: Path, teacher: str | None, *, same_origin: bool) -> Kept | None:
    """Return the units of the round's teacher that the student in `folder` keeps, None if it was not cut out of it.

    Args:
        teacher: the round's, as the settings name it; a cut remembers the name.
        same_origin: whether it is the run's first teacher, whose units all cuts of the run count.
    """
    if not same_origin or not (folder / KEPT_FOLDER / KEPT_FILE).is_file():
        return None
    kept, provenance = load_kept(folder)
    return kept if provenance.get("teacher") == teacher else None


def check_widths(config: Config, *, student_width: int, teacher_width: int, is_cut: bool) -> None:
    """Check that hidden states can be compared without a projection, where none is wanted.

    Args:
        is_cut: whether the student is, or will be, cut out of this teacher.
    Raises:
        ConfigError: two widths, and no channels that the student has of the teacher.
    """
    hidden = config.loss.hidden
    if hidden.is_on and hidden.projection == "none" and student_width != teacher_width and not is_cut:
        raise ConfigError(
            f"loss.hidden.projection=none needs one hidden_size, but the student has {student_width}, the teacher "
            f"{teacher_width}, and the student was not cut out of it; use learned"
        )


def first_projection(
    layer: int, *, student_width: int, teacher_width: int, channels: Tensor | None, seed: int
) -> Tensor:
    """Return what the projection of a student's layer starts as, float64 [teacher_width, student_width].

    A cut student starts with its channels where the teacher has them (all of them: the identity), two models of one width
    with the identity, others with independent normal entries of variance 1 / student_width.

    Args:
        channels: the teacher's channels that the student keeps, int64 [student_width]; None where it is no cut of it.
        seed: of the run.
    """
    if channels is None and student_width == teacher_width:
        channels = torch.arange(teacher_width)
    if channels is None:
        # Of the layer alone, so that no layout of the ranks draws other numbers.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
        shape = teacher_width, student_width
        return torch.randn(shape, generator=generator, dtype=torch.float64) * student_width**-0.5
    start_ED = torch.zeros(teacher_width, student_width, dtype=torch.float64)
    start_ED[channels, torch.arange(student_width)] = 1.0
    return start_ED
