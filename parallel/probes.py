"""What no plan of a family says, tried on its own code: does a stage pass hidden states through, what are logits made of.

Both probes run the family's forward with stubs in place of everything that has weights, so they cost nothing and need none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from parallel.plan import UnsupportedModel

if TYPE_CHECKING:
    from parallel.model import StageModel


@dataclass(frozen=True)
class LogitsTransform:
    """How a family turns the head's product z into logits: softcap * tanh(scale * z / softcap), or scale * z."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Apply the transform to any shape."""
        logits = product * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def probe_passthrough(stage: StageModel, skipped: type[nn.Module]) -> None:
    """Check that a stage without layers returns the hidden state it is given (a family may rescale it on entry)."""
    if stage.is_first:
        return
    base, names = stage.base, stage.names
    owned = {name: getattr(base, name) for name in (names.layers, *names.tail)}
    parameter = next(stage.parameters())
    hidden = torch.linspace(
        -3, 3, 2 * stage.config.hidden_size, device=parameter.device, dtype=parameter.dtype
    )
    hidden = hidden.view(1, 2, -1)
    base._modules.update({name: nn.Identity() for name in names.tail})
    base._modules[names.layers] = nn.ModuleList(skipped() for _ in owned[names.layers])
    try:
        result = base(
            inputs_embeds=hidden, position_ids=torch.arange(2, device=hidden.device)[None], use_cache=False
        )
    finally:
        base._modules.update(owned)
    if not torch.equal(result.last_hidden_state, hidden):
        raise UnsupportedModel(
            f"{type(stage.causal_lm).__name__} changes hidden states between stages; use mesh.pp=1 for this family"
        )


def logits_transform(config: PretrainedConfig) -> LogitsTransform:
    """Return the transform that the family's config asks for."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = config.logit_scale
    return LogitsTransform(scale, getattr(config, "final_logit_softcapping", None))


class _Returns(nn.Module):
    """A stub that returns a fixed value whatever it is given."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.value


@torch.no_grad()
def probe_logits(stage: StageModel) -> None:
    """Check `stage.transform` against the family's own forward, with stubs in place of base model and head."""
    model, names = stage.causal_lm, stage.names
    base, head = stage.base, stage.head
    hidden = torch.zeros(1, 2, stage.config.hidden_size)
    product = torch.linspace(-80, 80, 2 * stage.config.vocab_size, dtype=torch.float64).view(1, 2, -1)
    try:
        model._modules[names.base] = _Returns(BaseModelOutputWithPast(last_hidden_state=hidden))
        model.set_submodule(names.head, _Returns(product))
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
    finally:
        model._modules[names.base] = base
        model.set_submodule(names.head, head)
    if not torch.allclose(logits.double(), stage.transform(product), rtol=1e-5):
        raise UnsupportedModel(
            f"{type(model).__name__} turns the head's output into logits in a way that is not known"
        )
