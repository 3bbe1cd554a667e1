"""Write a student whose linears W [out, in] are products of two of rank r, chosen so that what they compute changes least.

    minimise ||(W - second @ first) X||_F^2       X [in, T]: what the linear reads on a calibration text, C = X X^T

Decides the solution and where it is computed. With any square root S S^T = C (Cholesky; an eigendecomposition if C is not
positive definite in floating point) and the singular value decomposition W S = A diag(sigma) B^T, the best of rank r is

    second = A_r diag(sigma_r)^(1/2)      first = diag(sigma_r)^(1/2) B_r^T S^-1      lost: sum of the sigma^2 beyond r

so the singular values are split evenly between the factors. C gets a ridge of `RIDGE` times its mean diagonal: directions
that the text never showed keep a little weight of their own, and S can be inverted. Without whitening S = 1.

The ranks of a stage share its matrices out, one matrix at a time on each, and put the factors of the highest rank that can
come out into files; when all singular values are known, rank 0 chooses the ranks (`distill.ranks`) and writes the student's
folder as a stream, cutting the factors. Products and decompositions are float64. The dense student is read from its folder;
its stages only measure. The folder's config names the factored linears (`parallel.factored`).
Source: Wang et al. 2024 (SVD-LLM); Yuan et al. 2023 (ASVD).
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from distill.atomic import build_once
from distill.config import Config
from distill.data import MicroBatch
from distill.forward import run_forward
from distill.loading import is_there
from distill.model_checks import not_finite
from distill.moments import SecondMoments
from distill.prune import KEPT_FOLDER, copy_companions
from distill.ranks import Target, Targets, choose_ranks, find_targets, rank_step
from parallel.collectives import barrier, gather_objects
from parallel.factored import CONFIG_KEY
from parallel.gradients import main_dtype
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.p2p import Links
from parallel.weights import INDEX, WeightFiles

RIDGE = 1e-6
"""Added to a second moment's diagonal, relative to its mean: ten times the rounding of float32 products."""


class Decomposition(NamedTuple):
    """Factors of the full rank k = min(out, in); the first r rows and columns are the best factors of rank r."""

    first: Tensor
    """[k, in], float64."""
    second: Tensor
    """[out, k], float64."""
    singular_values: Tensor
    """Of the whitened matrix, [k], descending, float64."""


def with_ridge(moment: Tensor) -> Tensor:
    """Return C + RIDGE * mean(diag C) * 1 for a second moment C [in, in], float64.

    Raises:
        ValueError: the moment is zero, or not finite.
    """
    scale = moment.diagonal().mean()
    if not (torch.isfinite(moment).all() and scale > 0):
        raise ValueError(f"second moments of the inputs have the mean {scale.item()}")
    ridged = moment.clone()
    ridged.diagonal().add_(RIDGE * scale)
    return ridged


def decompose(weight: Tensor, moment: Tensor | None) -> Decomposition:
    """Decompose a matrix so that its cut to any rank r minimises ||(W - second_r @ first_r) S||_F, S S^T = C + ridge.

    Args:
        weight: W [out, in].
        moment: C [in, in], float64; None takes S = 1.
    Raises:
        ValueError: weight or moment are not finite, or the moment is zero.
    """
    weight = weight.to(torch.float64)
    if not torch.isfinite(weight).all():
        raise ValueError("weights are not finite")
    if moment is None:
        whitened, undo = weight, None
    else:
        ridged = with_ridge(moment)
        root, failed = torch.linalg.cholesky_ex(ridged)
        if failed == 0:
            undo = None
            whitened = weight @ root
        else:
            # Rounding made the smallest eigenvalues negative. They are at least the ridge, as they should be.
            values, vectors = torch.linalg.eigh(ridged)
            scales = values.clamp_min(RIDGE * moment.diagonal().mean()).sqrt()
            whitened, undo = (weight @ vectors) * scales, vectors.T / scales[:, None]
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    if undo is not None:
        right = right @ undo
    elif moment is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    # Each pair's sign is free: fixed here, so that every layout trains the same factors.
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    scales = values.sqrt()
    return Decomposition((signs * scales).T * right, left * signs * scales, values)


def factorise_student(
    config: Config,
    mesh: Mesh,
    *,
    students: Sequence[StageModel],
    student_config: PretrainedConfig,
    source: Path,
    links: Links,
    microbatches: Sequence[MicroBatch],
    target: Path,
) -> float:
    """Write the factored student to `target`; a folder that is there is kept.

    Args:
        config: `student.low_rank` asks for something.
        students: this rank's stages of the dense student, in ascending order.
        student_config: the dense student's.
        source: the dense student's folder.
        links: channels for F.
        microbatches: this replica's calibration text; not used without `whiten`.
        target: the factored student's folder.
    Returns:
        Seconds it took (0 for a folder that was there).
    Raises:
        ConfigError: linears that cannot be factored as asked, weights or activations that are not finite.
    Collectives: a broadcast over the world; a forward pass over the text, all-reduces over dp, all-gathers over tp; two
        barriers and a gather over the world.
    """
    start_s = time.perf_counter()
    if is_there(target, mesh):
        return 0.0
    wanted = config.student.low_rank
    targets = find_targets(wanted, student_config, tp=mesh.tp.size)
    workspace = target.with_name(f".{target.name}.factors")
    if mesh.world.is_first:
        text = f" on {config.student.prune.calibration_rows} rows of text" if wanted.whiten else ""
        print(f"factoring {len(targets.linears)} linears of the student{text} ...", flush=True)
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True)
    barrier(mesh.world)
    moments = None
    if wanted.whiten:
        moments = _measure(mesh, students, targets, links, microbatches)
    mine = [each for each in targets.linears if any(each.layer in stage.layers for stage in students)]
    outcome = _decompose_all(mesh, mine, moments, source, workspace, step=rank_step(mesh.tp.size))
    reports = gather_objects(outcome, mesh.world)
    for report in reports:
        if isinstance(report, str):
            key = "teacher.model" if config.student.model is None else "student.model"
            raise not_finite(config, key, report)
    if mesh.world.is_first:
        values = {name: each for report in reports for name, each in report.items()}
        ranks = choose_ranks(wanted, targets, values, tp=mesh.tp.size)
        write_factored(source, target, student_config, ranks, workspace)
        shutil.rmtree(workspace)
        print(_said(targets, ranks), flush=True)
    barrier(mesh.world)
    return time.perf_counter() - start_s


def _measure(
    mesh: Mesh,
    students: Sequence[StageModel],
    targets: Targets,
    links: Links,
    microbatches: Sequence[MicroBatch],
) -> SecondMoments:
    with SecondMoments(students, targets.linears, mesh) as moments:
        run_forward(
            mesh,
            links,
            microbatches,
            students=students,
            before=moments.look_at,
        )
    moments.add_replicas()
    return moments


def _decompose_all(
    mesh: Mesh,
    linears: Sequence[Target],
    moments: SecondMoments | None,
    source: Path,
    workspace: Path,
    *,
    step: int,
) -> dict[str, Tensor] | str:
    """Decompose a stage's matrices, shared out among its ranks; return the singular values of this rank's.

    Returns:
        By name of the linear; or what is not finite, once all ranks of the stage have gathered their moments.
    Collectives: one all-gather over tp for each matrix, when there are moments.
    """
    size, rank = mesh.dp.size * mesh.tp.size, mesh.dp.rank * mesh.tp.size + mesh.tp.rank
    found: dict[str, Tensor] = {}
    error = ""
    own: tuple[Target, Tensor | None] | None = None
    with WeightFiles(source) as files:
        for number, target in enumerate(linears):
            moment = None if moments is None else moments.whole(target)
            if number % size == rank:
                own = target, moment
            if own is None or (number % size < size - 1 and number < len(linears) - 1):
                continue
            # All ranks have a matrix to work on by now; nobody waits for another one's decomposition.
            try:
                found[own[0].name] = _decompose_one(*own, files, workspace, step=step)
            except ValueError as raised:
                error = f"{own[0].name}: {raised}"
            own = None
    return error or found


def _decompose_one(
    target: Target, moment: Tensor | None, files: WeightFiles, workspace: Path, *, step: int
) -> Tensor:
    """Put the factors of one matrix, at the highest rank that can come out, into a file; return its singular values."""
    weight = files.files[f"{target.name}.weight"].get_tensor(f"{target.name}.weight")
    place = weight.device if moment is None else moment.device
    whole = decompose(weight.to(place), moment)
    most, dtype = target.largest_rank(step), main_dtype(weight.dtype)
    factors = {"first": whole.first[:most], "second": whole.second[:, :most]}
    save_file(
        {which: factor.to("cpu", dtype).contiguous() for which, factor in factors.items()},
        workspace / f"{target.name}.safetensors",
    )
    return whole.singular_values.cpu()


def write_factored(
    source: Path,
    target: Path,
    model_config: PretrainedConfig,
    ranks: Mapping[str, int],
    factors: Path,
    *,
    max_shard_bytes: int = 2 * 2**30,
) -> None:
    """Write a dense student's folder again, with two factors in the place of each matrix that `ranks` names.

    Runs on one process; needs no more memory than a shard and its largest tensor. The folder appears whole or not at all.

    Args:
        source: the dense student: config, plain safetensors, tokenizer.
        target: must not exist.
        model_config: the dense student's.
        ranks: name of a linear -> rank.
        factors: folder with `NAME.safetensors` for each of these: `first` [>= r, in] and `second` [out, >= r].
    """
    factored = copy.deepcopy(model_config)
    setattr(factored, CONFIG_KEY, dict(ranks))

    def write(folder: Path) -> None:
        folder.mkdir()
        with WeightFiles(source) as files:
            _write_shards(folder, _with_factors(files, ranks, factors), max_shard_bytes)
        factored.save_pretrained(folder)
        copy_companions(source, folder)
        if (source / KEPT_FOLDER).is_dir():
            shutil.copytree(source / KEPT_FOLDER, folder / KEPT_FOLDER)

    build_once(target, write)


def _with_factors(
    files: WeightFiles, ranks: Mapping[str, int], factors: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the factored student, by name, in the source's dtypes."""
    for name, file in files.files.items():
        tensor = file.get_tensor(name)
        linear, _, leaf = name.rpartition(".")
        if linear not in ranks:
            yield name, tensor
        elif leaf == "bias":
            yield f"{linear}.second.bias", tensor
        else:
            with safe_open(factors / f"{linear}.safetensors", framework="pt") as pair:
                first = pair.get_slice("first")[: ranks[linear]]
                second = pair.get_slice("second")[:, : ranks[linear]]
            yield f"{linear}.first.weight", first.to(tensor.dtype)
            yield f"{linear}.second.weight", second.to(tensor.dtype).contiguous()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write tensors as they come into files of at most `max_shard_bytes` (at least one tensor), with an index."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    filled_bytes = total_bytes = number = 0

    def close() -> None:
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))

    for name, tensor in tensors:
        if shard and filled_bytes + tensor.nbytes > max_shard_bytes:
            close()
            shard, filled_bytes, number = {}, 0, number + 1
        shard[name] = tensor
        filled_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _said(targets: Targets, ranks: Mapping[str, int]) -> str:
    """Return the line that says what became of the linears."""
    factored = [target for target in targets.linears if target.name in ranks]
    dense = [target.name for target in targets.linears if target.name not in ranks]
    saved = sum(target.dense - ranks[target.name] * target.per_rank for target in factored)
    line = (
        f"factored {len(factored)} of {len(targets.linears)} linears, ranks {min(ranks.values(), default=0)} to "
        f"{max(ranks.values(), default=0)}: {targets.num_parameters - saved:,} of {targets.num_parameters:,} parameters"
    )
    if dense:
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        line += f"; dense, where factors would save nothing: {', '.join(dense[:3])}{more}"
    return line
