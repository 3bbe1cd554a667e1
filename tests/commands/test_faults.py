"""Every fault of `faults.py` ends as it is promised, and a run that goes on ends as the undisturbed one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.faults import FAULTS, Fault, ends_alike, undisturbed, wrong
from tests.commands.tiny_run import Inputs, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SAME_END = (
    *("kill-restart", "kill-plain", "kill-save", "kill-rounds"),
    *("full-disk", "cut-short", "flipped-bit", "wandb"),
)


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a fault."""
    return undisturbed(inputs, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_ends_as_promised(
    fault: Fault, inputs: Inputs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    outcome = fault.run(inputs, tmp_path / "run")
    assert wrong(fault, outcome) is None, f"{wrong(fault, outcome)}\n{outcome.out}\n{outcome.err}"
    if fault.name in SAME_END:
        assert ends_alike(outcome.folder, request.getfixturevalue("whole"))
    if fault.name == "nan":
        skipped = [line["optim/skipped_steps"] for line in metrics(outcome.folder)]
        assert skipped == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4]
