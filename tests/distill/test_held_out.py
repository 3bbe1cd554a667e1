"""What is held out of a text: a share of it, by content alone."""

from __future__ import annotations

from datasets import Dataset

from distill.held_out import select_part


def _parts(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    documents = Dataset.from_dict({"text": texts})
    train = select_part(documents, part="train", held_out_fraction=fraction)
    held_out = select_part(documents, part="held_out", held_out_fraction=fraction)
    return list(train["text"]), list(held_out["text"])


def test_parts_share_nothing_and_lose_nothing() -> None:
    texts = [f"document {i} " * (1 + i % 7) for i in range(100)]
    train, held_out = _parts(texts, 0.1)
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    size = sum(map(len, texts))
    assert 0.08 * size < sum(map(len, held_out)) <= 0.1 * size
    assert train == [text for text in texts if text in set(train)]
    assert _parts(texts, 0.0) == (texts, [])


def test_the_split_depends_on_content_only() -> None:
    texts = [f"document {i}" for i in range(50)]
    assert set(_parts(texts[::-1], 0.2)[1]) == set(_parts(texts, 0.2)[1])
    # Another choice would judge students trained before on what they have read.
    assert _parts(texts[:6], 0.2)[1] == ["document 5"]


def test_equal_documents_stay_on_one_side() -> None:
    for name in "abcde":
        train, held_out = _parts([f"{name} {i % 20}" for i in range(200)], 0.3)
        assert held_out and not set(train) & set(held_out)


def test_few_documents_still_give_a_held_out_part() -> None:
    assert _parts(["a" * 50, "b" * 60], 0.1) == (["b" * 60], ["a" * 50])
    paragraphs = [f"Paragraph {i}.\n\n" for i in range(10)]
    assert _parts(["".join(paragraphs)], 0.15) == (["".join(paragraphs[:8])], ["".join(paragraphs[8:])])
    assert _parts(["x" * 100], 0.1) == (["x" * 90], ["x" * 10])
    # A blank line far from the place asked for would hold out another share.
    title, lines = "TITLE\n\n", "a line\n" * 100
    train, held_out = _parts([title + lines], 0.1)
    assert train[0] + held_out[0] == title + lines and train[0].endswith("\n")
    assert 0.1 <= len(held_out[0]) / len(title + lines) < 0.12
