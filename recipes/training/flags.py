"""Flags as fields of a frozen dataclass: read from the command line, from a file, or from an earlier run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training import checkpoint, messages, storage

FREE = ("output_dir", "max_steps")
"""Flags that may change when a run is resumed."""
LARGEST = 2**63 - 1
"""The largest integer that torch accepts."""


def flag(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float = math.inf,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Return a field with its text for ``--help`` and its allowed values."""
    bounds = {"help": text, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=bounds)


def parse(
    kind: type[Any], doc: str | None, arguments: list[str] | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[Any, Path | None]:
    """Read the flags, with defaults from a file, or from an earlier run together with the checkpoint to continue from.

    Args:
        kind: a dataclass of flags, with ``check()``.
        doc: the description for ``--help``.
        arguments: the flags; by default those of the command line.
        settings: values of fields, which override the file and are overridden by the flags.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help lists them",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="yaml file of flags, or config.json of an earlier run, to use as defaults")
    parser.add_argument(
        checkpoint.FLAG,
        help="a checkpoint to continue from, or the folder of a run for its newest checkpoint; for launchers that "
        f"restart a command: {checkpoint.LATEST}, the newest in --output_dir, or a new run there if it has none",
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
    given = {**(settings or {}), **vars(parser.parse_args(arguments))}
    template, wanted = given.pop("config"), given.pop("resume_from_checkpoint")
    again = wanted == checkpoint.LATEST
    if template and wanted and not again:
        parser.error(f"argument --config: not allowed with argument {checkpoint.FLAG}, except with {checkpoint.LATEST}")
    resume = None
    try:
        earlier = _read(kind, Path(template), "--config") if template else {}
        if wanted:
            resume = checkpoint.latest(given.get("output_dir")) if again else checkpoint.find(wanted)
        if resume is not None:
            asked = {**earlier, **given}
            earlier = _read(kind, checkpoint.run_of(resume) / "config.json", checkpoint.FLAG)
            _refuse_changes(asked, earlier)
        for name in FREE:
            earlier.pop(name, None)  # a new run has its own folder, and a resumed run may have been moved
        config = kind(**{**earlier, **given})
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config, resume


def arguments_of(settings: Mapping[str, Any]) -> list[str]:
    """Return values of fields as arguments of a command line."""
    switches = {True: "--", False: "--no-"}
    return [
        word
        for name, value in settings.items()
        for word in ([f"{switches[value]}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)])
    ]


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that identify a run."""
    return {name: value for name, value in values.items() if name not in FREE}


def check(config: Any) -> None:
    """Refuse values that a flag does not allow, each on its own.

    Raises:
        ValueError: with the flag, the expected value and the given value.
    """
    for field in dataclasses.fields(config):
        _check_value(field, getattr(config, field.name))


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
    got = f"got {messages.short(value)}."
    if choices is not None and value not in choices and not (value is None and field.default is None):
        raise ValueError(f"--{field.name}: expected one of {', '.join(choices)}, {got}")
    expected = {"int": int, "float": (int, float), "bool": bool}.get(str(field.type), (str, type(None)))
    if not isinstance(value, expected) or (isinstance(value, bool) and field.type != "bool"):
        raise ValueError(f"--{field.name}: expected {field.type}, {got}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"--{field.name}: expected text without zero bytes, {got}")
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
                f"--{name}: expected the value of the resumed run, {messages.short(earlier[name])}, "
                f"got {messages.short(value)}. Omit the flag, or start a new run."
            )


def _read(kind: type[Any], source: Path, name: str) -> dict[str, Any]:
    expected = f"{name}: expected a yaml file of flags or the config.json of an earlier run"
    is_yaml = source.suffix in (".yaml", ".yml")
    try:
        text = storage.read(source)
        nested = _nested(text) if is_yaml else None
        values = {} if nested else dict(yaml.safe_load(text) if is_yaml else json.loads(text)["config"])
    except OSError as error:
        raise ValueError(f"{expected}, but {source}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        raise ValueError(f"{expected}, got another kind of file: {source}.") from None
    if nested:
        raise ValueError(f"{expected}, with one plain value for each flag, got more in line {nested} of {source}.")
    unknown = sorted(map(str, values.keys() - {field.name for field in dataclasses.fields(kind)}))
    if unknown:
        odd = ", ".join(map(messages.shortened, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"{name}: {source} has flags that this recipe does not know: {odd}.")
    return values


def _nested(text: str) -> int | None:
    """Return the first line with a list, a nested mapping or an alias, before the text is loaded."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 1 or isinstance(event, yaml.AliasEvent):
            return int(event.start_mark.line) + 1
    return None
