"""The mesh: who stands where on every axis, on four processes, from two threads at once, and what is refused."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import all_reduce_, gather_objects
from parallel.mesh import Axis, Mesh, coordinates_of, pipelines_of
from tests.workers import run_distributed

AXES = ("pp", "dp", "tp", "model", "world", "background")
GRADIENTS = ("dp", "tp", "tie", "model")
# Written out by hand: the sets of ranks along each axis.
EXPECTED = {
    (4, 1, 1): {
        "pp": [(0, 1, 2, 3)],
        "model": [(0, 1, 2, 3)],
        "tie": [(0, 3)],
    },
    (1, 4, 1): {"dp": [(0, 1, 2, 3)]},
    (1, 1, 4): {"tp": [(0, 1, 2, 3)], "model": [(0, 1, 2, 3)]},
    (2, 2, 1): {
        "pp": [(0, 2), (1, 3)],
        "dp": [(0, 1), (2, 3)],
        "model": [(0, 2), (1, 3)],
        "tie": [(0, 2), (1, 3)],
    },
    (2, 1, 2): {
        "pp": [(0, 2), (1, 3)],
        "tp": [(0, 1), (2, 3)],
        "model": [(0, 1, 2, 3)],
        "tie": [(0, 2), (1, 3)],
    },
    (1, 2, 2): {
        "dp": [(0, 2), (1, 3)],
        "tp": [(0, 1), (2, 3)],
        "model": [(0, 1), (2, 3)],
    },
}


def test_ranks_run_through_tp_first_and_pp_last() -> None:
    for pp, dp, tp in itertools.product((1, 2, 3), repeat=3):
        places = [coordinates_of(rank, dp=dp, tp=tp) for rank in range(pp * dp * tp)]
        assert places == list(itertools.product(range(pp), range(dp), range(tp)))
        pipelines = pipelines_of(pp=pp, dp=dp, tp=tp)
        assert sorted(rank for ranks in pipelines for rank in ranks) == list(range(pp * dp * tp))
        for ranks in pipelines:
            assert [places[rank].pp for rank in ranks] == list(range(pp))
            assert len({places[rank][1:] for rank in ranks}) == 1


def _axes(mesh: Mesh) -> dict[str, Axis]:
    axes = {name: getattr(mesh, name) for name in AXES}
    return axes | {f"gradients {name}": getattr(mesh.gradients, name) for name in GRADIENTS}


def _axes_of(shapes: list[tuple[int, int, int]]) -> list[dict]:
    """Return what this rank sees of each mesh, and what its groups really join."""
    rank, results = dist.get_rank(), []
    for pp, dp, tp in shapes:
        mesh = Mesh.create(pp=pp, dp=dp, tp=tp)
        seen: dict = {"describe": mesh.describe(), "pipelines": mesh.pipelines, "device": str(mesh.device)}
        groups: defaultdict[str, set[str]] = defaultdict(set)
        for name, axis in _axes(mesh).items():
            total = torch.tensor([2**rank])
            all_reduce_(total, axis)
            seen[name] = (axis.name, axis.size, axis.rank, axis.ranks, axis.group is None)
            seen[f"{name} joins"] = (int(total), gather_objects(rank, axis))
            seen[f"{name} ends"] = (axis.is_first, axis.is_last)
            if axis.group is not None:
                user = name.split()[0]
                groups[user if user in ("gradients", "background") else "compute"].add(axis.group.group_name)
        seen["shared"] = [one & other for one, other in itertools.combinations(groups.values(), 2)]
        results.append(seen)
    return results


def test_axes_on_four_processes() -> None:
    shapes = list(EXPECTED)
    ranks = run_distributed(4, _axes_of, shapes, timeout_s=60)
    for index, shape in enumerate(shapes):
        for rank, results in enumerate(ranks):
            seen, place = results[index], coordinates_of(rank, dp=shape[1], tp=shape[2])
            assert seen["describe"] == f"rank {rank} (pp {place.pp}, dp {place.dp}, tp {place.tp})"
            assert seen["pipelines"] == pipelines_of(pp=shape[0], dp=shape[1], tp=shape[2])
            assert seen["device"] == "cpu"
            assert not any(seen["shared"]), "what different threads use may not share a group"
            for name in (*AXES, *(f"gradients {name}" for name in GRADIENTS)):
                short = name.removeprefix("gradients ")
                sets = [(0, 1, 2, 3)] if name in ("world", "background") else EXPECTED[shape].get(short, [])
                members = next((each for each in sets if rank in each), (rank,))
                here = members.index(rank)
                assert seen[name] == (short, len(members), here, members, len(members) == 1), (shape, rank)
                assert seen[f"{name} joins"] == (sum(2**each for each in members), list(members))
                assert seen[f"{name} ends"] == (here == 0, here == len(members) - 1)


def _sums(axes: Sequence[Axis], seed: int) -> list[int]:
    """All-reduce over the axes in turn, each rank at its own pace; return the sums."""
    pace, sums = random.Random(seed), []
    for number in range(60):
        time.sleep(pace.choice((0.0, 0.0, 0.002)))
        value = torch.full((256,), (number + 1) * 10 ** dist.get_rank())
        all_reduce_(value, axes[number % len(axes)])
        sums.append(int(value[0]) if bool((value == value[0]).all()) else -1)
    return sums


def _two_threads() -> list[tuple[list[int], list[int]]]:
    """Reduce over axes of the same ranks from two threads at once; return what came and what had to."""
    mesh, beside, results = Mesh.create(pp=1, dp=2, tp=2), [], []
    here = (mesh.dp, mesh.tp, mesh.model)
    there = (mesh.gradients.model, mesh.gradients.dp, mesh.gradients.tp)
    thread = threading.Thread(target=lambda: beside.extend(_sums(there, dist.get_rank())))
    thread.start()
    main = _sums(here, 10 + dist.get_rank())
    thread.join()
    for axes, sums in ((here, main), (there, beside)):
        due = [sum(10**rank for rank in axes[n % 3].ranks) * (n + 1) for n in range(60)]
        results.append((sums, due))
    return results


def test_gradients_reduce_beside_compute() -> None:
    for results in run_distributed(4, _two_threads, timeout_s=60):
        assert all(sums == due for sums, due in results)


def _mistakes() -> tuple[list[str], str]:
    messages = []
    for shape in ({"pp": 2, "dp": 2, "tp": 1}, {"pp": 1, "dp": 1, "tp": 1}, {"pp": 3, "dp": 1, "tp": 1}):
        with pytest.raises(ValueError, match="ranks, the world has 2") as caught:
            Mesh.create(**shape)
        messages.append(str(caught.value))
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    return messages, mesh.describe()


def test_a_mesh_of_another_size_than_the_world_is_refused() -> None:
    for rank, (messages, place) in enumerate(run_distributed(2, _mistakes)):
        assert messages[0] == "mesh pp=2 x dp=2 x tp=1 is 4 ranks, the world has 2"
        assert messages[2] == "mesh pp=3 x dp=1 x tp=1 is 3 ranks, the world has 2"
        assert place == f"rank {rank} (pp 0, dp 0, tp {rank})"


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    mesh = Mesh.single()
    assert [field.name for field in fields(mesh)] == [*AXES, "gradients", "device", "activity"]
    assert [field.name for field in fields(mesh.gradients)] == list(GRADIENTS)
    axes = list(_axes(mesh).values())
    assert [axis.name for axis in axes] == [*AXES, *GRADIENTS]
    assert all(axis == Axis(axis.name, 1, 0, None, (0,)) for axis in axes)
    assert all(axis.is_first and axis.is_last for axis in axes)
    assert mesh.pipelines == [(0,)]
    assert mesh.describe() == "rank 0 (pp 0, dp 0, tp 0)"
    assert Mesh.single("meta").device == torch.device("meta")
