"""Scores of a model's units, and how the sums behind them are joined over the mesh.

Decides the form in which every importance method delivers: vectors of sums (`Piece`) by layer and quantity, each saying
how it joins those of the other ranks, so that a method runs unchanged on one process and on a tensor-parallel,
pipeline-cut, replicated teacher. Knows nothing of what the sums mean; `distill.importance` does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.structure import Sizes
from parallel.collectives import gather_objects
from parallel.mesh import Mesh


class NotFinite(ValueError):
    """Scores that are NaN or infinite: so are the model's weights, or what it computes."""


@dataclass
class Scores:
    """Importance of every unit of a model, float32, global; higher is more important. Only ranks within one unit kind."""

    method: str
    ffn: dict[int, Tensor]
    """Layer -> [M]."""
    groups: dict[int, Tensor]
    """Layer -> [G], one score for a key/value head and its query heads."""
    hidden: Tensor
    """[D]."""
    layers: dict[int, float]
    depth_method: str | None = None
    """How the layers were scored; None if they were not."""

    def check(self) -> None:
        """Raise NotFinite if a score is not finite, naming the layer."""
        for layer in sorted({*self.layers, *self.ffn, *self.groups}):
            vectors = [scores[layer] for scores in (self.ffn, self.groups) if layer in scores]
            if not math.isfinite(self.layers.get(layer, 0.0)) or not all(v.isfinite().all() for v in vectors):
                raise NotFinite(f"importance: layer {layer} has scores that are not finite")
        if not self.hidden.isfinite().all():
            raise NotFinite("importance: residual channels have scores that are not finite")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden}
        tensors |= {f"ffn.{layer}": score.contiguous() for layer, score in self.ffn.items()}
        return tensors | {f"groups.{layer}": score.contiguous() for layer, score in self.groups.items()}

    def save(self, path: Path, depends: Mapping[str, Any] | None = None) -> None:
        """Write the scores as one safetensors file; its header holds methods, a checksum, and what they depend on."""
        tensors = self._tensors()
        header = {
            "method": self.method,
            "depth_method": self.depth_method,
            "layers": {str(layer): score for layer, score in self.layers.items()},
            "sha256": _checksum(tensors),
            "depends": dict(depends or {}),
        }
        save_file(tensors, path, metadata={"scores": json.dumps(header)})

    @staticmethod
    def load(path: Path, depends: Mapping[str, Any] | None = None) -> Scores:
        """Read what `save` wrote.

        Args:
            depends: what the scores must depend on; None takes any.
        Raises:
            ValueError: not such a file, a tensor too many or too few, other contents than were written, or scores that
                depend on something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["scores"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers = {int(layer): float(score) for layer, score in header["layers"].items()}
            scores = Scores(
                method=header["method"],
                ffn={layer: tensors[f"ffn.{layer}"] for layer in layers},
                groups={layer: tensors[f"groups.{layer}"] for layer in layers},
                hidden=tensors["hidden"],
                layers=layers,
                depth_method=header["depth_method"],
            )
            checksum, found = header["sha256"], header["depends"]
        except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no importance scores: {error!r}") from error
        if scores._tensors().keys() != tensors.keys() or _checksum(tensors) != checksum:
            raise ValueError(f"{path} holds other importance scores than were written")
        if depends is not None and found != depends:
            raise ValueError(f"{path} holds importance scores of something else")
        scores.check()
        return scores


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Piece:
    """One vector of sums as one rank has it, and how it joins those of the other ranks."""

    values: Tensor
    """float64 on the CPU, [length]."""
    start: int
    """Where the values lie in the whole vector; the tensor-parallel ranks' pieces cover it."""
    whole: int
    """Length of the whole vector."""
    add_over_tp: bool = False
    """Every tensor-parallel rank holds a partial sum of the same entries."""
    add_over_dp: bool = False
    """Every replica saw other tokens (activations); otherwise replicas hold the same (weights)."""


@dataclass
class Measured:
    """What one rank measured, before it is made global."""

    method: str
    sizes: Sizes
    pieces: dict[tuple[int, str], Piece] = field(default_factory=dict)
    """(layer, quantity) -> its vector."""


def _join_tp(pieces: list[Piece]) -> Piece:
    first = pieces[0]
    if first.add_over_tp:
        values = torch.stack([piece.values for piece in pieces]).sum(dim=0)
    else:
        # Replicated vectors and key/value heads held twice are written twice with the same numbers.
        values = first.values.new_zeros(first.whole)
        covered = torch.zeros(first.whole, dtype=torch.bool)
        for piece in pieces:
            stop = piece.start + len(piece.values)
            values[piece.start : stop] = piece.values
            covered[piece.start : stop] = True
        assert covered.all(), (
            f"tensor-parallel pieces leave {int((~covered).sum())} of {first.whole} entries out"
        )
    return Piece(values, 0, first.whole, add_over_dp=first.add_over_dp)


def _join_dp(pieces: list[Piece]) -> Piece:
    if pieces[0].add_over_dp:
        return Piece(torch.stack([piece.values for piece in pieces]).sum(dim=0), 0, pieces[0].whole)
    return pieces[0]


def unite(measured: Measured, mesh: Mesh) -> dict[int, dict[str, Tensor]]:
    """Return every quantity of every layer of the model, whole, the same on every rank.

    Returns:
        layer -> quantity -> float64 [length], layers ascending.
    Collectives: gather of objects over tp, then dp, then pp.
    """
    pieces = measured.pieces
    for axis, join in ((mesh.tp, _join_tp), (mesh.dp, _join_dp)):
        ranks = gather_objects(pieces, axis)
        pieces = {key: join([rank[key] for rank in ranks]) for key in pieces}
    values: dict[tuple[int, str], Tensor] = {}
    for stage in gather_objects(pieces, mesh.pp):
        assert not values.keys() & stage.keys(), "two stages measured the same layer"
        values |= {key: piece.values for key, piece in stage.items()}
    by_layer: dict[int, dict[str, Tensor]] = {}
    for layer, quantity in sorted(values):
        by_layer.setdefault(layer, {})[quantity] = values[layer, quantity]
    return by_layer
