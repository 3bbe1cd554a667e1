"""Second moments of what linears read, measured on distributed stages: the weights of an activation-weighted factorisation.

    C = sum over the tokens that count of x x^T        [in, in], x: the input of a linear

Decides where they lie: linears that read one tensor (gate and up; q, k and v) share one moment, every tensor-parallel rank
sums its own block of rows, and only `whole` puts one of them together, so a rank holds in^2 * 8 / tp bytes for each
distinct input of its own layers, and one whole matrix for as long as it is worked on. A row-parallel linear reads a shard
of its input, which is gathered for the product. Products are of the activations' dtype, float32 at least; sums over
micro-batches, replicas and ranks are float64. Does not decide which linears matter (`distill.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from distill.ranks import Target
from distill.recording import Recorder
from distill.structure import MATRICES, Unit
from parallel.collectives import all_gather, all_reduce_, shard_range, shard_sizes
from parallel.mesh import Mesh
from parallel.model import StageModel


def _reads(target: Target) -> tuple[int, str]:
    """Return what identifies a linear's input: its layer, and its block if all of the block read the same, else itself."""
    sides = MATRICES.get(target.module)
    shares = sides is not None and sides[1] == (Unit.HIDDEN,)
    return target.layer, target.module.partition(".")[0] if shares else target.module


class SecondMoments(Recorder):
    """Measure the inputs of linears while it is entered as a context.

        with SecondMoments(stages, targets, mesh) as moments:
            moments.look_at(batch)
            model(...)
        moments.whole(target)

    Args:
        stages: this rank's stages of a dense model.
        targets: linears of the whole model; those of other stages are left to them.
        mesh: shards are cut over tp, tokens added over dp.
    """

    def __init__(self, stages: Sequence[StageModel], targets: Iterable[Target], mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh
        self._modules: dict[tuple[int, str], nn.Module] = {}
        self._sums: dict[tuple[int, str], Tensor] = {}
        layers = {index: layer for stage in stages for index, layer in stage.layers.items()}
        for target in targets:
            if target.layer in layers:
                module = layers[target.layer].get_submodule(target.module)
                self._modules.setdefault(_reads(target), module)

    def __enter__(self) -> Self:
        for key, module in self._modules.items():
            start, stop = shard_range(module.in_features, self._mesh.tp.size, self._mesh.tp.rank)
            self._sums[key] = module.weight.new_zeros((stop - start, module.in_features), dtype=torch.float64)
            self._hooks.append(module.register_forward_pre_hook(partial(self._on_input, key)))
        return self

    @torch.no_grad()
    def _on_input(self, key: tuple[int, str], module: nn.Module, args: tuple[Any, ...]) -> None:
        rows_TK, tp = self._rows(args[0]), self._mesh.tp
        if getattr(module, "input_is_parallel", False):
            rows_TK = all_gather(rows_TK, tp, dim=-1, sizes=shard_sizes(module.in_features, tp.size))
        own = slice(*shard_range(module.in_features, tp.size, tp.rank))
        self._sums[key] += rows_TK[:, own].T @ rows_TK

    def add_replicas(self) -> None:
        """Add what the replicas measured, once, after the last micro-batch. Collectives: one all-reduce over dp each."""
        for moment in self._sums.values():
            all_reduce_(moment, self._mesh.dp)

    def whole(self, target: Target) -> Tensor:
        """Return the moment [in, in] of a linear of this rank's stages, float64. Collectives: one all-gather over tp."""
        own, tp = self._sums[_reads(target)], self._mesh.tp
        return all_gather(own, tp, dim=0, sizes=shard_sizes(own.shape[1], tp.size))
