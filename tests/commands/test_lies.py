"""Models, text and caches that lie: one line that names file and reason, exit code 2, by each command that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import distill, evaluate, plan, prune
from launch.command import run_alone
from tests.commands.test_mistakes import assert_one_line
from tests.commands.tiny_run import Done, Inputs, call
from tests.lying_files import change_header, move_behind_link

UP = "model.layers.0.mlp.up_proj.weight"
Harm = Callable[[Path], object]


def config(**changes: Any) -> Harm:
    """Return what changes values of config.json."""

    def harm(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return harm


def text(name: str, content: str) -> Harm:
    """Return what writes another file."""
    return lambda folder: (folder / name).write_text(content)


def entry(**changes: Any) -> Harm:
    """Return what changes what the header of model.safetensors says of one tensor."""
    return lambda folder: change_header(folder / "model.safetensors", UP, **changes)


def index(shard: str) -> Harm:
    """Return what makes an index that names this file for every tensor."""

    def harm(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(names, shard)})
        )

    return harm


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    """Return what writes one tensor otherwise."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[UP] = change(tensors[UP]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def added_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<new>"})
    file.write_text(json.dumps(tokenizer))


LIES: dict[str, tuple[Harm, str]] = {
    "a list": (text("config.json", "[1]"), "config.json holds a list, not an object"),
    "deep JSON": (text("config.json", "[" * 100_000), "config.json cannot be read"),
    "negative layers": (config(num_hidden_layers=-1, layer_types=None), "num_hidden_layers=-1"),
    "huge vocabulary": (config(vocab_size=10**12), "vocab_size=1000000000000, which no model has"),
    "large vocabulary": (config(vocab_size=10**7), "but config.json says [10000000,32]"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0, which no model has"),
    "odd groups": (config(num_key_value_heads=3), "num_key_value_heads=3, which does not divide"),
    "a layer's width": (config(intermediate_size=-3), "intermediate_size=-3"),
    "unknown type": (config(model_type="nope"), "model type `nope`"),
    "unknown activation": (
        config(hidden_act="nope"),
        "describes a model that cannot be built (KeyError: 'nope')",
    ),
    "text as a number": (config(max_position_embeddings="x"), "expected int, got str"),
    "names": (config(architectures=[1]), "architectures=[1]; a list of names"),
    "negative offset": (entry(data_offsets=[-8, 0]), "broken safetensors header"),
    "offset beyond": (entry(data_offsets=[0, 2**62]), "is cut short"),
    "offset as text": (entry(data_offsets=["a", "b"]), "broken safetensors header"),
    "huge shape": (entry(shape=[10**9, 10**9]), "broken safetensors header"),
    "unknown dtype": (entry(dtype="F17"), "broken safetensors header"),
    "whole numbers": (tensor(lambda old: old.to(torch.int64)), f"holds {UP} as I64; plain floats are needed"),
    "transposed": (
        tensor(lambda old: old.T),
        f"tensor '{UP}' has shape [32,48], but config.json says [48,32]",
    ),
    "out by the index": (index("../../etc/passwd"), "names the file '../../etc/passwd'; a plain name"),
    "absolute": (index("/etc/passwd"), "names the file '/etc/passwd'; a plain name"),
    "NUL": (index("a\0.safetensors"), r"names a\x00.safetensors, which is missing"),
    "long name": (index("a" * 400 + ".safetensors"), "which is missing"),
    "missing shard": (index("model-2.safetensors"), "names model-2.safetensors, which is missing"),
    "out by a link": (lambda folder: move_behind_link(folder / "model.safetensors"), "is a link to"),
    "broken tokenizer": (text("tokenizer.json", "{"), "its tokenizer cannot be read"),
    "ids beyond": (added_token, "but config.json has vocab_size="),
}


@pytest.mark.parametrize("lie", [*list(LIES)[:6:5], "transposed", "out by the index", "ids beyond"])
def test_a_teacher_that_lies(lie: str, inputs: Inputs, tmp_path: Path) -> None:
    tell(lie, "teacher.model", inputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["teacher.model", "student.model"])
@pytest.mark.parametrize("lie", LIES)
def test_every_lie(lie: str, key: str, inputs: Inputs, tmp_path: Path) -> None:
    if "tokenizer" in lie or "ids" in lie:
        key = "teacher.model"
    tell(lie, key, inputs, tmp_path)


def tell(lie: str, key: str, inputs: Inputs, tmp_path: Path) -> None:
    """Assert that a run names model and reason in one line."""
    harm, part = LIES[lie]
    model = Path(shutil.copytree(inputs.teacher, tmp_path / "model"))
    harm(model)
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", f"{key}={model}"))
    assert_one_line(done, key, str(model), part)


def test_the_other_commands_tell_it_too(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(inputs.teacher, tmp_path / "model"))
    LIES["large vocabulary"][0](model)
    arguments = inputs.settings(tmp_path / "run", f"teacher.model={model}")
    for command in (prune.COMMAND, evaluate.COMMAND):
        assert_one_line(call(command, arguments), str(model), "but config.json says [10000000,32]")
    capsys.readouterr()
    assert run_alone(lambda _: plan.plan(arguments)) == 2
    out, err = capsys.readouterr()
    assert_one_line(Done(2, out, err, 0.0), str(model), "but config.json says [10000000,32]")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "t\xffwo"}\n', "a.jsonl, line 2 is not UTF-8"),
        ("a.txt", b"one\ntw\0o\n", "a.txt, line 2 holds a NUL"),
        ("a.parquet", b"PAR1\0\0\0\0", "a.parquet cannot be read as parquet"),
    ],
)
def test_text_that_lies(name: str, content: bytes, part: str, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert_one_line(
        call(distill.COMMAND, inputs.settings(tmp_path / "run", f"data.path={tmp_path / name}")), part
    )


def test_a_poisoned_cache_is_made_again(inputs: Inputs, tmp_path: Path) -> None:
    settings = [*inputs.settings(tmp_path / "run"), f"data.cache_dir={tmp_path / 'cache'}"]
    assert call(evaluate.COMMAND, settings).code == 0
    # To judge, only what is held out is tokenised.
    (array,) = (tmp_path / "cache" / "corpora" / "rows").glob("*/input_ids.npy")
    whole = array.read_bytes()
    changed = bytearray(whole)
    changed[-3] ^= 1
    for poisoned in (whole[:-7], changed):
        array.write_bytes(poisoned)
        done = call(evaluate.COMMAND, settings)
        assert done.code == 0, done.err
        assert done.out.count("has another content than was written); the text is tokenised again\n") == 1
        assert array.read_bytes() == whole
