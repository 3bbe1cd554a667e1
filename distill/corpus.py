"""Read the documents of a corpus and part them into training and held-out text.

Decides: what one document is (a topic of `pydoc`, a .txt file, a record of JSONL, parquet or a hub data set), and which
documents are held out: by a hash of their content, so that neither their order nor the rank nor the run's seed matters (a
student is never judged on what another run, such as its teacher's, has trained on), and two equal documents never end up on
both sides. Reading is done by `datasets`, whose Arrow files are memory-mapped: a corpus may be
larger than memory. Assumes UTF-8. Does not tokenise.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.config import ConfigError, Data
from distill.convert import show
from distill.documents import json_documents, text_documents

if TYPE_CHECKING:
    from datasets import Dataset

Part = Literal["train", "held_out"]
PYDOC = "pydoc"
_NEAR = 0.5
"""How far before the place asked for a text may be cut, in parts of what is held out."""
_SALT = b"0 "
"""Decides what is held out. With another one, students trained before would be judged on what they have read."""
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_WANTS = "a .txt, .jsonl or .parquet file, a folder of them, a hub data set id, or the word pydoc"


def read_documents(data: Data, *, cache_dir: Path, show_progress: bool = False) -> Dataset:
    """Return a corpus as a data set of `text` and `source` (index into `data.path`), in a fixed order, without blank documents.

    Args:
        data: `path` (see the module), several of them, or `owner/name:subset` for a hub data set with subsets;
            `text_field` of JSONL, parquet and hub data.
        cache_dir: where `datasets` keeps its Arrow files.
        show_progress: show its progress bars.
    Raises:
        ConfigError: nothing there, an unknown text_field, a record without text (file and line), no text at all, a file that
            has gone or cannot be read.
    """
    try:
        return _read_documents(data, cache_dir, show_progress)
    except OSError as error:
        raise ConfigError(
            f"data.path: {error.filename or data.path} cannot be read ({error.strerror or error}); it must stay where it is "
            "while it is read"
        ) from error


def _read_documents(data: Data, cache_dir: Path, show_progress: bool) -> Dataset:
    from datasets import concatenate_datasets

    paths = [data.path] if isinstance(data.path, str) else list(data.path or ())
    if not paths:
        raise ConfigError(f"data.path={data.path} names no corpus; give {_WANTS}")
    with _progress_bars(show_progress):
        sets = [
            dataset.add_column("source", [source] * len(dataset))
            for source, path in enumerate(paths)
            for dataset in _load(path, data.text_field, cache_dir / "datasets")
        ]
    if not sets:
        raise ConfigError(
            f"data.path={data.path} holds no text in {', '.join(_SUFFIXES)} files; give {_WANTS}"
        )
    whole = concatenate_datasets(sets)
    visible = []
    for i, text in enumerate(whole["text"]):
        if "\0" in text:
            raise ConfigError(
                f"data.path={show(data.path)}: record {i + 1} of all holds a NUL ({text[:40]!r}...); mend or leave it out"
            )
        if text.strip():
            visible.append(i)
    if not visible:
        raise ConfigError(f"data.path={data.path} holds no text in its {len(whole)} documents")
    return whole.select(visible)


def skipped_line(data: Data) -> str:
    """Return a line about the files in folders of `data.path` whose suffix is not read; empty where there are none."""
    paths = [data.path] if isinstance(data.path, str) else data.path or ()
    folders = (place for path in paths if path != PYDOC and (place := Path(path).expanduser()).is_dir())
    counts = Counter(
        file.suffix or "without a suffix"
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix not in _SUFFIXES and file.is_file()
    )
    if not counts:
        return ""
    shown = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    return (
        f"note: in the folders of data.path only {', '.join(_SUFFIXES)} files are read; left out: {counts.total()} "
        f"({shown}{', ...' if len(counts) > 5 else ''})"
    )


def select_part(documents: Dataset, *, part: Part, held_out_fraction: float) -> Dataset:
    """Return the documents of one part, in their order; the parts share no document and leave none out.

    Documents are held out in the order of their hash while they fit into `held_out_fraction` of all characters (one
    that does not fit is passed over; the shortest is held out if none fits). Of a corpus of one document the end is held out,
    cut off near the place asked for, at a blank line or a line's end where one is near.

    Args:
        documents: a data set with a column `text`.
        part: which side.
        held_out_fraction: share of the characters to hold out, 0 up to but not including 1; 0 holds out nothing.
    """
    if held_out_fraction > 0 and len(documents) == 1:
        train, held_out = _cut_in_two(documents["text"][0], held_out_fraction)
        text = train if part == "train" else held_out
        return type(documents).from_dict({**documents.to_dict(), "text": [text]})
    digests: list[bytes] = []
    sizes: dict[bytes, int] = {}
    for text in documents["text"]:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        digests.append(digest)
        sizes[digest] = sizes.get(digest, 0) + len(text)
    held_out = _choose(sizes, held_out_fraction)
    return documents.select([i for i, d in enumerate(digests) if (d in held_out) == (part == "held_out")])


def _choose(sizes: dict[bytes, int], fraction: float) -> set[bytes]:
    """Choose the contents to hold out, by their sizes in characters."""
    if fraction <= 0 or len(sizes) < 2:
        return set()
    budget = fraction * sum(sizes.values())
    chosen: set[bytes] = set()
    for digest in sorted(sizes, key=lambda content: hashlib.blake2b(_SALT + content).digest()):
        if sizes[digest] <= budget:
            chosen.add(digest)
            budget -= sizes[digest]
    return chosen or {min(sizes, key=lambda content: (sizes[content], content))}


def _cut_in_two(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text at a blank line near the place asked for, else at a line's end there, else just there."""
    cut = max(1, int(len(text) * (1 - fraction)))
    # Further away would hold out another share of the text than was asked for.
    nearest = cut - int(_NEAR * fraction * len(text))
    for end in ("\n\n", "\n"):
        place = text.rfind(end, max(0, nearest), cut)
        if place > 0:
            return text[: place + len(end)], text[place + len(end) :]
    return text[:cut], text[cut:]


def _load(path: str, field: str, cache_dir: Path) -> list[Dataset]:
    """Return the data sets behind one path, each with the one column `text`."""
    if path == PYDOC:
        from pydoc_data.topics import topics

        from datasets import Dataset

        return [Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})]
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    elif place.is_file():
        files = [place]
        if place.suffix not in _SUFFIXES:
            raise ConfigError(f"data.path={path} is a {place.suffix or 'nameless'} file; give {_WANTS}")
    elif path.startswith((".", "/", "~")) or path.endswith(_SUFFIXES) or path.count("/") > 1:
        raise ConfigError(f"data.path={path} does not exist; give {_WANTS}")
    else:
        return [_from_hub(path, field, cache_dir)]
    plain = [file for file in files if file.suffix == ".txt"]
    records = [file for file in files if file.suffix != ".txt" and file.stat().st_size]
    sets = [
        _generated(json_documents, cache_dir, file=str(file), field=field, stamp=_stamp([file]))
        if file.suffix == ".jsonl"
        else _from_parquet(file, field, cache_dir)
        for file in records
    ]
    if plain:
        texts = [str(file) for file in plain]
        # Written one by one: each may be as long as a book shelf.
        whole = {"files": texts, "stamp": _stamp(plain)}
        sets.insert(0, _generated(text_documents, cache_dir, writer_batch_size=1, **whole))
    return sets


def _generated(
    documents: Callable[..., Iterator[dict[str, str]]],
    cache_dir: Path,
    *,
    writer_batch_size: int | None = None,
    **source: Any,
) -> Dataset:
    """Return what a generator yields, from the cache if the files have not changed.

    Args:
        writer_batch_size: documents that are held in memory until they are written; None is the library's choice.
        source: arguments of the generator; `stamp`, which is not among them, tells the files' content from another.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _generate,
            features=Features({"text": Value("string")}),
            cache_dir=str(cache_dir),
            gen_kwargs={"documents": documents, **source},
            writer_batch_size=writer_batch_size,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError | OSError):
            raise error.__cause__ from None
        raise


def _generate(
    documents: Callable[..., Iterator[dict[str, str]]], stamp: object, **source: Any
) -> Iterator[dict[str, str]]:
    """Yield the documents; `stamp` is only part of the cache key of `datasets`, so that a changed file is read again."""
    yield from documents(**source)


def _stamp(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)]


def _from_parquet(file: Path, field: str, cache_dir: Path) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException, parquet

    options = {"data_files": [str(file)], "split": "train", "cache_dir": str(cache_dir)}
    try:
        # Only the text is copied into the cache, so its name is looked up first.
        _check_field(parquet.read_schema(file).names, field, file)
        dataset = load_dataset("parquet", columns=[field], **options)
    except (DatasetGenerationError, ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.path: {file} cannot be read as parquet: {error.__cause__ or error}"
        ) from error
    return _text_column(dataset, field, file)


def _from_hub(path: str, field: str, cache_dir: Path) -> Dataset:
    """Load the `train` split of a hub data set."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # whichever HTTP client the installed version raises from

    name, _, subset = path.partition(":")
    try:
        # Asked first because load_dataset retries for a minute when there is no network.
        HfApi().dataset_info(name, timeout=5)
    except OfflineModeIsEnabled:
        # The user said so; load_dataset then looks into its cache and fails at once.
        pass
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"data.path={path} is neither a local path nor a data set on the hub; give {_WANTS}"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"data.path={path} is not a local path, and the hub gave no answer ({error}); check the id and the network, "
            f"set HF_HUB_OFFLINE=1 to use a cached copy, or give {_WANTS}"
        ) from error
    try:
        dataset = load_dataset(name, subset or None, split="train", cache_dir=str(cache_dir))
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise ConfigError(f"data.path={path} cannot be loaded from the hub: {error}") from error
    return _text_column(dataset, field, path)


def _text_column(dataset: Dataset, field: str, source: Path | str) -> Dataset:
    """Reduce a data set to a column `text` in which every record is a string."""
    from datasets import Features, Value

    _check_field(dataset.column_names, field, source)
    kind = dataset.features[field]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ConfigError(f"data.text_field={field} must be a string in {source}, but is {kind}")
    if num_empty := dataset.data.column(field).null_count:
        raise ConfigError(
            f"data.text_field={field} is null in {num_empty} of the {len(dataset)} records of {source}"
        )
    column = dataset.select_columns([field])
    if field != "text":
        column = column.rename_column(field, "text")
    return column.cast(Features({"text": Value("string")}))


def _check_field(names: Sequence[str], field: str, source: Path | str) -> None:
    if field not in names:
        raise ConfigError(f"data.text_field={field} is not in {source}; its fields are {', '.join(names)}")


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Silence the bars of `datasets` on ranks that show none."""
    import datasets

    silenced = not show and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()
