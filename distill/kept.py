"""Which units of a teacher a student keeps: the record of a cut, on disk and in arithmetic.

Decides that indices always count the units of the original teacher, however many cuts lie between, and that they ascend.
A safetensors file holds them, so that nothing is unpickled. What a unit is, `distill.structure` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from distill.structure import Sizes


@dataclass(frozen=True)
class Kept:
    """Indices of the teacher's units that the student keeps, each ascending, so that the order stays."""

    hidden: Tensor
    """int64 [D'], one set for the whole model."""
    ffn: dict[int, Tensor]
    """Teacher's layer index -> int64 [M']; kept layers only."""
    groups: dict[int, Tensor]
    """Teacher's layer index -> int64 [G'], whole query groups; kept layers only."""
    layers: tuple[int, ...]
    """Teacher's layer index by student's layer index."""

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the indices as one safetensors file whose header carries `metadata` as JSON."""
        tensors = {"hidden": self.hidden, "layers": torch.tensor(self.layers)}
        tensors |= {f"ffn.{layer}": indices for layer, indices in self.ffn.items()}
        tensors |= {f"groups.{layer}": indices for layer, indices in self.groups.items()}
        save_file(tensors, path, metadata={"kept": json.dumps(metadata)})

    @staticmethod
    def load(path: Path) -> tuple[Kept, dict[str, Any]]:
        """Read what `save` wrote: the indices and the metadata."""
        ffn: dict[int, Tensor] = {}
        groups: dict[int, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                kind, _, layer = name.partition(".")
                if layer:
                    {"ffn": ffn, "groups": groups}[kind][int(layer)] = file.get_tensor(name)
            layers = tuple(file.get_tensor("layers").tolist())
            hidden = file.get_tensor("hidden")
            metadata = json.loads(file.metadata()["kept"])
        ordered = [{layer: by_layer[layer] for layer in layers} for by_layer in (ffn, groups)]
        return Kept(hidden, *ordered, layers), metadata

    def of_student(self, inner: Kept) -> Kept:
        """Return the cut of the teacher that cuts `inner` out of the student which keeps these units.

        Args:
            inner: indices of that student's own units and layers.
        """
        layers = tuple(self.layers[layer] for layer in inner.layers)

        def inside(own: dict[int, Tensor], further: dict[int, Tensor]) -> dict[int, Tensor]:
            return {self.layers[layer]: own[self.layers[layer]][further[layer]] for layer in inner.layers}

        return Kept(
            hidden=self.hidden[inner.hidden],
            ffn=inside(self.ffn, inner.ffn),
            groups=inside(self.groups, inner.groups),
            layers=layers,
        )

    @staticmethod
    def everything(sizes: Sizes) -> Kept:
        """Return the cut that removes nothing."""
        layers = tuple(range(sizes.layers))
        return Kept(
            hidden=torch.arange(sizes.hidden),
            ffn={layer: torch.arange(sizes.at(layer).ffn) for layer in layers},
            groups={layer: torch.arange(sizes.at(layer).groups) for layer in layers},
            layers=layers,
        )
