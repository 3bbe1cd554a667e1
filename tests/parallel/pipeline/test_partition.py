from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest

from parallel.pipeline.partition import Layers, partition, rank_seconds


def compositions(total: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `total` as `parts` numbers of at least `least`."""
    if parts == 1:
        yield from [(total,)] if total >= least else []
        return
    for first in range(least, total - least * (parts - 1) + 1):
        for rest in compositions(total - first, parts - 1, least):
            yield (first, *rest)


def step_s(student: Layers, teacher: Layers | None, counts: tuple, num_ranks: int, m: int | None) -> float:
    both = rank_seconds(student, teacher, *counts, num_ranks=num_ranks)
    alone = rank_seconds(student, None, counts[0], (), num_ranks=num_ranks)
    return max(both) if m is None else max(m * max(both), sum(alone) + (m - 1) * max(alone))


@pytest.mark.parametrize("seed", range(150))
def test_no_split_at_all_is_better(seed: int) -> None:
    rng = random.Random(seed)
    p, m, least = rng.randint(1, 4), rng.choice((None, 1, 2, 16)), rng.choice((0, 1))
    alike = rng.random() < 0.4

    def layers(most: int) -> Layers:
        seconds = [1.0 if alike else rng.uniform(0.2, 2) for _ in range(rng.randint(p, most))]
        return Layers(seconds, rng.choice((0.0, 0.3)), rng.choice((0.0, 2.0)))

    student, teacher = layers(6), layers(7) if rng.random() < 0.9 else None
    found = partition(student, teacher, num_ranks=p, num_microbatches=m, min_teacher_layers=least)
    of_student = list(compositions(len(student.layer_s), p, 1))
    of_teacher = list(compositions(len(teacher.layer_s), p, least)) if teacher else [()]
    times = {counts: step_s(student, teacher, counts, p, m) for counts in product(of_student, of_teacher)}
    best = min(times.values())
    assert times[found.student, found.teacher] == pytest.approx(best, rel=1e-8)
    slowest = {counts: max(rank_seconds(student, None, counts[0], (), num_ranks=p)) for counts in times}
    least_slowest = min(slowest[counts] for counts, each in times.items() if each <= best * (1 + 1e-9))
    assert slowest[found.student, found.teacher] == pytest.approx(least_slowest, rel=1e-8)
    assert found.rank_s == rank_seconds(student, teacher, found.student, found.teacher, num_ranks=p)


def test_the_teacher_makes_room_for_the_heads() -> None:
    found = partition(
        Layers([3.0] * 16, last_s=2.0), Layers([1.0] * 40, last_s=4.0), num_ranks=4, num_microbatches=16
    )
    assert found.student == (4, 4, 4, 4)
    assert found.teacher[3] < min(found.teacher[:3])
    assert max(found.rank_s) - min(found.rank_s) <= 1.0


def test_like_layers_are_spread_evenly() -> None:
    assert partition(Layers([1.0] * 8), Layers([1.0] * 12), num_ranks=4).student == (2, 2, 2, 2)
    assert partition(Layers([1.0] * 8), Layers([1.0] * 12), num_ranks=4).teacher == (3, 3, 3, 3)
    assert partition(Layers([1.0] * 7), None, num_ranks=7).student == (1,) * 7


def test_virtual_stages_are_split_first_and_balanced_by_the_teacher() -> None:
    found = partition(Layers([1.0] * 12, last_s=2.0), Layers([1.0] * 9), num_ranks=2, virtual_stages=2)
    assert len(found.student) == 4
    assert sum(found.student) == 12
    assert max(found.rank_s) <= 12


def test_a_long_model_is_split_at_once() -> None:
    found = partition(
        Layers([3.0] * 32, 0.2, 4.0), Layers([2.0] * 80, 0.1, 3.0), num_ranks=8, num_microbatches=64
    )
    assert max(found.rank_s) < 1.04 * sum(found.rank_s) / 8


def test_a_given_list_is_measured() -> None:
    student, teacher = Layers([1.0, 2.0, 3.0], 0.5, 0.25), Layers([1.0, 1.0])
    assert rank_seconds(student, teacher, (1, 2), (2, 0), num_ranks=2) == (3.5, 5.25)
    assert rank_seconds(student, None, (1, 1, 1, 0), (), num_ranks=2) == (1.5 + 3.0, 2.0 + 0.25)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers of the student do not fill 4 ranks"):
        partition(Layers([1.0] * 3), None, num_ranks=4)
    with pytest.raises(ValueError, match="3 layers of the teacher"):
        partition(Layers([1.0] * 4), Layers([1.0] * 3), num_ranks=4)
    with pytest.raises(ValueError, match="do not add up"):
        rank_seconds(Layers([1.0] * 3), None, (1, 1), (), num_ranks=2)
    with pytest.raises(ValueError, match="3 entries for num_ranks=2"):
        rank_seconds(Layers([1.0] * 3), None, (1, 1, 1), (), num_ranks=2)
