from __future__ import annotations

import pytest

from distill.budget import budget_of
from distill.config import ConfigError


@pytest.mark.parametrize(
    ("target", "expected"), [(7e7, 70_000_000), ("0.5B", 500_000_000), ("50%", 100), (9, 9)]
)
def test_a_budget_is_a_number_or_a_share(target: object, expected: int) -> None:
    assert budget_of(target, 200) == expected


@pytest.mark.parametrize("target", ["many", "100%", -3, "0M", "nan"])
def test_a_budget_that_is_none_is_refused(target: object) -> None:
    with pytest.raises(
        ConfigError, match=f"student.prune.target_params={target} must be a number of parameters"
    ):
        budget_of(target, 200)
