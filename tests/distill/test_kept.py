"""The record of a cut: through its file and back; what it does to models is in test_prune.py and test_recut.py."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.kept import Kept


def test_kept_indices_survive_the_file(tmp_path: Path) -> None:
    metadata = {"method": "l1", "prune": {"num_layers": 2, "layers": None}}
    kept = Kept(
        hidden=torch.tensor([0, 2, 5]),
        ffn={0: torch.tensor([1, 4]), 2: torch.tensor([0, 3])},
        groups={0: torch.tensor([1]), 2: torch.tensor([0])},
        layers=(0, 2),
    )
    kept.save(tmp_path / "kept.safetensors", metadata)
    loaded, loaded_metadata = Kept.load(tmp_path / "kept.safetensors")
    assert loaded.layers == kept.layers and loaded_metadata == metadata
    assert torch.equal(loaded.hidden, kept.hidden) and loaded.ffn.keys() == kept.ffn.keys()
    for layer in kept.layers:
        assert torch.equal(loaded.ffn[layer], kept.ffn[layer])
        assert torch.equal(loaded.groups[layer], kept.groups[layer])
