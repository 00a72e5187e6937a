"""The regularizers, tasks and networks to compare, as fields of a run's Config."""

from __future__ import annotations

from typing import Any, NamedTuple, final

NONE, DECAY, SMOOTHING = "none", "weight_decay", "label_smoothing"


@final
class Method(NamedTuple):
    """A regularizer: fields of a run's Config, the field for its weight, and the weights to choose from."""

    settings: dict[str, Any]
    field: str
    weights: tuple[float, ...]

    def at(self, weight: float | None) -> dict[str, Any]:
        """Return the fields, including the weight."""
        return self.settings if weight is None else {**self.settings, self.field: float(weight)}


def _loss(name: str, weights: tuple[float, ...], **options: Any) -> Method:
    # The losses use their default stride, without clipping, so that the effect of too large a weight shows.
    return Method({"regularizer": name, "reg_every": 3, "reg_clip": 0.0, **options}, "weight", weights)


LARGE, SMALL = (0.03, 0.1, 0.2, 0.4, 0.8), (0.004, 0.008, 0.016, 0.032, 0.064)
METHODS = {
    NONE: Method({}, "", ()),
    DECAY: Method({}, "weight_decay", (0.001, 0.003, 0.01, 0.02, 0.04)),
    SMOOTHING: Method({}, "label_smoothing", (0.2, 0.4, 0.6, 0.8, 0.9)),
    "fisher": _loss("fisher", (0.001, 0.002, 0.004, 0.008, 0.016)),
    "alignment": _loss("alignment", LARGE),
    "complexity": _loss("complexity", SMALL),
    "participation_ratio": _loss("participation_ratio", (0.01, 0.03, 0.1, 0.3, 1)),
    "kare": _loss("kare", (1, 3, 10, 30, 100), reg_examples=16),
}
VARIANTS = {
    "alignment:every_step": _loss("alignment", LARGE, reg_every=1),
    "alignment:whole_batch": _loss("alignment", LARGE, reg_examples=64),
    "alignment:32_probes": _loss("alignment", LARGE, reg_probes=32),
    "alignment:uncentered": _loss("alignment", LARGE, reg_centered=False),
    "alignment:per_layer": _loss("alignment", LARGE, reg_per_layer=True),
    "alignment:hidden_layers": _loss("alignment", LARGE, reg_layers="hidden"),
    "alignment:last_layer": _loss("alignment", LARGE, reg_layers="last"),
    "alignment:first_third": _loss("alignment", LARGE, reg_until=0.333),
    "alignment:last_two_thirds": _loss("alignment", LARGE, reg_from=0.333),
    "alignment:fixed_examples": _loss("alignment", LARGE, reg_pool=32),
    "complexity:every_step": _loss("complexity", SMALL, reg_every=1),
    "complexity:uncentered": _loss("complexity", SMALL, reg_centered=False),
    "complexity:hidden_layers": _loss("complexity", SMALL, reg_layers="hidden"),
    "complexity:last_layer": _loss("complexity", SMALL, reg_layers="last"),
}
"""Losses of alignreg with other options, each named after the loss that it varies."""
KNOWN = {**METHODS, **VARIANTS}
TASKS: dict[str, dict[str, Any]] = {
    "noise40": {"label_noise": 0.4},
    "noise20": {"label_noise": 0.2},
    "few100": {"train_size": 100},
    "few300": {"train_size": 300},
}
NETWORKS: dict[str, dict[str, Any]] = {"mlp": {"model": "mlp"}, "cnn": {"model": "cnn", "hidden": 16}}
BUNDLED: dict[str, Any] = {"cpu": True, "val_size": 300, "steps": 1000}
"""Settings of all tasks on these networks."""
TUNING: dict[str, Any] = {"measure": "", "log_spacing": 4.0, "figure": False}
FINAL: dict[str, Any] = {"measure": "held_out,ranks,path", "log_spacing": 2.0, "figure": False}
FIRST_SEED = 100
"""First seed of the final runs; no final run shares its seed with a tuning run."""


def base(name: str) -> str | None:
    """Return the method that a variant varies, or None."""
    return name.partition(":")[0] if ":" in name else None


def words(name: str, *, on_top: bool = False) -> str:
    """Return the name of a method for readers."""
    special = {"kare": "KARE", "fisher": "Fisher trace"}
    text = special.get(name, name.replace("_", " ").replace(":", ": "))
    return f"{text} + weight decay" if on_top else text
