from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from launch.benchmarks._crew import run_jobs


def _begin() -> Callable[[str], int]:
    def run(job: str) -> int:
        if job == "fail":
            raise ValueError("no such thing\nas this")
        if job == "hang":
            time.sleep(600)
        ranks = torch.tensor(dist.get_world_size())
        dist.all_reduce(ranks)
        return int(ranks)

    return run


def test_a_job_that_fails_or_hangs_costs_its_own_result_and_no_process_is_left() -> None:
    before = set(multiprocessing.active_children())
    jobs = ["hang", "fail", "sum", "never"]
    answers = run_jobs(jobs, size=1, begin=_begin, limit_s=lambda job: 1 if job == "hang" else 60)
    assert next(answers) == ("hang", "no answer of rank 0 in 1 s")
    assert next(answers) == ("fail", "rank 0: ValueError: no such thing")
    assert next(answers) == ("sum", [1])
    assert len(multiprocessing.active_children()) == len(before) + 1
    answers.close()
    assert set(multiprocessing.active_children()) == before
