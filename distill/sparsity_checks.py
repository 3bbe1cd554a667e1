"""Whether the weights of a student can be held at zero, as far as its config shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.config import ConfigError
from distill.structure import MATRICES
from distill.student_config import Sparsity
from parallel.factored import ranks_of
from parallel.model import build_meta_model, stage_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_sparse(sparsity: Sparsity, model_config: PretrainedConfig) -> None:
    """Check that every matrix of a decoder layer is one that can be held at zero: none stays dense by chance.

    Args:
        model_config: the student's.
    Raises:
        ConfigError: factored linears, or matrices under names that are not known.
    """
    if sparsity.method is None:
        return
    what = f"student.sparsity.method={sparsity.method}"
    if ranks_of(model_config):
        raise ConfigError(
            f"{what} holds weights of dense linears, but the student is factored; use null, or a student that was exported "
            "with export.low_rank=merged"
        )
    model = build_meta_model(model_config)
    names = stage_names(model)
    for layer in getattr(getattr(model, names.base), names.layers):
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1 and name.rpartition(".")[0] not in MATRICES:
                raise ConfigError(
                    f"{what} does not know {name} in the layers of {model_config.model_type} and would leave it dense; use null"
                )
