"""Forward passes through the pipeline: the unmodified models' hidden states, each micro-batch once, nothing left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.data import MicroBatch
from distill.forward import run_forward
from distill.step import messages
from parallel.mesh import Mesh
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from tests.equivalence.trajectory import SEQ_LEN, SINGLE, Case, batch_of, load_stages, mesh_of, save_models
from tests.workers import run_distributed

# Three micro-batches are more than two ranks and no multiple of them.
COUNT, SIZE = 3, 2
CASES = [
    SINGLE,
    replace(SINGLE, slices=7),
    replace(SINGLE, pp=2),
    replace(SINGLE, pp=2, slices=2, student="untied"),
    replace(SINGLE, pp=2, slices=3, student="deep", virtual_stages=2),
    replace(SINGLE, tp=2, slices=3),
]
GIVEN = ({"students", "teacher"}, {"students"}, {"teacher"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _microbatches(count: int = COUNT) -> list[MicroBatch]:
    whole = batch_of(0)
    columns = (whole.input_ids_BS, whole.position_ids_BS, whole.labels_BS)
    parts = zip(*(column.split(SIZE) for column in columns), strict=True)
    return [MicroBatch(*part) for part in parts][:count]


@mock.patch("distill.forward._LIST", 1)
def _run(cases: list[Case], folders: dict[str, str]) -> list[list[tuple]]:
    """For each case and choice of models: the hidden states consumed, in order, and the calls of `before`."""
    results = []
    for case in cases:
        mesh = mesh_of(case)
        students, teacher = load_stages(case, folders, mesh, torch.float64)
        traffic = messages(students[0], teacher, rows=SIZE, seq_len=SEQ_LEN)
        links = Links(mesh, traffic, num_stages=case.pp * case.virtual_stages)
        mine = []
        for names in GIVEN:
            models = {"students": students, "teacher": teacher}
            batches = _microbatches()
            consumed: list[tuple[int, dict[str, Tensor]]] = []
            announced: list[int] = []

            def consume(
                batch: MicroBatch,
                hidden: dict[Kind, Tensor],
                consumed: list = consumed,
                batches: list = batches,
            ) -> None:
                index = next(i for i, each in enumerate(batches) if each is batch)
                assert not any(each.requires_grad for each in hidden.values())
                consumed.append((index, {str(kind): each.clone() for kind, each in hidden.items()}))

            def before(batch: MicroBatch, announced: list = announced, batches: list = batches) -> None:
                announced.append(next(i for i, each in enumerate(batches) if each is batch))

            given = {name: models[name] for name in names}
            most: list[int] = []
            with mock.patch.object(Links, "finish", _counting(Links.finish, most)):
                run_forward(mesh, links, batches, before=before, consume=consume, **given)
            assert max(most) <= 2 * case.virtual_stages * len(names), "what was sent is not kept to the end"
            assert links.is_empty and not links.num_under_way
            mine.append((mesh.pp.is_last, consumed, announced))
        for student in students:
            assert all(parameter.grad is None for parameter in student.parameters())
            assert student.training and not teacher.training
        results.append(mine)
    return results


def _counting(finish: Callable[[Links], None], most: list[int]) -> Callable[[Links], None]:
    """Return `finish` that writes down how much was under way."""

    def counted(links: Links) -> None:
        most.append(links.num_under_way)
        finish(links)

    return counted


def _plain(folder: str) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return [
            model.model(
                input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
            ).last_hidden_state
            for batch in _microbatches()
        ]


def test_hidden_states_arrive_once_and_whole(folders: dict[str, str]) -> None:
    expected = {name: _plain(folders[name]) for name in ("teacher", "tied", "untied", "deep")}
    alone = _run(CASES[:2], folders)
    for rank in run_distributed(2, _run, CASES[2:], folders):
        for case, mine in zip(CASES, alone + rank, strict=True):
            for names, (is_last, consumed, announced) in zip(GIVEN, mine, strict=True):
                place = (case, names)
                assert [index for index, _ in consumed] == (list(range(COUNT)) if is_last else []), place
                calls = case.virtual_stages * ("students" in names) + case.slices * ("teacher" in names)
                assert sorted(announced) == sorted(list(range(COUNT)) * calls), place
                for index, hidden in consumed:
                    kinds = {"F": case.student, "K": "teacher"}
                    asked = {"students": "F", "teacher": "K"}
                    assert hidden.keys() == {asked[name] for name in names}
                    for kind, value in hidden.items():
                        torch.testing.assert_close(
                            value, expected[kinds[kind]][index], rtol=1e-10, atol=1e-10
                        )


def _bit_for_bit(folders: dict[str, str]) -> list[Tensor]:
    case = replace(SINGLE, pp=2, slices=2)
    return [hidden["K"] for _, hidden in _run([case], folders)[0][2][1]]


def test_stages_and_slices_do_not_change_a_bit(folders: dict[str, str]) -> None:
    whole = [hidden["K"] for _, hidden in _run([SINGLE], folders)[0][2][1]]
    first, last = run_distributed(2, _bit_for_bit, folders)
    assert first == [] and len(whole) == COUNT
    assert all(torch.equal(x, y) for x, y in zip(whole, last, strict=True))


def test_a_forward_without_models_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        run_forward(Mesh.single(), Links(Mesh.single(), {}), _microbatches())


def test_no_collector_is_needed(folders: dict[str, str]) -> None:
    mesh = Mesh.single()
    students, teacher = load_stages(SINGLE, folders, mesh, torch.float64)
    run_forward(mesh, Links(mesh, {}), _microbatches(1), students=students, teacher=teacher)
