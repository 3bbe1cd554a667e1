"""Predict how long a step takes in a layout, or in every layout of a number of devices, and draw it.

Decides the keys of its own (`plan.*`), which layouts there are, the table, the picture and the JSON. With all costs given
it needs neither models nor torch and starts at once; costs that are left out are measured on this machine
(`launch.estimate`). The numbers and the advice are `launch.forecast`'s.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distill.checks import check_config
from distill.config import Config, ConfigError, MeshShape
from distill.convert import flatten
from distill.rounds import rounds_of
from launch.command import run_alone
from launch.config import compose_config, config_text, parse_command_line, parse_options
from launch.forecast import WAYS, Forecast, Job, Layout, forecast
from launch.help import help_text
from launch.plan_options import KEYS, Options, given_costs, read_options
from launch.report import table
from parallel.pipeline.simulate import Costs
from parallel.pipeline.trace import to_ascii, to_svg

USAGE = "python -m launch.plan [experiment=NAME] [KEY=VALUE ...] [plan.KEY=VALUE ...]"
ABOUT = "predict the step time, bubble and queue of a layout, with the teacher inline, before the batch, and in the bubbles"
EXAMPLE = (
    "mesh.pp=8 train.global_batch_size=16 plan.costs.forward=1 plan.costs.backward=2 plan.costs.teacher=4"
)
_NOTHING = Costs(0.0, 0.0, 0.0)
_SHOWN = 5
"""Layouts that do not fit, of which the reason is printed."""


def plan(arguments: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: a mistake of the user.
    """
    own = [each for each in arguments if each.partition("=")[0].split(".")[0] == "plan"]
    line = parse_command_line([each for each in arguments if each not in own])
    if line.shows == "help":
        print(_help())
        return
    values = flatten(parse_options(own))
    options = read_options(values)
    config = compose_config(line)
    if line.shows == "config":
        print(config_text(config) + (yaml.safe_dump(values, sort_keys=False) if values else ""), end="")
        return
    # No round at all is refused below.
    config, *later = rounds_of(config) or (config,)
    missing = options.missing_costs(needs_teacher=config.needs_teacher)
    if missing and config.teacher.model is None:
        raise ConfigError(
            f"{', '.join(missing)} must be given, because teacher.model=null names no model to measure; see --help"
        )
    cases, left_out = layouts(config, options, needs=("teacher.model",) if missing else ())
    if missing:
        # Imported late: torch takes seconds, and costs that are given need none.
        from launch.estimate import measured_jobs

        jobs, notes, more_left_out = measured_jobs(config, cases, options)
        left_out |= more_left_out
    else:
        jobs, notes = given_jobs(config, cases, options)
    if later:
        notes.append("The plan is the first round's; a run makes another for each.")
    found = sorted(((job, _forecast(job)) for job in jobs), key=lambda each: _order(each[1]))
    _show(found, [*notes, *_left_out_lines(left_out)], drawn=options.devices is None)
    _write(found, options)


def layouts(config: Config, options: Options, *, needs: Sequence[str]) -> tuple[list[Config], dict[str, str]]:
    """Return checked settings for each layout that they fit, `mesh.dp` filled in, and why others do not fit.

    Raises:
        ConfigError: no layout fits.
    """
    mesh = config.mesh
    if options.devices is None:
        size = mesh.pp * mesh.tp * max(1, mesh.dp)
        return [check_config(config, world_size=size, needs=needs)], {}
    fitting, left_out = [], {}
    # Lists of layers belong to one number of stages.
    free = replace(config.pipeline, student_layers=None, teacher_layers=None)
    for shape in _shapes(options.devices):
        case = replace(config, mesh=shape, pipeline=free)
        try:
            fitting.append(check_config(case, world_size=options.devices, needs=needs))
        except ConfigError as error:
            left_out[f"pp {shape.pp} dp {shape.dp} tp {shape.tp}"] = str(error)
    if not fitting:
        raise ConfigError(next(iter(left_out.values())))
    return fitting, left_out


def _shapes(num_devices: int) -> list[MeshShape]:
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    return [
        MeshShape(pp=pp, dp=num_devices // (pp * tp), tp=tp)
        for pp in sizes
        for tp in sizes
        if num_devices % (pp * tp) == 0
    ]


def given_jobs(config: Config, cases: Sequence[Config], options: Options) -> tuple[list[Job], list[str]]:
    """Return the jobs whose costs are all given, and what to tell about them.

    Args:
        config: the settings whose mesh the costs belong to.
        cases: a layout each.
    """
    jobs = []
    for case in cases:

        def costs_with(num_slices: int, case: Config = case) -> Costs:
            return given_costs(_NOTHING, options, config.mesh, case, num_slices)

        jobs.append(
            Job(
                layout=Layout.of(case),
                schedule=case.pipeline.schedule,
                virtual_stages=case.pipeline.virtual_stages,
                costs_with=costs_with,
                has_teacher=case.needs_teacher,
                num_slices=options.slices or case.pipeline.slices,
                microbatch_size=case.train.microbatch_size,
            )
        )
    notes = ["Costs are those given, in seconds a stage and micro-batch."]
    if options.devices is not None:
        notes.append(
            f"They are taken as those of pp {config.mesh.pp} tp {config.mesh.tp}; in other layouts a rank has its share of "
            "them. Uneven layers, and what tp and dp communicate, are not in the figures."
        )
    return jobs, notes


def _order(found: Forecast) -> tuple[float, int, int]:
    """Return what layouts are sorted by: the time of the filled step; of equal ones what communicates less is first."""
    return _rounded(found.step_s["fill"]), found.layout.tp, found.layout.pp


def _forecast(job: Job) -> Forecast:
    try:
        return forecast(job)
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"plan.costs: {error}; use seconds of one order of magnitude") from error


def _show(found: Sequence[tuple[Job, Forecast]], notes: Sequence[str], *, drawn: bool) -> None:
    """Print the table, the advice for the fastest layout, its filled step and the notes."""
    print(table([_row(job, each) for job, each in found]), end="\n\n")
    best = found[0][1]
    if len(found) > 1:
        print(f"Fastest when filled: {best.layout}.")
    for sentence in best.advice:
        print(textwrap.fill(sentence, 110, initial_indent="- ", subsequent_indent="  "))
    if drawn:
        print(f"\nOne step of the steady state, {_way_drawn(best)}:")
        print(to_ascii(best.timelines["fill"]), end="")
    print()
    for note in notes:
        print(textwrap.fill(note, 110, subsequent_indent="  "))
    sys.stdout.flush()


def _way_drawn(best: Forecast) -> str:
    if not best.fills:
        return "which nothing fills"
    return f"the teacher in {best.num_slices} slice{'s' if best.num_slices > 1 else ''} filling the idle time"


def _row(job: Job, found: Forecast) -> dict[str, Any]:
    row = {
        "layout": str(found.layout),
        "micro-batches": found.layout.num_microbatches,
        **{f"{way} s": found.step_s[way] for way in WAYS},
        **{f"{way} idle %": round(100 * found.bubble_fraction[way], 1) for way in WAYS},
        "gain": f"{found.gain:.2f}x",
        "slices": found.num_slices,
    }
    num_bytes = queue_bytes(job, found)
    if num_bytes is None or job.state_bytes is None:
        return {**row, "queue": found.queue_tensors}
    return {**row, "queue MB": round(num_bytes / 1e6, 2), "state GB": round(job.state_bytes / 1e9, 2)}


def queue_bytes(job: Job, found: Forecast) -> int | None:
    """Return the bytes of what waits; None where only costs are known."""
    return None if job.bytes_a_tensor is None else found.queue_tensors * job.bytes_a_tensor


def result(job: Job, found: Forecast) -> dict[str, Any]:
    """Return what `plan.out` holds for one layout."""
    layout, whole = found.layout, job.costs_with(1)
    costs = {
        "forward": whole.forward,
        "backward": _sum(whole.backward_input, whole.backward_weight),
        "teacher": whole.teacher_slice,
        "latency": whole.latency,
        "step_end": _sum(whole.norm, whole.step),
    }
    return {
        "pp": layout.pp,
        "dp": layout.dp,
        "tp": layout.tp,
        "num_microbatches": layout.num_microbatches,
        "ideal_s": _rounded(found.ideal_s),
        "bound_s": _rounded(found.bound_s),
        "step_s": _rounded(found.step_s),
        "bubble_fraction": _rounded(found.bubble_fraction),
        "queue_bytes": queue_bytes(job, found),
        "advice": " ".join(found.advice),
        "queue_tensors": found.queue_tensors,
        "slices": found.num_slices,
        "state_bytes": job.state_bytes,
        "costs": _rounded(costs),
        "student_layers": job.student_layers,
        "teacher_layers": job.teacher_layers,
    }


def _sum(left: Any, right: Any) -> Any:
    """Add costs that are each a number or one entry a stage."""
    if isinstance(left, Sequence) and isinstance(right, Sequence):
        return [a + b for a, b in zip(left, right, strict=True)]
    if isinstance(left, Sequence) or isinstance(right, Sequence):
        many, one = (left, right) if isinstance(left, Sequence) else (right, left)
        return [each + one for each in many]
    return left + right


def _rounded(value: Any) -> Any:
    """Cut off the digits that are the arithmetic's."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [_rounded(each) for each in value]
    return float(f"{value:.9g}")


def _left_out_lines(left_out: dict[str, str]) -> list[str]:
    lines = [f"Left out, {layout}: {reason}" for layout, reason in list(left_out.items())[:_SHOWN]]
    rest = len(left_out) - len(lines)
    return [*lines, f"... and {rest} more that do not fit."] if rest else lines


def _write(found: Sequence[tuple[Job, Forecast]], options: Options) -> None:
    """Write the files that are asked for.

    Raises:
        ConfigError: a file cannot be written.
    """
    rows = [result(job, each) for job, each in found]
    best = found[0][1]
    files: dict[str, tuple[Path | None, Any]] = {
        "plan.out": (
            options.out,
            lambda: json.dumps(rows if options.devices is not None else rows[0], indent=2) + "\n",
        ),
        "plan.svg": (options.svg, lambda: to_svg({f"teacher {way}": best.timelines[way] for way in WAYS})),
    }
    for key, (path, text) in files.items():
        if path is None:
            continue
        try:
            path.write_text(text(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{key}={path} cannot be written ({error.strerror}); use another file"
            ) from error
        print(f"written: {path}", flush=True)


def _help() -> str:
    lines = [help_text(USAGE, ABOUT), "", "Keys of this command:"]
    for key, meaning in KEYS.items():
        lines.append(f"  {key}")
        lines += textwrap.wrap(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += [
        "",
        "Costs that are left out are measured on this machine with the models' shapes and random weights.",
    ]
    lines += [f"Without models: python -m launch.plan {EXAMPLE}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_alone(plan))
