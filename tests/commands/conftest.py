"""Inputs and one finished run, made once for all tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import distill
from tests.commands.tiny_run import Inputs, call, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Two tiny teachers with a tokenizer, and a corpus."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def reference(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on one rank; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = call(distill.COMMAND, inputs.settings(folder))
    assert done.code == 0, done.err
    return folder
