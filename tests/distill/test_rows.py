from __future__ import annotations

from types import SimpleNamespace

import pytest

from distill.rows import _tell_share


@pytest.mark.parametrize(
    ("held_out", "sources", "said"),
    [
        (10, (90,), ""),
        (4, (60, 36), "warning: 4 of 100 tokens are held out (4.00%)"),
        (30, (70,), "warning: 30 of 100"),
    ],
)
def test_a_share_far_from_the_one_asked_for_is_told(
    held_out: int, sources: tuple[int, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [SimpleNamespace(num_tokens=count) for count in (held_out, *sources)]
    _tell_share(rows[0], rows[1:], 0.1)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)
