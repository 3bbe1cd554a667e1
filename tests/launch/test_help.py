from __future__ import annotations

from distill.convert import known_keys
from launch.help import help_text, key_meanings


def test_help_lists_every_key_recipe_and_option() -> None:
    text = help_text("python -m launch.something", "does something")
    for word in (*known_keys(), "quickstart", "pydoc", "--cfg job", "--config-dir", "does something"):
        assert word in text
    assert "loss.temperature=2.0" in text and "student.model=null" in text


def test_meanings_are_those_of_the_settings() -> None:
    meanings = key_meanings()
    assert list(meanings) == known_keys()
    assert meanings["mesh.pp"] == "Pipeline stages."
