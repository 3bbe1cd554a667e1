"""Which layer of the teacher each mapped layer of the student is held against, and how widths are brought together.

Decides the map: the layer that a student's layer was cut from, where the teacher has it, else the one of the same relative
depth. The teacher has it where the student was cut out of this very teacher, and where both were cut out of one model (an
assistant, a corrected teacher) and the teacher kept it: cuts count the units of the model that they were made of. It depends on
the models and the settings alone, so it is the same whatever holds which layer. The residual stream of a cut student keeps the
teacher's scale (`distill.prune` corrects norms and embeddings, not the stream), so a projection that starts as the selection of
its channels needs no factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import Config, ConfigError, Hidden
from distill.prune import KEPT_FILE, KEPT_FOLDER, load_kept

PROJECTION = "hidden_projection."
"""What the names of projections begin with, in optimizer and checkpoints; no model's parameter does."""


class Pair(NamedTuple):
    """Layers that are held against each other, by global index."""

    student: int
    teacher: int


class Shared(NamedTuple):
    """Where a teacher has what its student kept of the model that both come from; None for what it does not have all of."""

    layers: tuple[int, ...] | None
    """Teacher's layer by student's layer."""
    channels: Tensor | None
    """Teacher's channel of the residual stream by student's channel, int64 [student_width], ascending."""


def mapped_layers(hidden: Hidden, num_layers: int) -> list[int]:
    """Return the student's layers that are compared, ascending: those of the pairs, or each n-th from the last on down."""
    if hidden.layers is not None:
        return sorted(student for student, _ in hidden.layers)
    return sorted(range(num_layers - 1, -1, -hidden.every))


def layer_pairs(
    hidden: Hidden, *, student_layers: int, teacher_layers: int, shared: Sequence[int] | None = None
) -> list[Pair]:
    """Return the pairs of layers that are compared, ascending by the student's.

    Without pairs given and without `shared`, student's layer i takes round((i + 1) * teacher_layers / student_layers) - 1,
    the first one at least.

    Args:
        hidden: the settings.
        student_layers, teacher_layers: of the whole models.
        shared: teacher's layer by student's layer (`Shared.layers`).
    """
    if hidden.layers is not None:
        return sorted(Pair(*pair) for pair in hidden.layers)
    layers = mapped_layers(hidden, student_layers)
    if shared is not None:
        return [Pair(layer, shared[layer]) for layer in layers]
    depths = (round((layer + 1) * teacher_layers / student_layers) - 1 for layer in layers)
    return [Pair(layer, max(0, depth)) for layer, depth in zip(layers, depths, strict=True)]


def was_cut(folder: Path, model: str | None) -> bool:
    """Return whether the student in a folder was cut out of a model, as the settings name it; a cut remembers the name."""
    return _is_cut(folder) and _are_one(load_kept(folder)[1].get("teacher"), model)


def shared_with(student: Path, teacher: Path, name: str | None) -> Shared:
    """Return where the teacher has what the student was cut from.

    Args:
        student, teacher: folders.
        name: the teacher's, as the settings name it.
    """
    if not _is_cut(student):
        return Shared(None, None)
    ours, provenance = load_kept(student)
    if _are_one(provenance.get("teacher"), name):
        return Shared(ours.layers, ours.hidden)
    if not was_cut(teacher, provenance.get("teacher")):
        return Shared(None, None)
    theirs, _ = load_kept(teacher)
    places = {layer: place for place, layer in enumerate(theirs.layers)}
    has_layers = places.keys() >= set(ours.layers)
    has_channels = torch.isin(ours.hidden, theirs.hidden).all()
    return Shared(
        tuple(places[layer] for layer in ours.layers) if has_layers else None,
        torch.searchsorted(theirs.hidden, ours.hidden) if has_channels else None,
    )


def _is_cut(folder: Path) -> bool:
    return (folder / KEPT_FOLDER / KEPT_FILE).is_file()


def _are_one(name: str | None, other: str | None) -> bool:
    """Return whether two names mean one model: they are equal, or lead to one place."""
    if name is None or other is None or name == other:
        return name is not None and name == other
    places = [Path(each).expanduser() for each in (name, other)]
    return all(place.exists() for place in places) and places[0].resolve() == places[1].resolve()


def check_widths(config: Config, *, student_width: int, teacher_width: int, shares_channels: bool) -> None:
    """Check that hidden states can be compared without a projection, where none is wanted.

    Args:
        shares_channels: whether the teacher has, or may have, the channels that the student keeps (`Shared.channels`).
    Raises:
        ConfigError: two widths, and no channels that the student has of the teacher.
    """
    hidden = config.loss.hidden
    if (
        hidden.is_on
        and hidden.projection == "none"
        and student_width != teacher_width
        and not shares_channels
    ):
        raise ConfigError(
            f"loss.hidden.projection=none needs one hidden_size, but the student has {student_width}, the teacher "
            f"{teacher_width}, which does not have the channels that the student kept; use learned"
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
