"""Read the documents of a corpus.

Decides what one document is: a topic of `pydoc`, a .txt file, a record of JSONL, parquet or a hub data set. Reading is done by
`datasets`, whose Arrow files are memory-mapped: a corpus may be larger than memory. Assumes UTF-8. Does not tokenise.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import ConfigError, Data
from distill.convert import show
from distill.documents import json_documents, text_documents
from distill.failures import RunFailed

if TYPE_CHECKING:
    from datasets import Dataset

PYDOC = "pydoc"
_MISTAKES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What does not pass of itself."""
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
            has gone or may not be read.
        RunFailed: a file cannot be read here and now, or the hub gives no answer, which may pass.
    """
    try:
        return _read_documents(data, cache_dir, show_progress)
    except OSError as error:
        words = f"data.path: {error.filename or data.path} cannot be read ({error.strerror or error})"
        if isinstance(error, _MISTAKES):
            raise ConfigError(f"{words}; it must stay where it is while it is read") from error
        raise RunFailed(f"{words}; the same command tries again") from error


def _read_documents(data: Data, cache_dir: Path, show_progress: bool) -> Dataset:
    from datasets import concatenate_datasets

    paths = _paths(data)
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


def corpus_files(data: Data) -> list[tuple[str, int, int]] | None:
    """Return the files that `data.path` names, each with its size in bytes and the time of its last change in ns.

    The list is in the order in which they are read, with a line for where each entry of `data.path` ends. None: an entry is
    nothing on this disk, such as a hub data set, or cannot be looked at.
    """
    try:
        return _corpus_files(data)
    except OSError:
        return None


def _corpus_files(data: Data) -> list[tuple[str, int, int]] | None:
    found: list[tuple[str, int, int]] = []
    for path in _paths(data):
        if path == PYDOC:
            found.append((f"{PYDOC} {sys.version}", 0, 0))
        else:
            files = _files(Path(path).expanduser())
            if files is None:
                return None
            stamps = zip(files, _stamp(files), strict=True)
            found += [(str(file.resolve()), size, changed) for file, (size, changed) in stamps]
        found.append(("", 0, 0))
    return found


def skipped_line(data: Data) -> str:
    """Return a line about the files in folders of `data.path` whose suffix is not read; empty where there are none."""
    folders = (
        place for path in _paths(data) if path != PYDOC and (place := Path(path).expanduser()).is_dir()
    )
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


def _load(path: str, field: str, cache_dir: Path) -> list[Dataset]:
    """Return the data sets behind one path, each with the one column `text`."""
    if path == PYDOC:
        from pydoc_data.topics import topics

        from datasets import Dataset

        return [Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})]
    place = Path(path).expanduser()
    files = _files(place)
    if files is None:
        if path.startswith((".", "/", "~")) or path.endswith(_SUFFIXES) or path.count("/") > 1:
            raise ConfigError(f"data.path={path} does not exist; give {_WANTS}")
        return [_from_hub(path, field, cache_dir)]
    if files == [place] and place.suffix not in _SUFFIXES:
        raise ConfigError(f"data.path={path} is a {place.suffix or 'nameless'} file; give {_WANTS}")
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


def _paths(data: Data) -> list[str]:
    """Return the entries of `data.path`."""
    return [data.path] if isinstance(data.path, str) else list(data.path or ())


def _files(place: Path) -> list[Path] | None:
    """Return a file, or those of a folder that are read, in order; None where there is neither."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    return [place] if place.is_file() else None


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
        raise RunFailed(
            f"data.path={path} is not a local path, and the hub gave no answer ({error}); check the id and the network, "
            f"set HF_HUB_OFFLINE=1 to use a cached copy, or give {_WANTS}"
        ) from error
    try:
        dataset = load_dataset(name, subset or None, split="train", cache_dir=str(cache_dir))
    except (ValueError, FileNotFoundError, DatasetGenerationError) as error:
        raise ConfigError(f"data.path={path} cannot be loaded from the hub: {error}") from error
    except (httpx.HTTPError, OSError) as error:
        raise RunFailed(
            f"data.path={path} cannot be loaded from the hub now ({error}); the same command tries again"
        ) from error
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
