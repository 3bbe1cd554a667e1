"""Decoders whose layers differ in width: transformers' own modules, each layer built from its own config.

transformers 5.23 reads, writes and validates `config.per_layer_config`, and its caches follow it, but most families still
build every layer from the common config, and then refuse to read a width that is not common. `layerwise` derives a class
that builds each layer from `config.per_layer_config[i]`; nothing else of the family's code changes. It imports torch and
transformers alone, because the source of this file is also the modelling code that goes with exported weights, so that
`from_pretrained(folder, trust_remote_code=True)` builds the same model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def layerwise(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a causal LM's class whose layers follow `config.per_layer_config`.

    Args:
        model_class: of a family whose decoder keeps its layers in `layers` and builds each from (config, index).
    """

    class Layerwise(model_class):
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            overrides = config.to_dict().get("per_layer_config")
            # The family's own code runs on the common config ...
            config.per_layer_config = None
            super().__init__(config, *args, **kwargs)
            config.per_layer_config = overrides
            # ... and what it made of its layers is made again.
            layers = self.get_decoder().layers
            for index, own in enumerate(config.per_layer_config):
                layers[index] = type(layers[index])(own, index)

    Layerwise.__name__ = Layerwise.__qualname__ = model_class.__name__
    return Layerwise
