"""What a user may set of the student: `student.*`.

Decides names, types and defaults; the string below a field is what `--help` and the recipes say of it. Which values are
allowed, `distill.student_checks` knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prune:
    method: str = "activation"
    """How importance is scored: `activation` (over a calibration text), `l1` or `l2` (weights only), or `random` (a control)."""
    depth_method: str | None = None
    """How layers are scored: `block_influence`, `leave_one_out` (a forward pass for each layer) or `random`; null is what `method` gives."""
    pruning_ratio: float = 0.4
    """Share of the feed-forward channels to remove where no size and no `target_params` is set, also beside `low_rank` and `sparsity`; 0 removes none."""
    min_channels: int = 8
    """Fewest feed-forward channels a layer keeps."""
    num_layers: int | None = None
    """Layers to keep, the least influential dropped; null keeps all."""
    hidden_size: int | None = None
    """Target residual width; null keeps the teacher's."""
    intermediate_size: int | None = None
    """Target feed-forward width; null keeps the teacher's where another size is set, and else follows `pruning_ratio`."""
    num_attention_heads: int | None = None
    """Target number of query heads; null keeps the teacher's."""
    num_key_value_heads: int | None = None
    """Target number of key/value heads, whole query groups are cut; null keeps the teacher's."""
    layers: tuple[int, ...] | None = None
    """Indices of the teacher's layers to keep, in order; null lets `num_layers` choose."""
    per_layer: bool = False
    """Let each layer keep as many feed-forward channels and query groups as its scores say; targets are then means over the layers."""
    target_params: int | float | str | None = None
    """Most parameters of the student, as a number, `70M`, `0.5B`, or `50%` of the teacher's: searches the sizes that are left null."""
    candidates: int = 6
    """Shapes within `target_params` that are cut and judged on held-out text before one is taken."""
    calibration_rows: int = 32
    """Training rows of `data.seq_len` tokens, taken evenly from all, over which activations and losses without a layer are measured."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What is set of the sizes and the budget; `pruning_ratio` counts only where nothing is."""
        names = ("num_layers", "layers", "hidden_size", "intermediate_size", "num_attention_heads")
        values = {name: getattr(self, name) for name in (*names, "num_key_value_heads", "target_params")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Sparsity:
    method: str | None = None
    """Which weights of the linears in decoder layers are held at zero: those with the least `magnitude`, or by `wanda` (magnitude times how strongly the calibration text drives the input); null holds none."""
    pattern: str = "unstructured"
    """`unstructured`, or `2:4` (in YAML with quotes): two of each four neighbours along the input dim."""
    ratio: float = 0.5
    """Share of the weights that are held at zero in the end; `2:4` is 0.5."""
    schedule: str = "at_once"
    """How the share is reached: `at_once` before the first step, or rising `cubic` (fast, then slow) or `linear`."""
    steps: int | None = None
    """Optimizer steps over which the share rises with `cubic` and `linear`; null takes half of `train.steps`."""

    @property
    def share(self) -> float:
        """Share of the weights that are held in the end."""
        return 0.5 if self.pattern == "2:4" else self.ratio


@dataclass(frozen=True)
class LowRank:
    ratio: float | None = None
    """Share of each chosen matrix's parameters that its two factors keep; null leaves it to `params` or `energy`, all null factor nothing."""
    params: int | None = None
    """Parameters of the whole student, ranks shared out among the chosen matrices by their singular values; null as above."""
    energy: float | None = None
    """Share of each chosen matrix's squared singular values that its factors keep; null as above."""
    modules: str | tuple[str, ...] = "ffn"
    """Which linears: `ffn`, `attention`, or a list of names inside a layer such as mlp.down_proj."""
    layers: tuple[int, ...] | None = None
    """Indices of the student's layers; null takes all."""
    whiten: bool = True
    """Keep what a calibration text shows to matter (`student.prune.calibration_rows`); false looks at the weights alone."""

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be factored."""
        return any(wanted is not None for wanted in (self.ratio, self.params, self.energy))


@dataclass(frozen=True)
class Student:
    model: str | None = None
    """Hub id, local folder or GGUF file of a ready student; null prunes one out of the teacher."""
    prune: Prune = field(default_factory=Prune)
    """Shape of the pruned student."""
    sparsity: Sparsity = field(default_factory=Sparsity)
    """Weights that are held at zero through the training."""
    low_rank: LowRank = field(default_factory=LowRank)
    """Which of the student's linears become two of a low rank, before it is trained."""
