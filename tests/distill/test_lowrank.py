"""Factors against the best approximation there is, and the factored student's folder, the same in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import Config, ConfigError, MeshShape, Teacher
from distill.data import IGNORE, Rows, spread_microbatches
from distill.lowrank import RIDGE, Decomposition, decompose, factorise_student
from distill.packing import Row
from distill.pretrained import load_config
from distill.step import messages
from distill.student_config import LowRank, Student
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

SEQ_LEN, SIZE, ROWS = 9, 2, 8
STUDENT = tiny_config("llama", num_hidden_layers=2, mlp_bias=True, tie_word_embeddings=True)
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 2, "tp": 1}]
WISHES = {
    "ratio": LowRank(ratio=0.5),
    "energy": LowRank(energy=0.6, modules=("mlp.down_proj", "self_attn.o_proj")),
    "params": LowRank(params=22_000),
    "plain": LowRank(ratio=0.5, whiten=False),
}


def _problem(tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Return W [24, 20] and inputs X [20, tokens] that stretch some directions a hundred times more than others."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    mixing = torch.randn(20, 20, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 20)
    return weight, mixing @ torch.randn(20, tokens, generator=generator, dtype=torch.float64)


def _error(weight: Tensor, x: Tensor, found: Decomposition, rank: int) -> float:
    return float(torch.linalg.norm((weight - found.second[:, :rank] @ found.first[:rank]) @ x))


@pytest.mark.parametrize("rank", [1, 5, 12, 20])
def test_no_matrix_of_the_rank_is_nearer_on_the_text(rank: int) -> None:
    weight, x = _problem()
    white, plain = decompose(weight, x @ x.T), decompose(weight, None)
    # Eckart and Young: the nearest to W X of rank r leaves its further singular values, and W' X can be it.
    best = float(torch.linalg.svdvals(weight @ x)[rank:].square().sum().sqrt())
    ridge = 1e-3 * float(torch.linalg.norm(weight @ x))
    assert best <= _error(weight, x, white, rank) <= best + ridge
    assert float(white.singular_values[rank:].square().sum().sqrt()) == pytest.approx(best, abs=ridge)
    if rank < 20:
        assert _error(weight, x, white, rank) < 0.9 * _error(weight, x, plain, rank)
    # Without whitening it is the nearest in the weights.
    expected = float(torch.linalg.svdvals(weight)[rank:].square().sum().sqrt())
    assert _error(weight, torch.eye(20, dtype=torch.float64), plain, rank) == pytest.approx(
        expected, abs=1e-9
    )


def test_singular_values_are_split_evenly() -> None:
    weight, _ = _problem()
    found = decompose(weight, None)
    for factor in (found.first.T, found.second):
        torch.testing.assert_close(factor.norm(dim=0), found.singular_values.sqrt())


def test_a_text_that_shows_few_directions() -> None:
    weight, x = _problem(tokens=6)
    found = decompose(weight, x @ x.T)
    assert _error(weight, x, found, 6) < 1e-2 * torch.linalg.norm(weight @ x)
    assert _error(weight, torch.eye(20, dtype=torch.float64), found, 20) < 1e-6, (
        "the ridge keeps what was not shown"
    )


def test_a_moment_that_rounding_made_indefinite_still_whitens() -> None:
    weight, x = _problem()
    values, vectors = torch.linalg.eigh(x @ x.T)
    values[:3] = -5 * RIDGE * values.mean()
    moment = vectors * values @ vectors.T
    assert torch.linalg.cholesky_ex(moment + RIDGE * values.mean() * torch.eye(20)).info > 0
    found = decompose(weight, moment)
    shown = vectors[:, 3:] * values[3:].sqrt()
    best = float(torch.linalg.svdvals(weight @ shown)[8:].square().sum().sqrt())
    assert _error(weight, shown, found, 8) == pytest.approx(best, rel=1e-3)
    assert _error(weight, shown, decompose(weight, None), 8) > 1.1 * best


@pytest.mark.parametrize(
    ("weight", "moment", "words"),
    [
        (torch.full((4, 4), torch.nan), torch.eye(4), "weights are not finite"),
        (torch.eye(4), torch.zeros(4, 4), "second moments of the inputs have the mean 0.0"),
        (torch.eye(4), torch.full((4, 4), torch.inf), "second moments of the inputs have the mean inf"),
    ],
)
def test_what_is_not_finite_is_refused(weight: Tensor, moment: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decompose(weight.double(), moment.double())


class _Text(list):
    """Rows as the loader gives them: a list with a length of row and a padding id."""

    seq_len, pad_token_id = SEQ_LEN, 0


def _rows() -> Rows:
    random = np.random.default_rng(3)
    rows = _Text()
    for _ in range(ROWS):
        labels = random.integers(3, 97, SEQ_LEN)
        labels[random.random(SEQ_LEN) < 0.3] = IGNORE
        rows.append(Row(random.integers(3, 97, SEQ_LEN), np.arange(SEQ_LEN), labels))
    return rows


def _factorise(source: Path, mesh: Mesh, root: Path) -> dict[str, float]:
    """Factor the student in every way; return the seconds of each."""
    stage = build_stage(STUDENT, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False)
    load_weights(stage, source)
    links = Links(mesh, messages(stage, None, rows=SIZE, seq_len=SEQ_LEN))
    batches = spread_microbatches(
        _rows(), microbatch_size=SIZE, num_rows=ROWS, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
    )
    shape = MeshShape(pp=mesh.pp.size, dp=mesh.dp.size, tp=mesh.tp.size)
    seconds = {}
    for name, wanted in WISHES.items():
        student = Student(model=str(source), low_rank=wanted)
        seconds[name] = factorise_student(
            Config(teacher=Teacher(model="t"), student=student, mesh=shape),
            mesh,
            students=[stage],
            student_config=STUDENT,
            source=source,
            links=links,
            microbatches=batches,
            target=root / name,
        )
    return seconds


def _factorise_in_layouts(source: Path, root: Path) -> list[dict[str, float]]:
    return [
        _factorise(source, Mesh.create(**layout), root / f"layout-{number}")
        for number, layout in enumerate(LAYOUTS)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("dense"), STUDENT)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pruning").mkdir()
    (folder / "pruning" / "provenance.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert all(seconds > 0 for seconds in _factorise(source, Mesh.single(), root).values())
    return root


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def _inputs(name: str) -> Tensor:
    """Return what a linear of the dense student reads on the positions that count, [in, T]."""
    seen = []
    model = tiny_model(STUDENT)
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    columns = [torch.from_numpy(np.stack(each)) for each in zip(*_rows(), strict=True)]
    with torch.no_grad():
        model(input_ids=columns[0], position_ids=columns[1], use_cache=False)
    return seen[0][columns[2] != IGNORE].T


def test_the_folder_holds_the_best_factors(source: Path, alone: Path) -> None:
    dense = _tensors(source)
    for wish, least in (("ratio", 0.9), ("plain", 0.0)):
        folder = alone / wish
        ranks = load_config(folder).reflux_low_rank
        assert ranks == {
            f"model.layers.{layer}.mlp.{name}_proj": 8
            for layer in range(2)
            for name in ("gate", "up", "down")
        }
        tensors = _tensors(folder)
        for name, rank in ranks.items():
            x, weight = _inputs(name), dense[f"{name}.weight"]
            first, second = tensors.pop(f"{name}.first.weight"), tensors.pop(f"{name}.second.weight")
            assert first.shape == (rank, weight.shape[1]) and second.shape == (weight.shape[0], rank)
            assert torch.equal(tensors.pop(f"{name}.second.bias"), dense[f"{name}.bias"])
            error = float(torch.linalg.norm((weight - second @ first) @ x))
            best = float(torch.linalg.svdvals(weight @ x)[rank:].square().sum().sqrt())
            assert best * (1 - 1e-9) <= error
            assert error <= best * 1.001 or least == 0.0
            assert least > 0.0 or error > best * 1.01, "plain singular values are not whitened ones"
        untouched = {name: each for name, each in dense.items() if name.rpartition(".")[0] not in ranks}
        assert tensors.keys() == untouched.keys()
        assert all(torch.equal(tensors[name], each) for name, each in untouched.items())
        assert (folder / "tokenizer.json").is_file() and (folder / "pruning" / "provenance.json").is_file()
    stage = build_stage(load_config(alone / "energy"), pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    load_weights(stage, alone / "energy")
    assert not list(alone.glob(".*")), "nothing is left beside the folders"


def test_a_budget_is_kept(alone: Path) -> None:
    model = tiny_model(load_config(alone / "params"))
    count = sum(each.numel() for each in model.parameters())
    assert 22_000 - 8 * (32 + 48) < count <= 22_000


def test_every_layout_writes_the_same_student(source: Path, alone: Path, tmp_path: Path) -> None:
    for rank in run_distributed(2, _factorise_in_layouts, source, tmp_path):
        assert all(seconds > 0 for each in rank for seconds in each.values())
    for number in range(len(LAYOUTS)):
        for wish in WISHES:
            folder = tmp_path / f"layout-{number}" / wish
            mine, expected = _tensors(folder), _tensors(alone / wish)
            assert load_config(folder).reflux_low_rank == load_config(alone / wish).reflux_low_rank
            assert mine.keys() == expected.keys()
            for name, tensor in mine.items():
                torch.testing.assert_close(
                    tensor, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_a_student_that_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    for wish in WISHES:
        (tmp_path / wish).mkdir()
    assert set(_factorise(source, Mesh.single(), tmp_path).values()) == {0.0}


def test_weights_that_are_not_finite_are_named(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((source / "config.json").read_text())
    tensors = _tensors(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        _factorise(broken, Mesh.single(), tmp_path)
    assert str(caught.value).startswith(f"student.model={broken}: model.layers.1.mlp.")
    assert not (tmp_path / "ratio").exists()
