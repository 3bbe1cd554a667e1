"""One stage of a transformers causal LM: built on the meta device, cut, parallelised, materialised.

Decides how a model becomes a stage: transformers' own code builds it from the config, layers that other stages own turn
into identities (the list keeps its full length, so layer indices, layer types and sliding windows stay right), the
embedding, final norm and head stay where they belong, and the rest is `parallel.plan`. It assumes the names that the
family publishes in `base_model_pp_plan`, and checks with two probes what cannot be read from a plan: that a stage passes
a hidden state through untouched, and how the family's head turns `lm_head`'s output into logits. Weights come
later (`parallel.weights`). Dropout is off: a distillation trajectory must not depend on the layout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from parallel.collectives import shard_range
from parallel.embedding import VocabParallelEmbedding
from parallel.factored import factorise_linears, ranks_of
from parallel.gradients import WeightGradients
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.layerwise import layerwise
from parallel.mesh import Axis
from parallel.plan import UnsupportedModel, parallelize
from parallel.probes import LogitsTransform, logits_transform, probe_logits, probe_passthrough
from parallel.recompute import LinearOutputs, Recompute

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers whose positions see others by the mask alone."""


class SkippedLayer(nn.Module):
    """Stands where another stage (or another slice of this one) owns the layer."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the hidden state unchanged."""
        return hidden_states


@dataclass(frozen=True)
class StageNames:
    """Where a family keeps the parts of its base model, relative to the causal LM."""

    base: str
    embedding: str
    layers: str
    tail: tuple[str, ...]
    """Modules after the layers (the final norm)."""
    head: str


def stage_names(model: PreTrainedModel) -> StageNames:
    """Read the names from the pipeline plan that the family publishes.

    Raises:
        UnsupportedModel: no plan, or one that does not fit the model.
    """
    plan = model.config.base_model_pp_plan or {}
    keys = list(plan)
    if "layers" not in keys or keys.index("layers") == 0:
        raise UnsupportedModel(
            f"{type(model).__name__} publishes no pipeline plan with an embedding and 'layers'"
        )
    base = model.base_model_prefix
    split = keys.index("layers")
    for name in keys:
        if not hasattr(getattr(model, base), name):
            raise UnsupportedModel(
                f"{type(model).__name__}: its pipeline plan names {name!r}, its model does not"
            )
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return StageNames(base, keys[0], "layers", tuple(keys[split + 1 :]), head)


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Return each stage's range of layers, balanced; earlier stages get the longer ones."""
    return [range(*shard_range(num_layers, num_stages, stage)) for stage in range(num_stages)]


def build_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy for computing: no dropout anywhere, no key/value cache (a cache makes packed documents leak)."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    config.use_cache = False
    return config


def _check_layer_types(config: PretrainedConfig) -> None:
    """Refuse layers that carry a state along a row: rows hold several documents, and none may see another."""
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _ATTENTION
    if others:
        raise UnsupportedModel(
            f"{config.model_type} has layers of the type {min(others)!r}, which would carry a state from one document of a "
            "row into the next"
        )


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal LM of `config` on the meta device: the family's own, or `layerwise` where its layers differ.

    Linears that the config factors are in two.

    Raises:
        UnsupportedModel: factors of something that is no linear, layers that are no attention.
    """
    built = build_config(config)
    _check_layer_types(built)
    with torch.device("meta"):
        if built.is_heterogeneous:
            model = layerwise(MODEL_FOR_CAUSAL_LM_MAPPING[type(built)])._from_config(built)
        else:
            model = AutoModelForCausalLM.from_config(built)
    try:
        factorise_linears(model, ranks_of(config))
    except ValueError as error:
        raise UnsupportedModel(str(error)) from error
    return model


class StageModel(nn.Module):
    """The layers of one stage, callable on a micro-batch; knows its parameters by their Hugging Face names.

    Invariant: between calls all owned layers are in place; `forward(part=...)` swaps a slice of them in for the call.
    """

    def __init__(
        self, model: PreTrainedModel, owned: range, *, is_first: bool, is_last: bool, num_slices: int
    ) -> None:
        super().__init__()
        self.causal_lm = model
        self.config = model.config
        self.owned, self.is_first, self.is_last = owned, is_first, is_last
        self.names = stage_names(model)
        self.weight_gradients = WeightGradients()
        self.full_names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        self.num_slices = num_slices
        self.transform = LogitsTransform()

    @property
    def base(self) -> nn.Module:
        """The family's base model (embedding, layers, final norm)."""
        return getattr(self.causal_lm, self.names.base)

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The decoder layers this stage owns, by global index."""
        modules = getattr(self.base, self.names.layers)
        return {index: modules[index] for index in self.owned}

    @property
    def head(self) -> ColumnParallelLinear:
        """The output head; on the last stage only."""
        assert self.is_last
        return self.causal_lm.get_submodule(self.names.head)

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The input embedding; on the first stage only."""
        assert self.is_first
        return getattr(self.base, self.names.embedding)

    def prepare_slices(self) -> None:
        """Make the module lists of the stage's slices, for `forward(part=j)`; called once the layers are final."""
        modules = getattr(self.base, self.names.layers)
        self._slices = [self._masked(modules, part) for part in split_range(self.owned, self.num_slices)]
        self._whole = modules

    @staticmethod
    def _masked(modules: nn.ModuleList, part: range) -> nn.ModuleList:
        return nn.ModuleList(m if i in part else SkippedLayer() for i, m in enumerate(modules))

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Pass hidden states by one decoder layer inside the block; changes nothing where another stage owns it."""
        lists = [self._whole, *self._slices] if layer in self.owned else []
        modules = [each[layer] for each in lists]
        for each in lists:
            each[layer] = SkippedLayer()
        try:
            yield
        finally:
            for each, module in zip(lists, modules, strict=True):
                each[layer] = module

    def forward(self, x: Tensor, position_ids_BS: Tensor, *, part: int | None = None) -> Tensor:
        """Run the stage, or slice `part` of it, on one micro-batch.

        Args:
            x: token ids [B, S] on the first stage (first slice), else the hidden state [B, S, D].
            position_ids_BS: restart at 0 where a document starts; attention stays inside a document.
            part: index of the slice; None runs all owned layers.
        Returns:
            hidden [B, S, D]; after the final norm on the last stage (last slice).
        Collectives: those of the parallel layers, over tp.
        """
        inputs = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
        if part is None or self.num_slices == 1:
            return self.base(position_ids=position_ids_BS, use_cache=False, **inputs).last_hidden_state
        tail = {name: getattr(self.base, name) for name in self.names.tail}
        self.base._modules[self.names.layers] = self._slices[part]
        if part < self.num_slices - 1:
            self.base._modules.update({name: nn.Identity() for name in tail})
        try:
            return self.base(position_ids=position_ids_BS, use_cache=False, **inputs).last_hidden_state
        finally:
            self.base._modules.update({self.names.layers: self._whole, **tail})


def split_range(owned: range, num_parts: int) -> list[range]:
    """Cut a range of layers into `num_parts` balanced ranges (some empty when there are fewer layers)."""
    parts = (shard_range(len(owned), num_parts, index) for index in range(num_parts))
    return [range(owned.start + start, owned.start + stop) for start, stop in parts]


def build_stage(
    config: PretrainedConfig,
    *,
    pp: Axis,
    tp: Axis,
    owned: range | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    num_slices: int = 1,
    recompute: Recompute = "none",
    compile_layers: bool = False,
) -> StageModel:
    """Build this rank's stage of the model, with uninitialised weights.

    Args:
        config: the whole model's transformers config; not modified.
        pp, tp: the axes; the stage is `pp.rank`.
        owned: layers of this stage; balanced by default.
        trainable: False freezes the weights and sets eval mode (a teacher).
        num_slices: pieces the stage can be run in.
        recompute: what each layer's backward computes again: `none`, `selective` or `full` (`parallel.recompute`).
        compile_layers: run each decoder layer through torch.compile (at its first call; needs a C++ compiler on a CPU).
    Raises:
        UnsupportedModel: the family publishes no usable plan, or transforms hidden states or logits in an unknown way.
    """
    model = build_meta_model(config)
    if owned is None:
        owned = split_layers(model.config.num_hidden_layers, pp.size)[pp.rank]
    stage = StageModel(model, owned, is_first=pp.is_first, is_last=pp.is_last, num_slices=num_slices)
    _cut(stage)
    parallelize(model, dict(model._tp_plan or {}), tp, stage.weight_gradients)
    _fold_embedding_multiplier(stage)
    _materialize(stage, torch.device(device), dtype, trainable)
    stage.prepare_slices()
    probe_passthrough(stage, SkippedLayer)
    if stage.is_last:
        stage.transform = logits_transform(model.config)
        probe_logits(stage)
    stage.train(trainable)
    if trainable and recompute != "none":
        _enable_recompute(stage, recompute)
    if compile_layers:
        for layer in stage.layers.values():
            layer.compile(dynamic=False)
    return stage


def _enable_recompute(stage: StageModel, mode: Recompute) -> None:
    """Make the stage's layers compute their activations again in backward; with `selective` not their linears."""
    settings: dict[str, object] = {"use_reentrant": False}
    if mode == "selective":
        outputs = LinearOutputs()
        settings["context_fn"] = outputs.contexts
        for layer in stage.layers.values():
            for module in layer.modules():
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    module.output_cache = outputs
    stage.causal_lm.activation_checkpointing_enable(settings)


def _cut(stage: StageModel) -> None:
    """Put identities where other stages own the module."""
    base, names = stage.base, stage.names
    setattr(base, names.layers, stage._masked(getattr(base, names.layers), stage.owned))
    if not stage.is_first:
        setattr(base, names.embedding, nn.Identity())
    if not stage.is_last:
        for name in names.tail:
            setattr(base, name, nn.Identity())
        stage.causal_lm.set_submodule(names.head, nn.Identity())


def _fold_embedding_multiplier(stage: StageModel) -> None:
    """Move Granite's factor on whatever enters the layers into the embedding, where later slices do not meet it."""
    if hasattr(stage.base, "embedding_multiplier"):
        if stage.is_first:
            stage.embedding.scale *= stage.base.embedding_multiplier
        stage.base.embedding_multiplier = 1.0


def is_tied(stage: StageModel) -> bool:
    """Whether the model's head is its embedding."""
    return bool(getattr(stage.config.get_text_config(), "tie_word_embeddings", False))


def _materialize(stage: StageModel, device: torch.device, dtype: torch.dtype, trainable: bool) -> None:
    """Give parameters memory, rebuild the buffers that no file holds (rotary frequencies), tie the head."""
    for module in stage.causal_lm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = nn.Parameter(
                torch.empty_like(parameter, device=device, dtype=dtype), requires_grad=trainable
            )
            new.tp_partial_grad = getattr(parameter, "tp_partial_grad", False)
            module._parameters[name] = new
        computed = module._non_persistent_buffers_set & module._buffers.keys()
        if module._buffers.keys() - computed:
            raise UnsupportedModel(
                f"{type(module).__name__} keeps buffers in its checkpoint: {sorted(module._buffers)}"
            )
        if computed:
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            stage.causal_lm._init_weights(module)
    if is_tied(stage) and stage.is_first and stage.is_last:
        stage.head.weight = stage.embedding.weight
