"""Whole runs of several rounds: shrinking, growing, repeated, stopped, and killed in the middle of any of it."""

from __future__ import annotations

import json
import random
import re
import string
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from distill import session, train
from distill import step as step_module
from distill.config import Loss
from distill.divergences import Divergence
from distill.prune import load_kept
from distill.rows import Corpus
from distill.running import Running
from distill.stream import BLOCK
from launch import distill
from parallel.checkpoint_manifest import read_manifest
from tests.commands.test_resume import interrupt
from tests.commands.tiny_run import Done, Inputs, call, metrics, read_lines, start
from tests.distill.tiny_tokenizer import TOKENS

SHRINKS = "rounds=[{train: {steps: 4}}, {student: {prune: {hidden_size: 24, num_layers: 2}}, optimizer: {lr: 0.002}}]"
GROWS = "rounds=[{student: {prune: {hidden_size: 24, num_layers: 2}}}, {train: {steps: 4}}]"
ASSISTANT = "rounds=[{}, {teacher: {model: previous}, student: {prune: {num_layers: 2}}, loss: {hidden: {weight: 1, every: 1}}}]"
CORRECTED = (
    "rounds=[{student: {prune: {pruning_ratio: 0, num_layers: null, intermediate_size: null, num_key_value_heads: null}}, "
    "loss: {alpha: 1}, train: {steps: 3}}, {teacher: {model: round-0}}]"
)
VARIED = (
    "rounds=[{train: {steps: 3}}, {train: {steps: 5}, loss: {kind: reverse_kl}, optimizer: {warmup_steps: 2}, "
    "data: {seq_len: 16, weights: [3, 1]}, student: {sparsity: {method: magnitude, schedule: linear, steps: 2}}}]"
)
REPEATED = ("gate.repeat_until=-100", "gate.repeats=2", "train.steps=3", "checkpoint.every=2")
STEPS = 6


def settings(inputs: Inputs, folder: Path, *overrides: str) -> list[str]:
    return inputs.settings(folder, f"train.steps={STEPS}", "checkpoint.every=3", *overrides)


def weights(folder: Path) -> dict[str, list[float]]:
    return {
        name: each.tolist()
        for path in sorted(folder.glob("*.safetensors"))
        for name, each in load_file(path).items()
    }


def trajectory(folder: Path) -> list[tuple[float, ...]]:
    keys = ("step", "round", "tokens", "loss/total", "loss/hard", "loss/soft", "optim/grad_norm", "optim/lr")
    return [tuple(line[key] for key in keys) for line in metrics(folder)]


def assert_same(folder: Path, expected: Path) -> None:
    assert trajectory(folder) == trajectory(expected)
    for name in ("round-0", "student"):
        assert weights(folder / name) == weights(expected / name)
    judged = [(folder_ / "evaluations.jsonl").read_text() for folder_ in (folder, expected)]
    assert judged[0] == judged[1]


def finished(done: Done) -> None:
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def shrunk(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrunk")
    finished(call(distill.COMMAND, settings(inputs, folder, SHRINKS)))
    return folder


@pytest.fixture(scope="module")
def grown(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    finished(call(distill.COMMAND, settings(inputs, folder, GROWS)))
    return folder


@pytest.fixture(scope="module")
def repeated(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """One round that is trained twice."""
    folder = tmp_path_factory.mktemp("repeated")
    done = call(distill.COMMAND, settings(inputs, folder, *REPEATED))
    finished(done)
    return folder, done


class Seen(NamedTuple):
    """A run, and what was seen of it from inside."""

    folder: Path
    out: str
    corpora: list[Corpus]
    """As they were opened."""
    kinds: list[str]
    """Of the loss, micro-batch by micro-batch."""


def capitals(inputs: Inputs) -> Path:
    """Write a second text, which shares no letter with the first; return its file."""
    rng, words = random.Random(1), ["QUICK", "BROWN", "FOXES", "JUMP", "OVER", "LAZY", "DOGS"]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(12)]
    file = inputs.folder / "capitals.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def varied_settings(inputs: Inputs, folder: Path, *overrides: str) -> list[str]:
    return settings(
        inputs,
        folder,
        VARIED,
        f"data.path=[{inputs.corpus},{inputs.folder / 'capitals.jsonl'}]",
        "data.weights=[1,1]",
        "loss.temperature={kind: linear, start: 4, end: 1}",
        "optimizer.lr=0.002",
        *overrides,
    )


@pytest.fixture(scope="module")
def varied(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two rounds of one student, the second with length, loss, rate, text and zeros of its own."""
    capitals(inputs)
    corpora, kinds = [], []
    load, divergence = session.load_corpus, step_module.divergence_of

    def load_corpus(*given: Any) -> Corpus:
        corpora.append(load(*given))
        return corpora[-1]

    def divergence_of(loss: Loss) -> Divergence:
        kinds.append(loss.kind)
        return divergence(loss)

    folder = tmp_path_factory.mktemp("varied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_corpus", load_corpus)
        patch.setattr(step_module, "divergence_of", divergence_of)
        done = call(distill.COMMAND, varied_settings(inputs, folder))
    finished(done)
    return Seen(folder, done.out, corpora, kinds)


def test_each_round_leaves_its_student_and_its_lines(shrunk: Path) -> None:
    lines = metrics(shrunk)
    assert [(line["step"], line["round"]) for line in lines] == [
        (n, 0 if n <= 4 else 1) for n in range(1, 11)
    ]
    assert [line["optim/lr"] for line in lines][4] == 0.002, "each round has its own learning rate"
    first, last = (AutoConfig.from_pretrained(shrunk / name) for name in ("round-0", "student"))
    assert (first.num_hidden_layers, last.num_hidden_layers) == (3, 2)
    assert first.hidden_size > last.hidden_size == 24
    AutoModelForCausalLM.from_pretrained(shrunk / "student")
    (old, _), (new, _) = (load_kept(shrunk / name) for name in ("round-0", "student"))
    assert set(new.layers) < set(old.layers)
    assert set(new.hidden.tolist()) < set(old.hidden.tolist())
    assert all(new.ffn[layer].equal(old.ffn[layer]) for layer in new.layers)
    summary = json.loads((shrunk / "summary.json").read_text())
    assert summary["finished"] and summary["round_steps"] == [4, 6] and summary["rounds_done"] == 2
    names = [
        "teacher",
        "round 0: pruned",
        "round 0: pruned + distilled",
        "round 1: pruned",
        "round 1: pruned + distilled",
    ]
    assert [row["model"] for row in summary["table"]] == names
    sizes = [row["parameters"] for row in summary["table"]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] == sizes[4]
    assert "round 1" in (shrunk / "curve.svg").read_text()


def test_moments_come_along(inputs: Inputs, shrunk: Path, tmp_path: Path) -> None:
    finished(call(distill.COMMAND, settings(inputs, tmp_path, SHRINKS, "optimizer.moments=reset")))
    mine, theirs = trajectory(tmp_path), trajectory(shrunk)
    assert mine[:5] == theirs[:5], "the first loss after the cut does not know of moments"
    assert mine[5] != theirs[5]


def test_a_round_has_its_own_length_loss_and_rate(varied: Seen) -> None:
    lines = metrics(varied.folder)
    assert [line["round"] for line in lines] == [0] * 3 + [1] * 5
    temperatures = [line["loss/temperature"] for line in lines]
    ends = [temperatures[place] for place in (0, 2, 3, 7)]
    assert ends == [4, 1, 4, 1], "from start to end over the steps of each round"
    assert varied.kinds == ["forward_kl"] * 3 * 4 + ["reverse_kl"] * 5 * 4
    rates = [line["optim/lr"] for line in lines]
    assert rates[0] == 0.002 and rates[3:5] == [0.001, 0.002], "it rises again"


def test_a_round_has_its_own_text(varied: Seen) -> None:
    counts = [line["tokens"] for line in metrics(varied.folder)]
    tokens = [after - before for before, after in pairwise([0, *counts])]
    # A row of 16 has 15 labels at most.
    assert min(tokens[:3]) > 4 * 15 >= max(tokens[3:])
    letters = {TOKENS.index(letter) for letter in string.ascii_uppercase}
    shares = [
        sum(bool(letters & {*corpus.train.row(place).input_ids_S.tolist()}) for place in range(BLOCK))
        for corpus in varied.corpora
    ]
    assert shares == [BLOCK // 2, BLOCK // 4]
    assert [corpus.train.seq_len for corpus in varied.corpora] == [32, 16]
    last = read_manifest(varied.folder / "checkpoints" / "step-00000008")
    read = last.extras["read"]
    assert read.keys() == {"0", "1"} and sum(read.values()) == 3 * 4 * 32, "where the second round began"
    said = re.findall(r"rows of (\d+) tokens to train on, (\d+) held out", varied.out)
    # The second round is judged by the run's own text.
    judged = str(len(varied.corpora[0].held_out.rows))
    assert said == [("32", judged), ("16", judged)]


def test_zeros_rise_over_the_steps_of_their_round(varied: Seen) -> None:
    summary = json.loads((varied.folder / "summary.json").read_text())
    assert summary["sparsity"] == {"pattern": "unstructured", "share": 0.5}


def test_moments_are_reset_where_a_round_goes_on_with_its_student(
    inputs: Inputs, varied: Seen, tmp_path: Path
) -> None:
    finished(call(distill.COMMAND, varied_settings(inputs, tmp_path, "optimizer.moments=reset")))
    last = Path("checkpoints") / "step-00000008"
    assert [read_manifest(folder / last).updates for folder in (varied.folder, tmp_path)] == [8, 5]
    mine, theirs = trajectory(tmp_path), trajectory(varied.folder)
    assert mine[:4] == theirs[:4], "the first loss of the round does not know of moments"
    assert mine[4] != theirs[4]


def test_what_was_dropped_comes_back_from_the_teacher(inputs: Inputs, grown: Path) -> None:
    (old, _), (new, _) = (load_kept(grown / name) for name in ("round-0", "student"))
    assert set(old.layers) < set(new.layers) and len(new.layers) == 3
    (restored,) = set(new.layers) - set(old.layers)
    teacher, begun = (
        load_file(inputs.teacher / "model.safetensors"),
        load_file(grown / "pruned-1" / "model.safetensors"),
    )
    place, name = new.layers.index(restored), "self_attn.q_norm.weight"
    assert begun[f"model.layers.{place}.{name}"].equal(teacher[f"model.layers.{restored}.{name}"])
    trained, kept_layer = load_file(grown / "round-0" / "model-stage000-00000.safetensors"), old.layers[0]
    place = new.layers.index(kept_layer)
    assert begun[f"model.layers.{place}.{name}"].equal(trained[f"model.layers.0.{name}"])


@pytest.mark.parametrize(
    ("rounds", "place", "call_number"),
    [
        (SHRINKS, "parallel.checkpoint.write_shards", 3),  # in the second round
        pytest.param(
            SHRINKS, "distill.train.export_round", 1, marks=pytest.mark.slow
        ),  # the first round's student is not there yet
        (SHRINKS, "distill.resume.carry_state", 1),  # the second round has not begun
        pytest.param(GROWS, "parallel.checkpoint.write_shards", 4, marks=pytest.mark.slow),
        (GROWS, "distill.recut.write_student", 1),
    ],
)
def test_killed_anywhere_it_ends_the_same(
    rounds: str,
    place: str,
    call_number: int,
    inputs: Inputs,
    shrunk: Path,
    grown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = settings(inputs, tmp_path, rounds)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, place, call_number=call_number)
        call(distill.COMMAND, arguments)
    finished(call(distill.COMMAND, arguments))
    assert_same(tmp_path, shrunk if rounds == SHRINKS else grown)


@pytest.mark.parametrize(("place", "step"), [("_follows", 4), ("judge_start", 0)])
def test_a_request_to_stop_is_heeded_before_more_is_begun(
    place: str, step: int, inputs: Inputs, shrunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a round, and while models are loaded or judged."""
    arguments = settings(inputs, tmp_path, SHRINKS)
    original = getattr(train, place)

    def request(running: Running, *rest: Any) -> Any:
        running.stop.request()
        return original(running, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, place, request)
        done = call(distill.COMMAND, arguments)
    finished(done)
    assert f"stopped after step {step} of 10; the same command goes on from there" in done.out
    assert not (tmp_path / "pruned-1").exists()
    finished(call(distill.COMMAND, arguments))
    assert_same(tmp_path, shrunk)


def test_a_round_is_cut_anew_when_the_one_before_goes_another_way(
    inputs: Inputs, shrunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(inputs, tmp_path, SHRINKS)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, "distill.resume.carry_state")
        call(distill.COMMAND, arguments)
    (tmp_path / "pruned-1" / "model.safetensors").write_bytes(b"of the way before")
    begin = tmp_path / "checkpoints" / "step-00000003"
    done = call(distill.COMMAND, [*arguments, f"checkpoint.resume={begin}"])
    finished(done)
    assert "dropped step-00000004: the run goes on from step-00000003" in done.out
    assert_same(tmp_path, shrunk)


def test_the_student_of_a_round_teaches_the_next(inputs: Inputs, tmp_path: Path) -> None:
    done = call(distill.COMMAND, settings(inputs, tmp_path, ASSISTANT))
    finished(done)
    assert f"round 1: {tmp_path / 'round-0'}: 3 layers, " in done.out
    assert "; student: 2 layers, " in done.out
    assert len(metrics(tmp_path)) == 2 * STEPS
    _, provenance = load_kept(tmp_path / "student")
    assert provenance["teacher"] == str(inputs.teacher), "cuts count the units of the first round's teacher"
    assert "relative depth" not in done.out, "the assistant has the layers that the student was cut from"
    rows = [row["model"] for row in json.loads((tmp_path / "summary.json").read_text())["table"]]
    assert rows[1:3] == ["round 0: pruned", "round 0: pruned + distilled"]
    assert rows[3:] == [
        "round 1 (teacher round-0): pruned",
        "round 1 (teacher round-0): pruned + distilled",
    ]
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"pruned out of `{inputs.teacher}`" in card and f"Teacher: `{tmp_path / 'round-0'}`" in card


def test_a_corrected_teacher(inputs: Inputs, tmp_path: Path) -> None:
    finished(call(distill.COMMAND, settings(inputs, tmp_path, CORRECTED)))
    table = json.loads((tmp_path / "summary.json").read_text())["table"]
    assert table[1]["parameters"] == table[0]["parameters"] and table[1]["loss"] == table[0]["loss"]
    assert table[2]["loss"] < table[1]["loss"], "training on the text brings the teacher nearer to it"
    assert table[3]["parameters"] < table[2]["parameters"]


def gap(folder: Path, step: int) -> str:
    """Return how far the student judged after a step is behind the teacher, as a gate tells it."""
    lines = read_lines(folder / "evaluations.jsonl")
    (teacher,) = (line["eval/loss"] for line in lines if line["model"] == "teacher")
    student = [line["eval/loss"] for line in lines if (line["model"], line["step"]) == ("student", step)][-1]
    return f"{student - teacher:.4f}"


def test_gates(inputs: Inputs, repeated: tuple[Path, Done], tmp_path: Path) -> None:
    folder, again = repeated
    once_more = re.findall(
        r"^gap (\S+) is above gate\.repeat_until=-100\.0: once more$", again.out, re.MULTILINE
    )
    assert once_more == [gap(folder, 3)]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["optim/lr"] == lines[3][
        "optim/lr"
    ]
    assert len({line["loss/total"] for line in lines}) == 6, "the text goes on"
    stopped = call(distill.COMMAND, settings(inputs, tmp_path / "stop", SHRINKS, "gate.stop_if=-100"))
    finished(stopped)
    told = f"round 0: gap {gap(tmp_path / 'stop', 4)} is above gate.stop_if=-100.0: the run ends here"
    assert told in stopped.out
    assert len(metrics(tmp_path / "stop")) == 4 and (tmp_path / "stop" / "student").is_dir()
    assert not (tmp_path / "stop" / "round-0").exists()


def test_killed_in_the_second_training_of_a_round_it_ends_the_same(
    inputs: Inputs, repeated: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(inputs, tmp_path, *REPEATED)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        # Of the checkpoints after steps 2, 3, 4 and 6.
        interrupt(patch, "parallel.checkpoint.write_shards", call_number=4)
        call(distill.COMMAND, arguments)
    done = call(distill.COMMAND, arguments)
    finished(done)
    assert "going on after step 4 of 6" in done.out and "once more" not in done.out
    assert_same(tmp_path, repeated[0])


def test_mistakes(inputs: Inputs, tmp_path: Path) -> None:
    for rounds, words in (
        (
            "rounds=[{teacher: {model: previous}}]",
            "rounds[0].teacher.model=previous is the student of a round",
        ),
        ("rounds=[{}, {teacher: {model: round-1}}]", "use a model, previous, or round-0 to round-0"),
        ("rounds=[{mesh: {pp: 2}}]", "rounds[0].mesh.pp cannot differ between rounds"),
        ("rounds=[{}, {train: {tokens: 0}}]", "train.tokens=0 must be greater than 0"),
        ("rounds=[{}, {student: {prune: {num_layers: 9}}}]", "error: rounds[1]: student.prune.num_layers=9"),
    ):
        done = call(distill.COMMAND, settings(inputs, tmp_path / "run", rounds))
        assert done.code == 2 and words in done.err and not (tmp_path / "run").exists(), done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(2, ["mesh.pp=2"]), (2, ["mesh.tp=2"]), (4, ["mesh.pp=2", "mesh.tp=2"])]
)
def test_layouts_have_one_trajectory(
    num_ranks: int, layout: list[str], inputs: Inputs, shrunk: Path, tmp_path: Path
) -> None:
    finished(
        start("launch.distill", settings(inputs, tmp_path, SHRINKS, *layout), num_ranks=num_ranks).end(
            timeout_s=300
        )
    )
    for mine, single in zip(trajectory(tmp_path), trajectory(shrunk), strict=True):
        assert mine == pytest.approx(single, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call_number"),
    [
        ("parallel.checkpoint.write_shards", 4),  # in the middle of the second round
        ("distill.resume.carry_state", 1),  # between the rounds
    ],
)
@pytest.mark.parametrize("layout", ["mesh.pp=2", "mesh.dp=2", "mesh.tp=2"])
def test_killed_in_one_layout_it_goes_on_in_another(
    layout: str,
    place: str,
    call_number: int,
    inputs: Inputs,
    shrunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, place, call_number=call_number)
        call(distill.COMMAND, settings(inputs, tmp_path, SHRINKS))
    run = start("launch.distill", settings(inputs, tmp_path, SHRINKS, layout), num_ranks=2)
    finished(run.end(timeout_s=300))
    for mine, single in zip(trajectory(tmp_path), trajectory(shrunk), strict=True):
        assert mine == pytest.approx(single, rel=1e-4, abs=1e-5)
