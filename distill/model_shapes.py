"""Whether a folder's weights are those of the model that its config describes, by names and shapes alone.

The model is built on the meta device, which holds no weights, and compared with the headers of the files. So a config that does
not belong to the weights is known before memory is taken for them, which could be any amount. Decides that only shapes and the
embedding are compared: tensors that are missing or left over are told by the loader, which knows what families do with names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import ConfigError
from distill.convert import show

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_shapes(
    folder: Path, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], *, key: str
) -> None:
    """Compare a config's parameters with the tensors in the files.

    Args:
        shapes: of the tensors, by name, as their headers say.
        key: the setting that named the folder, for messages.
    Raises:
        ConfigError: the config describes no model that can be built, one with other shapes, or there is no embedding.
    """
    from parallel.model import build_meta_model

    try:
        model = build_meta_model(config)
    except Exception as error:  # the families' own code, on numbers that it did not expect
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{key}={folder}: config.json describes a model that cannot be built ({reason}); fetch it again"
        ) from error
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if name not in shapes and parameter is embedding:
            raise ConfigError(f"{key}={folder}: {folder} has no tensor {name!r}, which the model needs")
        if shapes.get(name, parameter.shape) != tuple(parameter.shape):
            raise ConfigError(
                f"{key}={folder}: tensor {name!r} has shape {show(list(shapes[name]))}, but config.json says "
                f"{show(list(parameter.shape))}; use the config that belongs to the weights"
            )
