"""The settings of a run, as frozen dataclasses whose field names are the keys a user types.

Decides: names, types and defaults, each with its meaning in the string below it (`--help` and the comments in
`recipes/` repeat these strings). Assumes nothing: no torch, no YAML, no Hydra. What may change over the steps is
`distill.annealing`, what the student may be `distill.student_config`. Does not judge values; that is `distill.checks`.
`distill.convert` builds a `Config` from plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distill.annealing import Ramp, Stages, extremes, value_at
from distill.student_config import Student

_LONGEST = 1500
"""Characters of a message; of a longer one the middle, where a value is, is left out."""


class ConfigError(ValueError):
    """A mistake of the user: the message names the key, its value, and what would be right; it is always one line."""

    def __init__(self, message: str) -> None:
        """Take the message, with `\\n` for a line feed and the like, whatever a user has typed or a library has said."""
        line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 3]} ... {line[-_LONGEST // 3 :]}"
        super().__init__(line)


@dataclass(frozen=True)
class Teacher:
    model: str | None = None
    """Hub id, local folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct out of a PyPI wheel); in a later round also `previous` or `round-N`, an earlier round's student."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off unless set here."""


@dataclass(frozen=True)
class Hidden:
    weight: float | Ramp | Stages = 0.0
    """Weight of the distance between hidden states, added to the loss: its mean over the mapped layers; 0 or more, 0 is off. A number, or a mapping as for `temperature`."""
    kind: str = "mse"
    """`mse` = |P h_s - h_t|^2 / |h_t|^2 of each token, so that all layers count alike, or `cosine` = 1 - cos(P h_s, h_t)."""
    every: int = 4
    """Each n-th layer of the student, counted from the last, is compared with its counterpart."""
    layers: tuple[tuple[int, int], ...] | None = None
    """Pairs [student's layer, teacher's layer] to compare in place of `every`; null takes the layer that a student's layer was cut from, else the one of the same relative depth."""
    projection: str = "learned"
    """What brings the student's width to the teacher's: `learned` = a matrix P for each mapped layer, trained with the student and then dropped; `none` compares the channels themselves, of which a pruned student has some."""

    @property
    def is_on(self) -> bool:
        """Whether the weight is above 0 at any step."""
        return max(extremes(self.weight)) > 0


@dataclass(frozen=True)
class Loss:
    kind: str = "forward_kl"
    """Soft loss by its formula, p the teacher and q the student: `forward_kl` = KL(p || q), `reverse_kl` = KL(q || p), `jsd` = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, `skew_kl` = KL(p || skew p + (1 - skew) q), `tvd` = sum |p - q| / 2, `top_k_kl` = KL over the teacher's `top_k` most likely ids and all others as one."""
    temperature: float | Ramp | Stages = 2.0
    """Softens both sides of the soft loss, which is scaled by its square; > 0. A number, or over the steps of a round `{kind: linear, start: 4, end: 1}`, `{kind: cosine, start: 4, end: 1}` or `{kind: steps, values: {0: 4, 100: 2}}` (from that step on, counted from 0)."""
    alpha: float | Ramp | Stages = 0.3
    """Weight of the hard loss (cross-entropy on the labels), 0 to 1; the soft loss gets the rest. A number, or a mapping as for `temperature`."""
    beta: float = 0.5
    """Weight of the teacher in `jsd`, 0.001 to 0.999; low leans to `forward_kl`, high to `reverse_kl`."""
    skew: float = 0.1
    """Weight of the teacher in the mixture of `skew_kl`, 0.001 to 0.999; low leans to `forward_kl`."""
    top_k: int = 64
    """Ids that `top_k_kl` tells apart, the teacher's most likely ones; fewer than the vocabulary has."""
    hidden: Hidden = field(default_factory=Hidden)
    """A further term: the student's hidden states against the teacher's."""

    def at(self, step: int, num_steps: int) -> Loss:
        """Return the settings of step `step` (from 0) of a round of `num_steps`, with numbers for what changes."""
        temperature, alpha = (value_at(each, step, num_steps) for each in (self.temperature, self.alpha))
        hidden = replace(self.hidden, weight=value_at(self.hidden.weight, step, num_steps))
        return replace(self, temperature=temperature, alpha=alpha, hidden=hidden)


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
    """Pieces a rank's teacher forward is cut into, at most as many as a stage of it has layers; null chooses about one student forward each."""
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
    """File (.txt, .jsonl, .parquet), folder of them, hub data set id (`owner/name` or `owner/name:subset`, of which the split `train` is read), `pydoc` (the reference text inside every Python), or a list of these."""
    weights: tuple[float, ...] | None = None
    """Shares of the training rows that come from each entry of the list `path`, in any unit; null takes all text as it is."""
    text_field: str = "text"
    """Column that holds the text in JSONL, parquet and hub data sets."""
    seq_len: int = 512
    """Tokens in one row."""
    split_sentences: bool = True
    """Cut long text at sentence boundaries inside the token budget instead of anywhere."""
    held_out_fraction: float = 0.1
    """Share of the text (whole documents) kept out of training and used for evaluation."""
    cache_dir: str = "cache"
    """Folder, shared by all machines, of fetched and converted models, Arrow files, packed rows, scores and the teacher's judgements."""


@dataclass(frozen=True)
class Train:
    global_batch_size: int = 32
    """Rows of `data.seq_len` tokens in one optimizer step over the whole mesh."""
    microbatch_size: int = 1
    """Rows in one micro-batch; micro-batches per pipeline = global_batch_size / (dp * microbatch_size)."""
    steps: int = 1000
    """Optimizer steps of a round."""
    tokens: int | None = None
    """Tokens of a round, in place of `steps`: as many steps as that takes with every position of every row filled."""
    seed: int = 0
    """Seed of the order of the data and of every random number; what is held out does not depend on it."""
    dtype: str = "bfloat16"
    """Type of weights and activations in the forward pass: `bfloat16`, `float32` or `float64`."""
    recompute: str = "none"
    """What backward computes again instead of keeping: `none`, `selective` (all but the linears) or `full` (each layer)."""
    compile: bool = False
    """Run what lies between the parallel layers through torch.compile (on a CPU it needs a C++ compiler)."""
    timeout_s: float = 600.0
    """Seconds a rank waits for another, while none gets further, before the run is ended."""
    max_skipped_steps: int = 10
    """Steps in a row that change nothing because a loss or a gradient is not finite, at which the run is ended."""


@dataclass(frozen=True)
class Optimizer:
    engine: str = "torch"
    """Who reduces gradients and updates the weights: `torch` (ours), or `deepspeed` (its ZeRO optimizer under our tensor and pipeline parallelism; `bash launch/install.sh deepspeed` installs it)."""
    name: str = "adamw"
    """Rule of the update: `adamw`, `adam`, `radam`, `adamax`, `adagrad`, `rmsprop`, `sgd`, or `adamw8bit` (bitsandbytes' 8-bit moments)."""
    zero_stage: int = 1
    """What data-parallel replicas share out: 0 nothing, 1 masters and the rule's state, 2 the reduced gradients too (`deepspeed` only)."""
    offload: bool = False
    """Keep masters and the rule's state in the CPU's memory (`deepspeed` only)."""
    lr: float = 1.0e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Weight decay, decoupled from the gradient in `adamw` and `adamw8bit`, added to it in the others; norms and biases are left out."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment in the rules named after Adam; `rmsprop` takes the second."""
    eps: float = 1.0e-8
    """Floor of the denominator; `sgd` has none."""
    momentum: float = 0.9
    """Momentum of `sgd` and `rmsprop`."""
    clip: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: `cosine`, `linear` or `constant`."""
    min_lr_ratio: float = 0.1
    """Share of `lr` that `cosine` and `linear` decay to; the step after the last one would reach it."""
    moments: str = "keep"
    """What a round does with the rule's state of the round before: `keep` (cut like the weights) or `reset`."""


@dataclass(frozen=True)
class Gate:
    stop_if: float | None = None
    """The run ends after a round whose held-out gap (student's loss less the teacher's, nats per token) is above this."""
    repeat_until: float | None = None
    """A round is trained again, its learning rate from the start, until its held-out gap is at most this."""
    repeats: int = 3
    """Trainings of a round, at most, while `repeat_until` is not reached."""


@dataclass(frozen=True)
class Checkpoint:
    every: int = 100
    """Steps between checkpoints; 0 saves at the end and on Ctrl-C only."""
    keep: int = 3
    """Newest checkpoints that are kept; the oldest goes when the newest is complete."""
    resume: str = "auto"
    """`auto` continues the newest sound checkpoint of `run.dir`, `none` starts anew, a folder continues that checkpoint."""


@dataclass(frozen=True)
class Log:
    every: int = 1
    """Steps between lines on the terminal; `metrics.jsonl` gets every step."""
    wandb: str = "offline"
    """Weights & Biases: `offline`, `online` or `disabled`."""
    wandb_project: str = "reflux"
    """Project name the run gets there."""
    health_port: int | None = None
    """Port on which rank 0 answers `/healthz` (200, or 503 without progress) and `/metrics` (Prometheus); 0 takes a free one and says it, null opens none."""
    health_host: str = "127.0.0.1"
    """Address at which that port is opened. Whoever reaches it may ask, so it is this machine's own unless set: 0.0.0.0 for all of its addresses, or one of them."""
    health_limit_s: float = 600.0
    """Seconds without a sign of progress after which `/healthz` answers 503: a step, the begin of another phase (loading, pruning, judging), an action inside it, or processor time where work makes no such marks (a download, tokenising)."""


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
    """Held-out rows that are scored, at most; taken evenly from all of them."""
    choices: tuple[str, ...] = ()
    """JSONL files of multiple-choice questions (lines with `question`, `choices`, `answer`), judged before the first and after the last step."""
    choices_template: str = r"Question: {question}\nAnswer:"
    """Prompt of a question, `{question}` is replaced by it and `\\n` is a line feed; the choice follows after a space."""
    lm_eval: tuple[str, ...] = ()
    """Tasks that lm_eval judges the finished student's folder by: its own names, a task's .yaml file, or a folder of them."""
    out: str | None = None
    """JSON file into which `launch.evaluate` writes its table; null writes none."""


@dataclass(frozen=True)
class Export:
    low_rank: str = "merged"
    """Factored linears in the exported student: `merged` (one matrix, a plain folder) or `factored` (kept, with a modelling file)."""


@dataclass(frozen=True)
class Config:
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    loss: Loss = field(default_factory=Loss)
    rounds: tuple[Mapping[str, Any], ...] = ({},)
    """One entry a round, with what differs in it from the run's other keys (not from the round before): `student`, `loss`, `teacher`, `data`, `gate`, `train.steps`, learning rate ..."""
    mesh: MeshShape = field(default_factory=MeshShape)
    pipeline: Pipeline = field(default_factory=Pipeline)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    gate: Gate = field(default_factory=Gate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher at any step."""
        return min(extremes(self.loss.alpha)) < 1 or self.loss.hidden.is_on

    @property
    def num_microbatches(self) -> int:
        """Micro-batches each pipeline runs in one step; `mesh.dp` must be filled in."""
        assert self.mesh.dp > 0, f"mesh.dp={self.mesh.dp} is not filled in; see checks.fill_mesh"
        return self.train.global_batch_size // (self.mesh.dp * self.train.microbatch_size)
