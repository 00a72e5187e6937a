"""What a training step of several configurations costs, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from studies.jobs import threads
from training import loop
from training.config import Config

STEPS, ROUNDS = 30, 5


class _Timed(NamedTuple):
    run: loop.Run
    batches: Iterator[Any]
    start: float


def of(configs: Mapping[str, Config], jobs: int) -> dict[str, dict[str, float]]:
    """Return seconds of an optimizer step, of a measurement, and of the start, of each configuration.

    Rounds of steps of all configurations take turns; a step is the median over rounds. Nothing is written.

    Args:
        configs: by name, of one network and task.
        jobs: how many runs there will be at a time: each has its share of the processors.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads(jobs))
    timed = {name: _prepared(config) for name, config in configs.items()}
    measures = {name: _seconds(lambda one=one: one.run.measurements(Path(), 0)) for name, one in timed.items()}
    rounds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS + 1):
        for name, one in timed.items():
            rounds[name].append(_seconds(lambda one=one: _advance(one)) / STEPS)
    torch.set_num_threads(before)
    return {
        name: {"step": statistics.median(rounds[name][1:]), "measure": measures[name], "start": timed[name].start}
        for name in timed
    }


def _prepared(config: Config) -> _Timed:
    start = time.perf_counter()
    run = loop.prepare(config)
    return _Timed(run, _forever(run.loader), time.perf_counter() - start)


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _advance(one: _Timed) -> None:
    one.run.model.train()
    for step in range(STEPS):
        x, y = next(one.batches)
        loop.advance(one.run, step, x, y)


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
