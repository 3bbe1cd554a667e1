"""Quality against plain formulas in float64 on one process, whatever the layout."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.data import IGNORE, MicroBatch
from distill.evaluate import EntropyBucket, Quality, evaluate, num_parameters
from distill.losses import ENTROPY_BOUNDS
from distill.step import messages
from parallel.mesh import Mesh
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from tests.equivalence.trajectory import ROWS, SEQ_LEN, SINGLE, Case, load_stages, mesh_of, save_models
from tests.workers import run_distributed

CASES = [
    replace(SINGLE, student="tied"),
    replace(SINGLE, pp=2, student="untied", slices=2),
    replace(SINGLE, pp=2, student="tied"),
    replace(SINGLE, pp=2, student="deep", virtual_stages=2),
    replace(SINGLE, tp=2, student="untied"),
    replace(SINGLE, tp=2, student="tied", slices=3),
    replace(SINGLE, dp=2, student="untied"),
]
PAIRS = ("both", "student", "teacher")
ASKED = {"both": ("students", "teacher"), "student": ("students",), "teacher": ("teacher",)}


def _rows() -> MicroBatch:
    """Return eight rows; the second half has few labels, one row has none."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (ROWS, SEQ_LEN), generator=generator)
    positions = torch.arange(SEQ_LEN).repeat(ROWS, 1)
    positions[::2, 5:] -= 5
    labels = torch.randint(0, 97, (ROWS, SEQ_LEN), generator=generator)
    labels[:, -1] = IGNORE
    labels[4:, ::2] = IGNORE
    labels[6] = IGNORE
    return MicroBatch(ids, positions, labels)


def _share(mesh: Mesh, labels: Tensor | None = None) -> list[MicroBatch]:
    """Return this replica's micro-batches of two rows: the first half of the rows is the first replica's."""
    whole = _rows()
    columns = (whole.input_ids_BS, whole.position_ids_BS, whole.labels_BS if labels is None else labels)
    mine = [column.chunk(mesh.dp.size)[mesh.dp.rank].split(2) for column in columns]
    return [MicroBatch(*parts) for parts in zip(*mine, strict=True)]


def _plain(folders: dict[str, str], student: str, pair: str) -> Quality:
    batch = _rows()
    valid = batch.labels_BS.flatten() != IGNORE
    labels = batch.labels_BS.flatten()[valid]

    def log_q(name: str) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
            ).logits
        return logits.flatten(0, 1)[valid].log_softmax(-1)

    judged, teacher = log_q("teacher" if pair == "teacher" else student), log_q("teacher")
    compared = pair == "both"
    nll = -judged[range(len(labels)), labels]
    kl = (teacher.exp() * (teacher - judged)).sum(-1)
    agrees = (judged.argmax(-1) == teacher.argmax(-1)).double()
    entropy = -(teacher.exp() * teacher).sum(-1)
    buckets = [
        EntropyBucket(
            low,
            high,
            nll[inside].mean().item(),
            kl[inside].mean().item(),
            agrees[inside].mean().item(),
            int(inside.sum()),
        )
        for low, high in itertools.pairwise((0.0, *ENTROPY_BOUNDS, math.inf))
        if (inside := (low <= entropy) & (entropy < high)).any() and compared
    ]
    return Quality(
        loss=nll.mean().item(),
        accuracy=(judged.argmax(-1) == labels).double().mean().item(),
        kl=kl.mean().item() if compared else 0.0,
        agreement=agrees.mean().item() if compared else 1.0,
        num_tokens=len(labels),
        by_entropy=tuple(buckets),
    )


def _judge(cases: list[Case], folders: dict[str, str]) -> list[tuple[list[Quality], tuple[int, int], str]]:
    """Return each case's qualities, the parameters of both models, and what a text without tokens says."""
    results = []
    for case in cases:
        mesh = mesh_of(case)
        students, teacher = load_stages(case, folders, mesh, torch.float64)
        traffic = messages(students[0], teacher, rows=2, seq_len=SEQ_LEN)
        forward = {kind: traffic[kind] for kind in (Kind.F, Kind.K)}
        links = Links(mesh, forward, num_stages=case.pp * case.virtual_stages)
        given = {"students": students, "teacher": teacher}
        qualities = [
            evaluate(mesh, links, _share(mesh), **{name: given[name] for name in ASKED[pair]})
            for pair in PAIRS
        ]
        nothing = _share(mesh, torch.full((ROWS, SEQ_LEN), IGNORE))
        with pytest.raises(ValueError, match="no token") as caught:
            evaluate(mesh, links, nothing, **given)
        assert links.is_empty
        sizes = (num_parameters(students, mesh), num_parameters([teacher], mesh))
        results.append((qualities, sizes, str(caught.value)))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def test_quality_equals_the_plain_formulas(folders: dict[str, str]) -> None:
    counts = [int((half != IGNORE).sum()) for half in _rows().labels_BS.chunk(2)]
    assert counts[0] > 2 * counts[1] > 0, "a mean of the replicas' means must not pass"
    expected = {(s, pair): _plain(folders, s, pair) for s in ("tied", "untied", "deep") for pair in PAIRS}
    sizes = {
        name: AutoModelForCausalLM.from_pretrained(folders[name]).num_parameters()
        for name in ("teacher", "tied", "untied", "deep")
    }
    single = _judge(CASES[:1], folders)
    ranks = run_distributed(2, _judge, CASES[1:], folders)
    for rank in ranks:
        for case, (qualities, counted, message) in zip(CASES, single + rank, strict=True):
            assert counted == (sizes[case.student], sizes["teacher"]), case
            assert message == "the text has no token to judge"
            for pair, quality in zip(PAIRS, qualities, strict=True):
                right = expected[case.student, pair]
                assert bool(right.by_entropy) == (pair == "both")
                assert quality.named() == pytest.approx(right.named(), rel=1e-9), case
                assert quality.num_tokens == right.num_tokens
    assert ranks[0] == ranks[1], "every rank reports the same"


def test_a_model_judged_against_itself_agrees(folders: dict[str, str]) -> None:
    mesh = Mesh.single()
    _, teacher = load_stages(SINGLE, folders, mesh, torch.float64)
    links = Links(mesh, {})
    itself = evaluate(mesh, links, _share(mesh), students=[teacher], teacher=teacher)
    assert (itself.kl, itself.agreement) == (0.0, 1.0)
    alone = evaluate(mesh, links, _share(mesh), teacher=teacher)
    assert replace(itself, by_entropy=()) == alone and itself.by_entropy and not alone.by_entropy


def test_perplexity_and_names() -> None:
    quality = Quality(loss=2.0, accuracy=0.25, kl=0.5, agreement=0.75, num_tokens=10)
    assert quality.perplexity == pytest.approx(math.exp(2.0))
    assert quality.named() == {
        "eval/loss": 2.0,
        "eval/perplexity": quality.perplexity,
        "eval/kl": 0.5,
        "eval/agreement": 0.75,
        "eval/accuracy": 0.25,
    }
    parts = (EntropyBucket(0.0, 0.5, 1.0, 0.1, 0.9, 7), EntropyBucket(5.0, math.inf, 4.0, 0.8, 0.2, 3))
    assert replace(quality, by_entropy=parts).named() == quality.named() | {
        "eval/entropy_0_0.5/loss": 1.0,
        "eval/entropy_0_0.5/kl": 0.1,
        "eval/entropy_0_0.5/agreement": 0.9,
        "eval/entropy_0_0.5/tokens": 7,
        "eval/entropy_5_inf/loss": 4.0,
        "eval/entropy_5_inf/kl": 0.8,
        "eval/entropy_5_inf/agreement": 0.2,
        "eval/entropy_5_inf/tokens": 3,
    }
    assert replace(quality, by_entropy=parts).whole() == quality.named()
    assert math.isfinite(replace(quality, loss=5000.0).perplexity)
