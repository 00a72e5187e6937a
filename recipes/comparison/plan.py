"""The plan of a comparison; together with the chosen weights it determines the folder and Config of every run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

from comparison.methods import BUNDLED, DECAY, FINAL, FIRST_SEED, KNOWN, NETWORKS, NONE, TASKS, TUNING
from studies.jobs import Job, of_seeds
from training import flags, storage
from training.config import Config


@final
class Row(NamedTuple):
    """A method, alone or on top of the chosen weight decay."""

    method: str
    on_top: bool = False

    @property
    def slug(self) -> str:
        """The name of the row's folder."""
        return self.method.replace(":", "-") + ("+weight_decay" if self.on_top else "")


Weights = dict[Row, float]
"""The chosen weight of each row that has a choice."""


@final
@dataclass
class Plan:
    """A comparison, saved as plan.json in its folder."""

    command: str
    tasks: list[str]
    networks: list[str]
    """Empty with a configuration, which names its own network."""
    methods: list[str]
    grids: dict[str, list[float]]
    """The weights to choose from, for each method."""
    further: list[str]
    """Flags of train.py for every run."""
    versions: dict[str, str]
    seeds: int = 10
    tuning_seeds: int = 2
    on_top: bool = True
    costs: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Seconds of a step, a measurement and the start, by setting and method."""
    minutes: float = 0.0
    """Minutes that the comparison has run so far."""

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a saved plan.

        Raises:
            ValueError: if the folder holds no plan.
        """
        file = folder / "plan.json"
        try:
            return cls(**json.loads(storage.read(file)))
        except (OSError, ValueError, TypeError):
            raise ValueError(f"--resume: expected the folder of a comparison, but there is no {file}.") from None

    def save(self, folder: Path) -> None:
        """Write the plan."""
        storage.write(folder / "plan.json", json.dumps(asdict(self), indent=1) + "\n")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The fields that each task sets on each network."""
        if not self.networks:
            return {task: TASKS[task] for task in self.tasks}
        return {
            f"{task}-{network}": {**BUNDLED, **TASKS[task], **NETWORKS[network]}
            for task in self.tasks
            for network in self.networks
        }

    @property
    def rows(self) -> list[Row]:
        """The rows of the tables, with methods alone first."""
        alone = [Row(name) for name in self.methods]
        return alone + [Row(name, on_top=True) for name in self.methods if self.on_top and name not in (NONE, DECAY)]

    def grid(self, row: Row) -> list[float]:
        """Return the weights that a row may choose from."""
        return self.grids[row.method]

    def config(self, setting: str, row: Row) -> Config:
        """Return a configuration with a weight from the middle of the grid, to measure the cost of a step.

        Raises:
            ValueError: if no validation examples are held out.
        """
        grid = self.grid(row)
        config = self._config(setting, row, {row: grid[len(grid) // 2]} if grid else {}, FINAL)
        if not config.val_size:
            raise ValueError("--val_size: expected a number of validation examples, to choose weights by, got 0.")
        return config

    def tuning(self, folder: Path, setting: str, row: Row, weight: float, chosen: Weights) -> list[Job]:
        """Return the runs that evaluate a weight."""
        config = self._config(setting, row, {**chosen, row: weight}, TUNING)
        place = folder / setting / "tune" / row.slug / f"{weight:g}"
        return of_seeds(place, config, self.tuning_seeds)

    def final(self, folder: Path, setting: str, row: Row, chosen: Weights) -> list[Job]:
        """Return the final runs of a row, those in the tables."""
        config = self._config(setting, row, chosen, FINAL)
        return of_seeds(folder / setting / "final" / row.slug, config, self.seeds, FIRST_SEED)

    @property
    def runs(self) -> int:
        """The number of runs."""
        return len(self.settings) * sum(self._runs(row) for row in self.rows)

    def estimated_minutes(self, jobs: int) -> float:
        """Return the estimated duration of all runs, with ``jobs`` of them at a time."""
        seconds = 0.0
        for setting, costs in self.costs.items():
            config = self.config(setting, Row(NONE))
            measured = len(config.logged) * self.seeds
            for row in self.rows:
                cost = costs[row.method]
                seconds += self._runs(row) * (config.steps * cost["step"] + cost["start"]) + measured * cost["measure"]
        return seconds / 60 / jobs

    def _runs(self, row: Row) -> int:
        return len(self.grid(row)) * self.tuning_seeds + self.seeds

    def _config(self, setting: str, row: Row, weights: Weights, stage: dict[str, Any]) -> Config:
        decay = KNOWN[DECAY].at(weights[Row(DECAY)]) if row.on_top else {}
        own = KNOWN[row.method].at(weights.get(row))
        return flags.parse(Config, None, self.further, {**self.settings[setting], **decay, **own, **stage})[0]
