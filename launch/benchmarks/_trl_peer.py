"""The TRL side of the benchmark `step`, run by the Python of TRL's own virtual environment.

Imports nothing of this project. Reads one JSON object from the command line, trains with one of TRL's trainers, and
answers on stdout with a JSON line for each optimizer step; before each it waits for a line on stdin, so that the sides
can take turns. Timed is what lies between the trainer's own `on_step_begin` and `on_step_end` (forward, backward,
clipping, optimizer), not the loading of data nor logging.

`gkd`: `GKDTrainer`, lmbda 0, beta 0, the whole logits of both models. Its loss takes no temperature: 1 always.
`distillation`: `DistillationTrainer`, beta 0, the stable API, with a chunked loss. It always generates its completions;
here it gets the rows instead (first token as the prompt, the rest as the completion), which costs it nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return the least that a trainer takes for a tokenizer; no text is tokenised."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([example["input_ids"] for example in examples])
    labels = input_ids.clone()
    # Nothing predicts a row's first token; left in, it would be counted in the denominator.
    labels[:, 0] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class _GivenRows(DistillationTrainer):
    """Takes each row as if the student had generated it."""

    rows: list[list[int]]

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        chosen = [self.rows[int(prompt)] for prompt in prompts]
        return [row[:1] for row in chosen], [row[1:] for row in chosen], None, None, None


class _Turns(TrainerCallback):
    """Waits for its turn, times the step, reports when its loss is known."""

    def __init__(self, answers: TextIO, base_bytes: int) -> None:
        self.answers, self.base_bytes = answers, base_bytes
        self.report: dict[str, float] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        sys.stdin.readline()
        Path("/proc/self/clear_refs").write_text("5")
        self.start_s = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.report = {
            "seconds": time.perf_counter() - self.start_s,
            "peak_bytes": _status_bytes("VmHWM") - self.base_bytes,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            print(json.dumps(self.report | {"loss": float(logs["loss"])}), file=self.answers, flush=True)


def _settings(job: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """Return the training arguments that both trainers share."""
    return {
        "output_dir": output_dir,
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["microbatch"],
        "gradient_accumulation_steps": job["rows"] // job["microbatch"],
        "gradient_checkpointing": job["recompute"] == "full",
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
    }


def _trainer(job: dict[str, Any], output_dir: str, turns: _Turns) -> GKDTrainer | DistillationTrainer:
    dtype = getattr(torch, job["dtype"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[which], dtype=dtype) for which in ("student", "teacher")
    )
    teacher.requires_grad_(False)
    rows = load_file(job["data"])["rows"].tolist()
    common = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": _tokenizer(),
        "callbacks": [turns],
    }
    if job["trainer"] == "gkd":
        return GKDTrainer(
            args=GKDConfig(lmbda=0.0, **_settings(job, output_dir)),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            data_collator=_collate,
            **common,
        )
    trainer = _GivenRows(
        args=DistillationConfig(
            temperature=job["temperature"], shuffle_dataset=False, **_settings(job, output_dir)
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(rows))]}),
        **common,
    )
    trainer.rows = rows
    return trainer


def main() -> None:
    """Run the job that the command line describes."""
    # Whatever else writes to stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    turns = _Turns(answers, _status_bytes("VmRSS"))
    with tempfile.TemporaryDirectory() as output_dir:
        _trainer(job, output_dir, turns).train()


if __name__ == "__main__":
    main()
