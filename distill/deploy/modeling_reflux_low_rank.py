"""Load a language model some of whose linears are two of a low rank: the code that lies in a factored student's folder.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Decides nothing of its own: the family's class, as transformers has it, builds the model of config.json, and the linears that
`reflux_low_rank` names there are replaced by two each. Imports torch and transformers only, because it travels alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class FactoredLinear(nn.Module):
    """A linear y = (x @ first.T) @ second.T + bias, made to take the place of a dense one.

    Args:
        dense: the linear whose sizes, bias, device and dtype it takes.
        rank: rows of `first` and columns of `second`.
    Shapes: [.., in] -> [.., out].
    """

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.first = nn.Linear(dense.in_features, rank, bias=False, **place)
        self.second = nn.Linear(rank, dense.out_features, bias=dense.bias is not None, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors."""
        return self.second(self.first(x))


def factored_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the family's class for `config`, with a constructor that factors the linears which the config names."""
    family = AutoModelForCausalLM._model_mapping[type(config)]

    def init(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        for name, rank in config.reflux_low_rank.items():
            self.set_submodule(name, FactoredLinear(self.get_submodule(name), rank))

    def save_pretrained(self: PreTrainedModel, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        family.save_pretrained(self, folder, *args, **kwargs)
        shutil.copyfile(__file__, Path(folder) / "modeling_reflux_low_rank.py")

    # The family's own name: it goes into config.json when the model is saved, and says which code builds it.
    members = {"__init__": init, "save_pretrained": save_pretrained, "__module__": __name__}
    return type(family.__name__, (family,), members)


class RefluxLowRankForCausalLM:
    """What config.json names to the auto classes; makes a model of the family's own class, never one of itself."""

    @classmethod
    def from_pretrained(
        cls, folder: str, *args: Any, config: PretrainedConfig, **kwargs: Any
    ) -> PreTrainedModel:
        """Return the model with its weights."""
        return factored_class(config).from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        return factored_class(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the auto classes announce themselves here before they load."""
