"""Make the tables and the curves of the study out of docs/study/results: `python docs/study/table.py`.

Prints the tables in Markdown and writes docs/study/{temperature,alpha,method,other}.svg. Needs matplotlib, which the project
itself does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

FOLDER = Path("docs/study")
BUDGETS = (50_176, 100_352, 200_704)
"""Training tokens (rows times their length) at which students are compared."""
STEP = 4 * 256
GROUPS = {
    "temperature": ("half-t1", "half", "half-t5", "half-hard"),
    "alpha": ("half-alpha0", "half", "half-alpha7", "half-hard"),
    "method": ("half", "half-l1", "half-random"),
    "other": ("half", "half-two-rounds", "half-hidden", "low-rank", "low-rank-plain", "two-of-four"),
}
"""Picture -> the students in it."""
NAMES = {
    "half": "T 2, alpha 0.3 (the recipes' default)",
    "half-hard": "hard labels only",
    "half-t1": "T 1",
    "half-t5": "T 5",
    "half-alpha0": "alpha 0 (soft loss only)",
    "half-alpha7": "alpha 0.7",
    "half-two-rounds": "two rounds, 75 % then 49 %",
    "half-l1": "cut by L1",
    "half-random": "cut at random",
    "half-hidden": "with the hidden-state term",
    "low-rank": "low rank, whitened",
    "low-rank-plain": "low rank, plain",
    "two-of-four": "2:4 sparse (Wanda)",
}
"""How a picture calls a student; others have their own names."""


def load() -> dict[str, dict[str, Any]]:
    """Return the results by name, in the order of `run.STUDENTS` as far as the names are known there."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((FOLDER / "results").glob("*.json"))}
    known = list(dict.fromkeys(name for group in GROUPS.values() for name in group))
    return dict(
        sorted(
            found.items(),
            key=lambda item: (item[0] not in known, known.index(item[0]) if item[0] in known else 0),
        )
    )


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of the student, the last one at each step."""
    by_step = {line["step"]: line for line in result["evaluations"] if line["model"] == "student"}
    return [by_step[step] for step in sorted(by_step)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return one row for each student and budget."""
    head = "| student | parameters | tokens | held-out loss | perplexity | KL to the teacher | agreement | gap closed |"
    rows = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, result in results.items():
        for line in judged(result):
            tokens = line["step"] * STEP
            if tokens and tokens not in BUDGETS and line is not judged(result)[-1]:
                continue
            closed = line.get("eval/gap_closed")
            rows.append(
                f"| {name} | {line['parameters'] / 1e6:.1f} M | {tokens:,} | {line['eval/loss']:.4f} | "
                f"{line['eval/perplexity']:,.1f} | {line['eval/kl']:.4f} | {line['eval/agreement']:.1%} | "
                f"{'' if closed is None else f'{closed:.1%}'} |"
            )
    return "\n".join(rows)


def draw(file: Path, results: dict[str, dict[str, Any]], names: tuple[str, ...]) -> None:
    """Draw held-out loss and KL over the tokens, one line a student, the teacher as a level."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), sharex=True)
    for name in names:
        if name not in results:
            continue
        lines = [line for line in judged(results[name]) if line["step"]]
        tokens = [line["step"] * STEP / 1000 for line in lines]
        for panel, key in zip(panels, ("eval/loss", "eval/kl"), strict=True):
            panel.plot(
                tokens, [line[key] for line in lines], marker="o", markersize=4, label=NAMES.get(name, name)
            )
    some = next(iter(results.values()))["evaluations"]
    level = next(line["eval/loss"] for line in some if line["model"] == "teacher")
    panels[0].axhline(level, color="0.4", linestyle="--", linewidth=1)
    panels[0].annotate(
        "teacher", (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
    )
    for panel, title in zip(
        panels, ("held-out loss, nats a token", "KL to the teacher, nats a token"), strict=True
    ):
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("training tokens, thousands")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Print the table and draw the pictures."""
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}
    results = load()
    print(table(results))
    for group, names in GROUPS.items():
        if any(name in results for name in names):
            draw(FOLDER / f"{group}.svg", results, names)


if __name__ == "__main__":
    main()
