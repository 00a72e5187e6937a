"""Flags as fields of a frozen dataclass: read from the command line, from a file, or from an earlier run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import _checkpoint
import _data
import _files
import _models
import _sets
import _words
import yaml

C = TypeVar("C", bound="Common")
FREE = ("output_dir", "max_steps")
"""Flags that a run which goes on may have otherwise."""
LARGEST = 2**63 - 1
"""The largest whole number that torch takes."""


def flag(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float = math.inf,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Return a field with what ``--help`` says of it and the values that it may have."""
    bounds = {"help": text, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=bounds)


@dataclass(frozen=True)
class Common:
    """What every recipe that trains a network on data can be told; saved with the run."""

    dataset: str = flag("digits", "what to train on", choices=_data.DATASETS)
    data_path: str | None = flag(None, "folder of the image data set; the Hub is asked by default")
    train_size: int = flag(0, "training examples; 0 for all that are not held out", least=0)
    val_size: int = flag(0, "others of the training split, held out to choose by", least=0)
    label_noise: float = flag(0.0, "share of the training labels that are redrawn uniformly", least=0, most=1)
    mix: str | None = flag(None, "data set to add training examples of", choices=_data.DATASETS)
    mix_size: int = flag(0, "how many", least=0)
    mix_path: str | None = flag(None, "folder of that data set")
    augment: bool = flag(False, "cut images out of a margin of 4 pixels, and mirror half of them, at every step")
    model: str = flag("mlp", "the network", choices=tuple(_models.WIDTHS))
    hidden: int = flag(
        0, "units, channels of the first stage, or size of the embedding; 0 for its own", least=0, most=10**9
    )
    depth: int = flag(0, "layers (mlp, cnn) or blocks (transformer); 0 for its own", least=0, most=10**4)
    batch_norm: bool = flag(False, "batch normalisation (vgg, resnet18)")
    init: str = flag("torch", "weights at the start: torch's, or Kaiming's normal ones", choices=_models.INITS)
    seed: int = flag(0, "of initialisation, subset, label noise, batches and sketches", least=0, most=2**32 - 1)
    steps: int = flag(1500, "optimizer steps", least=0)
    max_steps: int = flag(0, "stop after so many, with a checkpoint to go on from; 0 for no such stop", least=0)
    stop_loss: float = flag(0.0, "stop where the training loss is measured to be lower", least=0)
    log_spacing: float = flag(1.3, "ratio of the steps at which is measured: 0, 5, 5·1.3, …", least=1.01)
    batch_size: int = flag(64, "on each process", least=1)
    lr: float = flag(0.05, "learning rate of SGD", least=0)
    momentum: float = flag(0.9, "of SGD", least=0, most=1)
    weight_decay: float = flag(0.0, "of SGD", least=0)
    mixed_precision: str = flag("no", "of the task's forward pass", choices=("no", "bf16", "fp16"))
    cpu: bool = flag(False, "run on the CPU")
    with_tracking: bool = flag(False, "log to wandb as well")
    checkpointing_steps: int = flag(0, "steps between checkpoints, 0 for none", least=0)
    output_dir: str | None = flag(None, "the run's folder; a new one under runs/ by default")

    @property
    def last_step(self) -> int:
        """The step to stop after."""
        return min(self.steps, self.max_steps or self.steps)

    def check(self) -> None:
        """Refuse flags that cannot be meant, before anything is made.

        Raises:
            ValueError: with the flag, what was expected and what came.
        """
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        points = [name for name in (self.dataset, self.mix) if name in _sets.POINTS]
        if points and self.model != "mlp":
            raise ValueError(
                f"--model: expected mlp for {points[0]}, whose inputs are points and no images, got {self.model}."
            )
        if points and self.augment:
            raise ValueError(f"--augment: expected images, got {points[0]}, whose inputs are points.")
        if (self.mix is None) != (self.mix_size == 0):
            raise ValueError("--mix_size: expected with --mix, and --mix with it: a data set and how many examples.")
        for path, name in (("data_path", self.dataset), ("mix_path", self.mix)):
            if getattr(self, path) is not None and (name is None or name in _sets.BUNDLED):
                raise ValueError(f"--{path}: expected an image data set with it, got {name}, which needs no folder.")
        if self.depth == 1 and self.model in ("mlp", "cnn"):
            raise ValueError("--depth: expected at least 2 layers, or 0 for the network's own, got 1.")
        if self.depth and self.model not in _models.DEPTHS:
            raise ValueError(f"--depth: expected {', '.join(_models.DEPTHS)} with it, got {self.model}.")
        if self.batch_norm and self.model in ("mlp", "cnn", "transformer"):
            raise ValueError(f"--batch_norm: expected vgg or resnet18 with it, got {self.model}.")
        if self.with_tracking and importlib.util.find_spec("wandb") is None:
            raise ValueError("--with_tracking: expected the package wandb. Install it: pip install wandb")


def parse(kind: type[C], doc: str | None, arguments: list[str] | None = None) -> tuple[C, Path | None]:
    """Read flags: with those of a file as defaults, or all of a run's own and the checkpoint to go on from."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help lists them",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="yaml file of flags, or an earlier run's config.json: the defaults then")
    parser.add_argument(
        _checkpoint.FLAG,
        help=f"a checkpoint, or a run's folder for its newest, to go on from; {_checkpoint.LATEST}: the newest in "
        "--output_dir, or to begin there if it has none, for launchers that start a command again",
    )
    kinds = {"int": int, "float": float}
    for field in dataclasses.fields(kind):
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kinds.get(str(field.type), str), metavar=field.name.upper())
        choices = f"one of {', '.join(field.metadata['choices'])}; " if field.metadata["choices"] else ""
        options["help"] = f"{field.metadata['help']} ({choices}default: {field.default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    template, checkpoint = given.pop("config"), given.pop("resume_from_checkpoint")
    again = checkpoint == _checkpoint.LATEST
    if template and checkpoint and not again:
        parser.error(f"argument --config: not allowed with argument {_checkpoint.FLAG}, but with {_checkpoint.LATEST}")
    resume = None
    try:
        earlier = _read(kind, Path(template), "--config") if template else {}
        if checkpoint:
            resume = _checkpoint.latest(given.get("output_dir")) if again else _checkpoint.find(checkpoint)
        if resume is not None:
            wanted = {**earlier, **given}
            earlier = _read(kind, _checkpoint.run_of(resume) / "config.json", _checkpoint.FLAG)
            _refuse_changes(wanted, earlier)
        for name in FREE:
            earlier.pop(name, None)  # a new run has its own folder, and one that goes on may have been moved
        config = kind(**{**earlier, **given})
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config, resume


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that make a run what it is."""
    return {name: value for name, value in values.items() if name not in FREE}


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
    got = f"got {_words.short(value)}."
    if choices is not None and value not in choices and not (value is None and field.default is None):
        raise ValueError(f"--{field.name}: expected one of {', '.join(choices)}, {got}")
    expected = {"int": int, "float": (int, float), "bool": bool}.get(str(field.type), (str, type(None)))
    if not isinstance(value, expected) or (isinstance(value, bool) and field.type != "bool"):
        raise ValueError(f"--{field.name}: expected {field.type}, {got}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"--{field.name}: expected a text without zero bytes, {got}")
    if least is None:
        return
    largest = LARGEST if field.type == "int" else sys.float_info.max
    if not (least <= value <= min(most, largest)):
        open_ended = most == math.inf and not (field.type == "int" and value > largest)
        bounds = f"of at least {least}" if open_ended else f"between {least} and {min(most, largest)}"
        raise ValueError(f"--{field.name}: expected a number {bounds}, {got}")


def _refuse_changes(given: dict[str, Any], earlier: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in FREE and value != earlier.get(name, value):
            raise ValueError(
                f"--{name}: expected the value of the run that goes on, {_words.short(earlier[name])}, "
                f"got {_words.short(value)}. Leave the flag out, or start a new run."
            )


def _read(kind: type[Common], source: Path, name: str) -> dict[str, Any]:
    expected = f"{name}: expected a yaml file of flags or the config.json of an earlier run"
    is_yaml = source.suffix in (".yaml", ".yml")
    try:
        text = _files.read(source)
        nested = _nested(text) if is_yaml else None
        values = {} if nested else dict(yaml.safe_load(text) if is_yaml else json.loads(text)["config"])
    except OSError as error:
        raise ValueError(f"{expected}, but {source}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        raise ValueError(f"{expected}, got another file: {source}.") from None
    if nested:
        raise ValueError(f"{expected}, each flag with one plain value, got more in line {nested} of {source}.")
    unknown = sorted(map(str, values.keys() - {field.name for field in dataclasses.fields(kind)}))
    if unknown:
        odd = ", ".join(map(_words.shortened, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"{name}: {source} has flags that this recipe does not know: {odd}.")
    return values


def _nested(text: str) -> int | None:
    """Return the first line with a list, a mapping in the mapping, or an alias, before anything is made of it."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 1 or isinstance(event, yaml.AliasEvent):
            return int(event.start_mark.line) + 1
    return None
