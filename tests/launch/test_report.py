from __future__ import annotations

from pathlib import Path

from launch.report import judged_table, run_report, table


def test_table_is_markdown_with_numbers_to_the_right() -> None:
    rows = [
        {"model": "teacher", "parameters": 134515008, "perplexity": 14.6123, "agreement": None},
        {"model": "pruned", "parameters": 101_000_000, "perplexity": 5.1e7, "agreement": 0.51},
    ]
    assert table(rows).splitlines() == [
        "| model   |  parameters | perplexity | agreement |",
        "| ------- | ----------: | ---------: | --------: |",
        "| teacher | 134,515,008 |      14.61 |         - |",
        "| pruned  | 101,000,000 | 51,000,000 |      0.51 |",
    ]


def test_a_table_of_judged_models_has_a_column_for_all_that_any_was_judged_by() -> None:
    rows = [
        {"model": "teacher", "loss": 2.0},
        {"model": "student", "loss": 3.0, "choices/t/accuracy": 0.5, "choices/t/accuracy_stderr": 0.1},
    ]
    assert judged_table(rows).splitlines() == [
        "| model   | loss | choices/t/accuracy |",
        "| ------- | ---: | -----------------: |",
        "| teacher |    2 |                  - |",
        "| student |    3 |                0.5 |",
    ]


def test_report_names_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "curve.svg").touch()
    report = run_report({"table": [{"model": "teacher"}]}, tmp_path)
    assert "| teacher |" in report and f"curve:      {tmp_path / 'curve.svg'}" in report
    assert "timeline" not in report
    assert run_report({}, tmp_path).startswith("curve:")
