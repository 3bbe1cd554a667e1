"""Mistakes of a user, each told in one line that names the key, its value and what would be right, by the real commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import distill
from tests.commands.tiny_run import Done, Inputs, call, losses, metrics, snapshot, start
from tests.distill.tiny_tokenizer import TOKENS, tiny_tokenizer
from tests.families import save_tiny, tiny_config

SECONDS = 30
"""Until a mistake is told: 10 s are promised on an idle machine, tests share theirs."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all mistakes, in which a run must still be possible afterwards."""
    return tmp_path_factory.mktemp("mistakes") / "run"


def assert_one_line(done: Done, *parts: str) -> None:
    """Assert exit code 2 and one line of error, in time, with these parts."""
    assert done.code == 2, done.out + done.err
    assert len(done.errors) == 1 and "Traceback" not in done.err, done.err
    assert done.err.rstrip().endswith(done.errors[0]), "nothing is said after the mistake"
    assert " tokens/s  " not in done.out and done.seconds < SECONDS
    missing = [part for part in parts if part not in done.errors[0]]
    assert not missing, f"{missing} not in {done.errors[0]}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["mesh.tp=3"], ["mesh.tp=3", "does not divide the number of processes, 1", "use"]),
        (["mesh.pp=2", "mesh.dp=1"], ["mesh.pp=2", "the number of processes is 1; start 2"]),
        (["mesh.dp=0"], ["mesh.dp=0", "must be at least 1, or -1"]),
        (["loss.temperature=0"], ["loss.temperature=0", "must be greater than 0"]),
        (["loss.temperature=-1"], ["loss.temperature=-1", "must be greater than 0"]),
        (["loss.temperature=nan"], ["loss.temperature=nan", "must be greater than 0"]),
        (["loss.temperature=warm"], ["loss.temperature=warm", "must be a number"]),
        (["loss.alpha=1.5"], ["loss.alpha=1.5", "0 to 1"]),
        (["loss.alpha=-0.1"], ["loss.alpha=-0.1", "0 to 1"]),
        (["loss.temprature=2"], ["no key loss.temprature", "did you mean loss.temperature?"]),
        (["train.steps=ten"], ["train.steps=ten", "a whole number"]),
        (["experiment=quickstar"], ["experiment=quickstar", "use debug, progressive or quickstart"]),
        (["data.seq_len=65"], ["data.seq_len=65", "max_position_embeddings=64", "use at most 64"]),
        (["data.seq_len=4"], ["data.seq_len=4", "use at least 8"]),
        (["train.global_batch_size=6", "train.microbatch_size=4"], ["train.global_batch_size=6", "use 4 or 8"]),
        (["train.global_batch_size=4000"], ["train.global_batch_size=4000", "use at most"]),
        (["student.prune.num_layers=5"], ["student.prune.num_layers=5", "between 1 and the teacher's 4"]),
        (["student.prune.layers=[0,9]", "student.prune.num_layers=null"], ["student.prune.layers=[0, 9]", "0 to 3"]),
        (["student.prune.intermediate_size=64"], ["student.prune.intermediate_size=64", "the teacher's 48"]),
        (["student.prune.num_key_value_heads=5"], ["student.prune.num_key_value_heads=5", "the teacher's 4"]),
        (["student.prune.num_attention_heads=5"], ["num_attention_heads=5", "num_key_value_heads=2", "use 4 with 2"]),
        (["student.prune.hidden_size=33"], ["student.prune.hidden_size=33", "the teacher's 32"]),
        (["teacher.model=/nowhere/model"], ["teacher.model=/nowhere/model", "does not exist; use a hub id, a folder"]),
        (["data.path=/nowhere.txt"], ["data.path=/nowhere.txt", "does not exist; use a file"]),
        (["student.model=/nowhere"], ["student.model=/nowhere", "does not exist"]),
        (["checkpoint.resume=/nowhere"], ["checkpoint.resume=/nowhere", "use auto, none or a folder"]),
        (["checkpoint.resume=TMP"], ["checkpoint.resume=", "is no checkpoint: it has no manifest.json"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)  # fmt: skip
def test_settings(
    overrides: list[str], parts: list[str], inputs: Inputs, run_dir: Path, tmp_path: Path
) -> None:
    # The run that `checkpoint.resume` belongs to is pruned before its checkpoint is read, so it has a folder of its own.
    folder = tmp_path / "run" if "TMP" in overrides[0] else run_dir
    overrides = [override.replace("TMP", str(tmp_path)) for override in overrides]
    assert_one_line(call(distill.COMMAND, inputs.settings(folder, *overrides)), *parts)


def other_vocabulary(folder: Path) -> None:
    save_tiny(folder, tiny_config("llama", vocab_size=len(TOKENS) + 5), dtype=torch.float32)


def encoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return drop


def with_another(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.extra": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (encoder, ["is not a causal language model but BertModel; a ...ForCausalLM is needed"]),
        (cut_short, ["model.safetensors is cut short", "fetch it again"]),
        (pickled, ["holds its weights as pytorch_model.bin; only safetensors are read"]),
        (without("model.layers.3.mlp.up_proj.weight"), ["has no tensor 'model.layers.3.mlp.up_proj.weight'"]),
        (with_another, ["holds tensors that the model does not have: model.extra"]),
        (without_tokenizer, ["holds no tokenizer; copy tokenizer.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    ],
)
@pytest.mark.parametrize("key", ["teacher.model", "student.model"])
def test_models(
    key: str,
    damage: Callable[[Path], object],
    parts: list[str],
    inputs: Inputs,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    if damage is without_tokenizer and key == "student.model":
        pytest.skip("the teacher's tokenizer is the one that is used")
    shutil.copytree(inputs.teacher, tmp_path / "model")
    damage(tmp_path / "model")
    done = call(distill.COMMAND, inputs.settings(run_dir, f"{key}={tmp_path / 'model'}"))
    assert_one_line(done, f"{key}", str(tmp_path / "model"), *parts)


def test_a_student_of_another_vocabulary(inputs: Inputs, run_dir: Path, tmp_path: Path) -> None:
    other_vocabulary(tmp_path / "other")
    done = call(distill.COMMAND, inputs.settings(run_dir, f"student.model={tmp_path / 'other'}"))
    sizes = [f"vocab_size={len(TOKENS) + 5}", f"vocab_size={len(TOKENS)}"]
    assert_one_line(done, f"student.model={tmp_path / 'other'}", *sizes, "use models of one tokenizer")


def test_a_model_of_another_tokenizer_with_as_many_ids(inputs: Inputs, run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs.teacher, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    known = json.loads(file.read_text())
    names, ids = zip(*known["model"]["vocab"].items(), strict=True)
    known["model"]["vocab"] = dict(zip(names, [*ids[:-2], ids[-1], ids[-2]], strict=True))
    file.write_text(json.dumps(known))
    words = ["has another tokenizer than", f"id {ids[-2]} is", "use models of one tokenizer"]
    for override, key in (
        (f"student.model={tmp_path / 'other'}", "student.model"),
        (f"rounds=[{{}}, {{teacher: {{model: {tmp_path / 'other'}}}}}]", "rounds[1]: teacher.model"),
    ):
        done = call(distill.COMMAND, inputs.settings(run_dir, override))
        assert_one_line(done, f"{key}={tmp_path / 'other'}", *words)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", '{"text": " "}\n', "holds no text"),
        ("other.jsonl", '{"content": "words"}\n', "data.text_field=text is no string"),
        ("broken.jsonl", '{"text": \n', "line 1 is not JSON"),
        ("short.txt", "one", "train.global_batch_size=4 is more than the"),
    ],
)
def test_corpora(name: str, text: str, part: str, inputs: Inputs, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert_one_line(call(distill.COMMAND, inputs.settings(run_dir, f"data.path={tmp_path / name}")), part)


def test_an_empty_folder_as_corpus(inputs: Inputs, run_dir: Path, tmp_path: Path) -> None:
    done = call(distill.COMMAND, inputs.settings(run_dir, f"data.path={tmp_path}"))
    assert_one_line(done, f"data.path={tmp_path}", "holds no text in .txt, .jsonl, .parquet files; give")


def with_nan(folder: Path) -> Path:
    """Put a NaN into one weight of a model."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_in_a_model(inputs: Inputs, run_dir: Path, tmp_path: Path) -> None:
    model = with_nan(Path(shutil.copytree(inputs.teacher, tmp_path / "nan")))
    parts = [str(model), "loss on the held-out text is nan", "use another model or a wider dtype"]
    done = call(distill.COMMAND, inputs.settings(run_dir, f"student.model={model}"))
    assert_one_line(done, f"student.model={model}", *parts)
    ready = f"student.model={inputs.teacher}"
    done = call(distill.COMMAND, inputs.settings(run_dir, f"teacher.model={model}", ready))
    assert_one_line(done, f"teacher.model={model}", *parts)
    done = call(distill.COMMAND, inputs.settings(run_dir, f"teacher.model={model}"))
    assert_one_line(
        done, f"teacher.model={model}", "layer 2 has scores that are not finite", "use another model"
    )


def test_a_run_works_after_all_these_mistakes(inputs: Inputs, run_dir: Path, reference: Path) -> None:
    """Runs after the tests above: what they left in the folder does not matter to it."""
    done = call(distill.COMMAND, inputs.settings(run_dir))
    assert done.code == 0, done.err
    assert losses(run_dir) == losses(reference)


def test_the_folder_of_another_run(inputs: Inputs, reference: Path) -> None:
    before = snapshot(reference)
    done = call(distill.COMMAND, inputs.settings(reference, "loss.alpha=0.5"))
    assert_one_line(done, f"run.dir={reference}", "loss.alpha=0.3", "loss.alpha=0.5", "use another run.dir")
    done = call(distill.COMMAND, inputs.settings(reference, "checkpoint.resume=none"))
    assert_one_line(
        done, "checkpoint.resume=none starts anew", "use another run.dir or checkpoint.resume=auto"
    )
    assert snapshot(reference) == before


def test_two_ranks_tell_a_mistake_once(inputs: Inputs, tmp_path: Path) -> None:
    """More stages than layers is seen by both ranks, after they have met."""
    student = save_tiny(
        tmp_path / "student", tiny_config("qwen3", vocab_size=len(TOKENS), num_hidden_layers=1)
    )
    arguments = inputs.settings(tmp_path / "run", "mesh.pp=2", f"student.model={student}")
    done = start("launch.distill", arguments, num_ranks=2).end()
    assert done.code == 2 and done.out == "" and done.seconds < 3 * SECONDS
    assert done.err == "error: mesh.pp=2 is more than num_hidden_layers=1 of the student; use at most 1\n"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["mesh.tp=3"], "error: mesh.pp=1 x mesh.tp=3 = 3 does not divide the number of processes, 2;"),
        (["mesh.pp=5", "mesh.dp=1"], "error: mesh.pp=5 x mesh.dp=1 x mesh.tp=1 = 5, but the number of processes is 2;"),
        (["mesh.tp=2", "teacher.model=ODD"], "error: mesh.tp=2 does not divide num_attention_heads=3 of the teacher; use 1"),
        (["mesh.pp=2", "teacher.model=CUT"], "error: teacher.model: "),
        (["mesh.tp=2", "data.path=EMPTY"], "error: data.path="),
    ],
)  # fmt: skip
def test_two_ranks_tell_every_kind_of_mistake_once(
    overrides: list[str], line: str, inputs: Inputs, tmp_path: Path
) -> None:
    odd = tiny_config("qwen3", vocab_size=len(TOKENS), num_attention_heads=3, num_key_value_heads=3)
    tiny_tokenizer().save_pretrained(save_tiny(tmp_path / "ODD", odd, dtype=torch.float32))
    cut_short(Path(shutil.copytree(inputs.teacher, tmp_path / "CUT")))
    (tmp_path / "EMPTY").mkdir()
    for name in ("ODD", "CUT", "EMPTY"):
        overrides = [override.replace(name, str(tmp_path / name)) for override in overrides]
    done = start("launch.distill", inputs.settings(tmp_path / "run", *overrides), num_ranks=2).end()
    assert done.code == 2 and done.seconds < 3 * SECONDS
    assert len(done.errors) == 1 and done.errors[0].startswith(line), done.err
    assert done.err.splitlines()[-1] == done.errors[0]


@pytest.mark.slow
def test_a_loss_that_stays_nan_ends_all_ranks(inputs: Inputs, tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e30", "mesh.pp=2", "checkpoint.every=1", "train.max_skipped_steps=3"]
    done = start("launch.distill", inputs.settings(tmp_path, *overrides), num_ranks=2).end()
    assert done.code == 1 and done.seconds < 3 * SECONDS
    (line,) = [line for line in done.err.splitlines() if line.startswith("failed: ")]
    assert line.startswith(
        "failed: 3 steps in a row up to step 4 had a loss or gradients that are not finite "
    )
    assert "the checkpoint of step 1 is kept" in line and "Traceback" not in done.err
    assert done.out.count("changes nothing: its loss or gradients are not finite") == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert [line["optim/skipped_steps"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert not (tmp_path / "student").exists()
