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
import run

FOLDER = Path("docs/study")
LOSSES = ("half-hard", "half-t1", "half", "half-t5", "half-alpha0", "half-alpha7")
AGAIN = ("half-t1", "half", "half-t5", "half-alpha0", "half-alpha7")
TABLES = {
    "Temperature and alpha": (200_704, LOSSES),
    "Temperature and alpha, half of the tokens": (100_352, LOSSES),
    "Two orders of the rows": (100_352, tuple(name for one in AGAIN for name in (one, f"{one}-again"))),
    "Importance": (100_352, ("half", "half-l1", "half-random")),
    "Hidden states": (100_352, ("half", "half-hidden")),
    "75 % and 49 %": (100_352, ("wide", "wide-hard", "half", "half-hard")),
    "Low rank": (100_352, ("low-rank", "low-rank-plain")),
    "Two of every four weights at zero": (100_352, ("two-of-four", "wide", "low-rank")),
    "One cut or two rounds": (100_352, ("half", "half-two-rounds")),
    "Moments over a cut": (61_440, ("moments-kept", "moments-reset")),
}
"""Title -> training tokens (rows times their length) after which students are compared, and the students."""
DEFAULT = "the recipes' default: T 2, alpha 0.3"
HARD = "hard labels only"
PICTURES = {
    "temperature": {"half-t1": "T 1", "half": DEFAULT, "half-t5": "T 5", "half-hard": HARD},
    "alpha": {
        "half-alpha0": "alpha 0 (soft loss only)",
        "half": DEFAULT,
        "half-alpha7": "alpha 0.7",
        "half-hard": HARD,
    },
    "method": {"half": "cut by activation (default)", "half-l1": "cut by L1", "half-random": "cut at random"},
    "other": {
        "half": "20 layers, 576 channels (49 %)",
        "half-two-rounds": "the same in two rounds",
        "half-hidden": "with the hidden-state term",
        "low-rank": "low rank, whitened",
        "low-rank-plain": "low rank, plain",
        "two-of-four": "2:4 sparse (Wanda)",
        "wide": "896 channels (75 %)",
    },
}
"""Picture -> the students in it, and what it calls them."""


def load() -> dict[str, dict[str, Any]]:
    """Return the results that are there, by name, in the order of `run.STUDENTS`."""
    files = {name: FOLDER / "results" / f"{name}.json" for name in run.STUDENTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of the student in order, of its last round: the first one is the cut before training."""
    lines = [line for line in result["evaluations"] if line["model"] == "student"]
    last = max(line["round"] for line in lines)
    return [line for line in lines if line["round"] == last]


def table(results: dict[str, dict[str, Any]], names: tuple[str, ...], budget: int) -> str:
    """Return one row for each student that is there and was judged after `budget` tokens."""
    rows = [
        "| student | parameters | perplexity: cut | distilled | KL to the teacher | agreement | gap closed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        if name not in results:
            continue
        cut, *distilled = judged(results[name])
        for line in distilled:
            if line["step"] * run.STEP == budget:
                rows.append(
                    f"| {name} | {line['parameters'] / 1e6:.1f} M | {cut['eval/perplexity']:,.1f} | "
                    f"{line['eval/perplexity']:.2f} | {line['eval/kl']:.4f} | {line['eval/agreement']:.1%} | "
                    f"{line['eval/gap_closed']:.1%} |"
                )
    return "\n".join(rows)


def draw(file: Path, results: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """Draw held-out loss and KL over the tokens, one line a student, the teacher as a level."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), sharex=True)
    for name, label in names.items():
        if name not in results:
            continue
        # A second round's cut stands above the end of the first.
        lines = [line for line in results[name]["evaluations"] if line["model"] == "student" and line["step"]]
        tokens = [line["step"] * run.STEP / 1000 for line in lines]
        for panel, key in zip(panels, ("eval/loss", "eval/kl"), strict=True):
            panel.plot(tokens, [line[key] for line in lines], marker="o", markersize=4, label=label)
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
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Print the table and draw the pictures."""
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}
    results = load()
    for title, (budget, names) in TABLES.items():
        print(f"{title}, after {budget:,} tokens:\n\n{table(results, names, budget)}\n")
    for picture, names in PICTURES.items():
        if any(name in results for name in names):
            draw(FOLDER / f"{picture}.svg", results, names)


if __name__ == "__main__":
    main()
