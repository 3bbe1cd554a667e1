"""How much each unit of a model matters: scores of feed-forward channels, query groups, residual channels and layers.

Decides the methods. `l1` (the seed's) and `l2` look at the weights alone. `activation`, the default, multiplies how
strongly a channel is driven by a calibration text with how much its outgoing weights carry on: without any training,
cutting 20 % of SmolLM2's feed-forward channels by it leaves perplexity 18, by `l1` tens of millions. `random` is the
control that the others must beat.

    ffn channel c     ||a_c|| * ||down[:, c]||            a_c: its activation over the valid tokens
    query group g     sqrt(sum over the group's channels c of (||a_c|| * ||o[:, c]||)^2)
    residual channel  sqrt(sum over layers of ||x_d||^2)  x: what the attention and feed-forward blocks read
    layer             1 - mean cosine(its input, its output)   `block_influence`

Runs where the teacher runs: every rank measures its own layers and its own shards (`Measured`), and `gather_scores`
makes the scores global, the same on every rank. On one process with plain modules the same code works. A further method
is one function that fills a `Measured`, and one that turns it into `Scores`. Sums are float64, scores float32. Does not
decide what is cut (`distill.prune`), and does not run the model (`distill.scoring`).

Legend: B sequences, S positions, D residual width, M feed-forward width, G key/value heads, K a channel count.
Source: Muralidharan et al. 2024 (Minitron); Men et al. 2024 (ShortGPT, block influence); Sun et al. 2023 (Wanda).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.recording import Recorder
from distill.scores import Measured, Piece, Scores, unite
from distill.structure import MATRICES, Parts, Sizes, Unit
from parallel.mesh import Mesh

WEIGHT_POWERS = {"l1": 1, "l2": 2}
"""Methods that look at the weights alone, by the power in which they are summed."""


def _reads(quantity: str) -> Parts:
    """Return what the input of a linear module runs over; empty for quantities that are not a module's input."""
    return MATRICES[quantity][1] if quantity in MATRICES else ()


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Parts, Parts]]]:
    """Yield the known linear modules of a decoder layer, with what their [out, in] run over."""
    for name, module in layer.named_modules():
        if name in MATRICES:
            yield name, module, MATRICES[name]


def _inputs_to_record(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear modules whose input is measured: o and down, one of q, k, v, and one of gate, up."""
    read_blocks: set[str] = set()
    for name, module, (_, reads) in _linears(layer):
        block = name.split(".")[0]
        if reads != (Unit.HIDDEN,):
            yield name, module
        elif block not in read_blocks:
            read_blocks.add(block)
            yield name, module


def _sums_along(module: nn.Module, dim: int, *, power: int) -> Piece:
    """Return sum |w|^power over all dims of a (possibly sharded) weight but `dim`, by index along `dim`."""
    weight = module.weight.detach()
    norms = torch.linalg.vector_norm(weight, ord=power, dim=1 - dim, dtype=torch.float64)
    shard = getattr(module, "shards", {}).get("weight")
    # A linear that the family's plan leaves whole has a shard too, with everything in it.
    is_cut = shard is not None and shard.stop - shard.start < shard.full
    return Piece(
        values=norms.pow(power).cpu(),
        start=shard.start if is_cut and shard.dim == dim else 0,
        whole=shard.full if is_cut and shard.dim == dim else weight.shape[dim],
        add_over_tp=is_cut and shard.dim != dim,
    )


def weight_scores(layers: Mapping[int, nn.Module], sizes: Sizes, method: str = "l1") -> Measured:
    """Sum |w|^n over the weights of each unit of the layers given; the score is the n-th root, n = 1 (`l1`) or 2 (`l2`).

    Rows of q, k, v, gate and up and columns of o and down count for their query group or feed-forward channel; the
    other dim of the same matrices counts for the residual channels. Biases, norms, embeddings and the head are left out.

    Args:
        layers: layer index -> decoder layer that this rank owns, its linears plain or tensor-parallel.
        sizes: global sizes of the model.
        method: a key of `WEIGHT_POWERS`.
    """
    measured = Measured(method, sizes)
    for index, layer in layers.items():
        for name, module, _ in _linears(layer):
            for dim in (0, 1):
                measured.pieces[index, f"{name}.{dim}"] = _sums_along(
                    module, dim, power=WEIGHT_POWERS[method]
                )
    return measured


class ActivationRecorder(Recorder):
    """Measure activations of decoder layers while it is entered as a context (method `activation`).

    Tell it which positions count before each micro-batch, then run the layers forward:

        with ActivationRecorder(layers, sizes) as recorder:
            recorder.look_at(batch)
            model(...)
        scores = gather_scores(recorder.measured, mesh)

    Args:
        layers: layer index -> decoder layer that this rank owns, its linears plain or tensor-parallel.
        sizes: global sizes of the model.
        channels: measure feed-forward channels, query groups and residual channels.
        influence: measure the layers (`block_influence`).
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        sizes: Sizes,
        *,
        channels: bool = True,
        influence: bool = True,
    ) -> None:
        super().__init__()
        self.layers, self.sizes, self._channels, self._influence = layers, sizes, channels, influence
        self.measured = Measured("activation", sizes)
        self._sums: dict[tuple[int, str], Tensor] = {}

    def __enter__(self) -> Self:
        for index, layer in self.layers.items():
            if self._influence:
                self._hooks.append(
                    layer.register_forward_hook(partial(self._on_layer, index), with_kwargs=True)
                )
                self._sums[index, "cosine"] = torch.zeros(2, dtype=torch.float64)
            for name, module in _inputs_to_record(layer) if self._channels else ():
                whole_input = not getattr(module, "input_is_parallel", True)
                width = module.in_features if whole_input else module.weight.shape[1]
                # A replica without calibration rows still takes part in the sums.
                self._sums[index, name] = module.weight.new_zeros(width, dtype=torch.float64)
                self._hooks.append(module.register_forward_pre_hook(partial(self._on_input, index, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            self._finish()

    @torch.no_grad()
    def _on_input(self, index: int, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x_TK = self._rows(args[0])
        self._sums[index, name] += x_TK.double().square().sum(dim=0)

    @torch.no_grad()
    def _on_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine_T = F.cosine_similarity(self._rows(before), self._rows(after), dim=-1)
        total = cosine_T.sum(dtype=torch.float64)
        self._sums[index, "cosine"] += torch.stack([total, torch.full_like(total, len(cosine_T))]).cpu()

    def _finish(self) -> None:
        for (index, quantity), values in self._sums.items():
            start, whole = 0, len(values)
            if quantity != "cosine":
                module = self.layers[index].get_submodule(quantity)
                if _reads(quantity) != (Unit.HIDDEN,):
                    columns = _sums_along(module, 1, power=2)
                    self.measured.pieces[index, f"{quantity}.columns"] = columns
                    if getattr(module, "input_is_parallel", False):
                        start, whole = columns.start, columns.whole
            self.measured.pieces[index, quantity] = Piece(values.cpu(), start, whole, add_over_dp=True)


def gather_scores(measured: Measured, mesh: Mesh) -> Scores:
    """Turn what every rank measured into scores of the whole model, the same on every rank.

    Args:
        measured: of this rank; all ranks measured by the same method.
        mesh: shards are joined over tp, tokens added over dp, layers united over pp.
    Returns:
        Scores of all layers that the ranks of the mesh own; empty for units that were not measured.
    Raises:
        ValueError: no token counted, or a score is not finite (the message names the layer).
    Collectives: gather of objects over tp, then dp, then pp.
    """
    by_layer = unite(measured, mesh)
    score = _activation_scores if measured.method == "activation" else _weight_scores
    scores = score(by_layer, measured)
    scores.check()
    return scores


def random_scores(sizes: Sizes, seed: int) -> Scores:
    """Draw every score uniformly from 0 to 1; equal for equal sizes and seed, on any rank of any layout."""
    # A generator of its own: whatever a model or the data has drawn before changes nothing.
    random = np.random.Generator(np.random.Philox(seed))

    def draw(size: int) -> Tensor:
        return torch.from_numpy(random.random(size))

    # Layers first, so that dropping them at random does not depend on what else is drawn.
    layers = dict(enumerate(draw(sizes.layers).tolist()))
    hidden = draw(sizes.hidden)
    ffn = {layer: draw(sizes.at(layer).ffn) for layer in layers}
    groups = {layer: draw(sizes.at(layer).groups) for layer in layers}
    return _rounded("random", ffn, groups, hidden, layers)


def _weight_scores(by_layer: dict[int, dict[str, Tensor]], measured: Measured) -> Scores:
    sizes, root = measured.sizes, 1 / WEIGHT_POWERS[measured.method]
    ffn: dict[int, Tensor] = {}
    groups: dict[int, Tensor] = {}
    hidden = torch.zeros(sizes.hidden, dtype=torch.float64)
    layers: dict[int, float] = {}
    for layer, quantities in by_layer.items():
        own = sizes.at(layer)
        ffn[layer] = torch.zeros(own.ffn, dtype=torch.float64)
        groups[layer] = torch.zeros(own.groups, dtype=torch.float64)
        for quantity, values in quantities.items():
            module, _, dim = quantity.rpartition(".")
            parts = MATRICES[module][int(dim)]
            for unit, part in zip(parts, values.split([own.width(unit) for unit in parts]), strict=True):
                if unit is Unit.FFN:
                    ffn[layer] += part
                elif unit is Unit.HIDDEN:
                    hidden += part
                else:
                    groups[layer] += part.view(own.groups, -1).sum(dim=1)
        layers[layer] = float(ffn[layer].sum() + groups[layer].sum()) ** root
    rooted = [{layer: sums.pow(root) for layer, sums in each.items()} for each in (ffn, groups)]
    return _rounded(measured.method, *rooted, hidden.pow(root), layers)


def _activation_scores(by_layer: dict[int, dict[str, Tensor]], measured: Measured) -> Scores:
    sizes = measured.sizes
    ffn: dict[int, Tensor] = {}
    groups: dict[int, Tensor] = {}
    hidden = torch.zeros(sizes.hidden, dtype=torch.float64)
    layers: dict[int, float] = {}
    for layer, quantities in by_layer.items():
        for quantity, squares in quantities.items():
            reads = _reads(quantity)
            if reads == (Unit.FFN,):
                ffn[layer] = (squares * quantities[f"{quantity}.columns"]).sqrt()
            elif reads == (Unit.QUERY,):
                energies = squares * quantities[f"{quantity}.columns"]
                groups[layer] = energies.view(sizes.at(layer).groups, -1).sum(dim=1).sqrt()
            elif reads == (Unit.HIDDEN,):
                hidden += squares
        if "cosine" in quantities:
            total, count = quantities["cosine"].tolist()
            if count == 0:
                raise ValueError("importance: no position of the calibration text counted")
            layers[layer] = 1 - total / count
    return _rounded("activation", ffn, groups, hidden.sqrt(), layers)


def _rounded(
    method: str, ffn: dict[int, Tensor], groups: dict[int, Tensor], hidden: Tensor, layers: dict[int, float]
) -> Scores:
    return Scores(
        method,
        {layer: score.float() for layer, score in ffn.items()},
        {layer: score.float() for layer, score in groups.items()},
        hidden.float(),
        layers,
        depth_method="block_influence" if method == "activation" else method,
    )
