"""The cost of a training step, measured for several configurations side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from studies.jobs import threads
from training import loop
from training.config import Config

STEPS, ROUNDS = 30, 5


def of(configs: Mapping[str, Config], jobs: int) -> dict[str, dict[str, float]]:
    """Return the seconds of an optimizer step, a measurement, and the start, for each configuration.

    The configurations alternate in rounds of steps; the time of a step is the median over rounds. No file is written.

    Args:
        configs: configurations of one task and network, by name.
        jobs: the number of runs at a time, which share the processors.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads(jobs))
    runs: dict[str, loop.Run] = {}
    starts: dict[str, float] = {}
    measures: dict[str, float] = {}
    for name, config in configs.items():
        starts[name] = _seconds(lambda name=name, config=config: runs.update({name: loop.prepare(config)}))
        measures[name] = _seconds(lambda run=runs[name]: run.measurements(Path(), 0))
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            rounds[name].append(_seconds(lambda run=run: _steps(run)) / STEPS)
    torch.set_num_threads(before)
    return {
        name: {"step": statistics.median(rounds[name][1:]), "measure": measures[name], "start": starts[name]}
        for name in runs
    }


def _steps(run: loop.Run) -> None:
    run.model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(run.loader))  # epoch after epoch
    for step, (x, y) in zip(range(STEPS), batches, strict=False):
        loop.advance(run, step, x, y)


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
