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
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.ranks import Target
from distill.structure import MATRICES, Unit
from parallel.collectives import all_gather, all_reduce_, shard_range, shard_sizes
from parallel.mesh import Mesh
from parallel.model import StageModel


def _reads(target: Target) -> tuple[int, str]:
    """Return what identifies a linear's input: its layer, and its block if all of the block read the same, else itself."""
    sides = MATRICES.get(target.module)
    shares = sides is not None and sides[1] == (Unit.HIDDEN,)
    return target.layer, target.module.partition(".")[0] if shares else target.module


class SecondMoments:
    """Measure the inputs of linears while it is entered as a context.

        with SecondMoments(stages, targets, mesh) as moments:
            moments.expect(valid_BS)
            model(...)
        moments.whole(target)

    Args:
        stages: this rank's stages of a dense model.
        targets: linears of the whole model; those of other stages are left to them.
        mesh: shards are cut over tp, tokens added over dp.
    """

    def __init__(self, stages: Sequence[StageModel], targets: Iterable[Target], mesh: Mesh) -> None:
        self._mesh = mesh
        self._modules: dict[tuple[int, str], nn.Module] = {}
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._valid_BS: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        layers = {index: layer for stage in stages for index, layer in stage.layers.items()}
        for target in targets:
            if target.layer in layers:
                module = layers[target.layer].get_submodule(target.module)
                self._modules.setdefault(_reads(target), module)

    def expect(self, valid_BS: Tensor) -> None:
        """Set which positions of the coming micro-batch count. Args: valid_BS: bool [B, S]."""
        assert valid_BS.dtype == torch.bool and valid_BS.dim() == 2, (valid_BS.dtype, valid_BS.shape)
        self._valid_BS = valid_BS

    def __enter__(self) -> Self:
        for key, module in self._modules.items():
            start, stop = shard_range(module.in_features, self._mesh.tp.size, self._mesh.tp.rank)
            self._sums[key] = module.weight.new_zeros((stop - start, module.in_features), dtype=torch.float64)
            self._hooks.append(module.register_forward_pre_hook(partial(self._on_input, key)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _on_input(self, key: tuple[int, str], module: nn.Module, args: tuple[Any, ...]) -> None:
        x, valid, tp = args[0].detach(), self._valid_BS, self._mesh.tp
        assert valid is not None, "expect(valid_BS) was not called before the forward"
        assert x.shape[:-1] == valid.shape, (tuple(x.shape), tuple(valid.shape))
        rows_TK = x[valid.to(x.device)].to(torch.promote_types(x.dtype, torch.float32))
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
