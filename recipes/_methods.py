"""What is compared: regularizers with the weights to choose from, tasks and networks, as flags of train.py."""

from __future__ import annotations

from typing import NamedTuple, final

NONE, DECAY, SMOOTHING = "none", "weight_decay", "label_smoothing"


@final
class Method(NamedTuple):
    """A regularizer: flags with a place for the weight, and the weights."""

    flags: str
    weights: tuple[float, ...]


# The losses' own stride; unclipped, so that weights which are too large show what they do.
PLAIN = "--reg_every 3 --reg_clip 0"
ALIGNMENT = f"{PLAIN} --regularizer alignment --weight {{}}"
COMPLEXITY = f"{PLAIN} --regularizer complexity --weight {{}}"
LARGE, SMALL = (0.03, 0.1, 0.2, 0.4, 0.8), (0.004, 0.008, 0.016, 0.032, 0.064)
METHODS = {
    NONE: Method("", ()),
    DECAY: Method("--weight_decay {}", (0.001, 0.003, 0.01, 0.02, 0.04)),
    SMOOTHING: Method("--label_smoothing {}", (0.2, 0.4, 0.6, 0.8, 0.9)),
    "fisher": Method(f"{PLAIN} --regularizer fisher --weight {{}}", (0.001, 0.002, 0.004, 0.008, 0.016)),
    "alignment": Method(ALIGNMENT, LARGE),
    "complexity": Method(COMPLEXITY, SMALL),
    "participation_ratio": Method(
        f"{PLAIN} --regularizer participation_ratio --weight {{}}", (0.01, 0.03, 0.1, 0.3, 1)
    ),
    "kare": Method(f"{PLAIN} --reg_examples 16 --regularizer kare --weight {{}}", (1, 3, 10, 30, 100)),
}
VARIANTS = {
    "alignment:every_step": Method(f"{ALIGNMENT} --reg_every 1", LARGE),
    "alignment:whole_batch": Method(f"{ALIGNMENT} --reg_examples 64", LARGE),
    "alignment:32_probes": Method(f"{ALIGNMENT} --reg_probes 32", LARGE),
    "alignment:uncentered": Method(f"{ALIGNMENT} --no-reg_centered", LARGE),
    "alignment:per_layer": Method(f"{ALIGNMENT} --reg_per_layer", LARGE),
    "alignment:hidden_layers": Method(f"{ALIGNMENT} --reg_layers hidden", LARGE),
    "alignment:last_layer": Method(f"{ALIGNMENT} --reg_layers last", LARGE),
    "alignment:first_third": Method(f"{ALIGNMENT} --reg_until 0.333", LARGE),
    "alignment:last_two_thirds": Method(f"{ALIGNMENT} --reg_from 0.333", LARGE),
    "alignment:fixed_examples": Method(f"{ALIGNMENT} --reg_pool 32", LARGE),
    "complexity:every_step": Method(f"{COMPLEXITY} --reg_every 1", SMALL),
    "complexity:uncentered": Method(f"{COMPLEXITY} --no-reg_centered", SMALL),
    "complexity:hidden_layers": Method(f"{COMPLEXITY} --reg_layers hidden", SMALL),
    "complexity:last_layer": Method(f"{COMPLEXITY} --reg_layers last", SMALL),
}
"""Losses of alignreg with other options, named after the one that they vary."""
KNOWN = {**METHODS, **VARIANTS}
TASKS = {
    "noise40": "--label_noise 0.4",
    "noise20": "--label_noise 0.2",
    "few100": "--train_size 100",
    "few300": "--train_size 300",
}
NETWORKS = {"mlp": "--model mlp", "cnn": "--model cnn --hidden 16"}
BUNDLED = "--cpu --val_size 300 --steps 1000"
"""For the networks above."""
TUNING = "--measure= --log_spacing 4 --no-figure"
FINAL = "--measure held_out,ranks,path --log_spacing 2 --no-figure"
FIRST_SEED = 100
"""Of the runs that count, so that weights are chosen by none of them."""


def base(name: str) -> str | None:
    """Return the method that a variant varies."""
    return name.partition(":")[0] if ":" in name else None


def words(name: str, *, on_top: bool = False) -> str:
    """Name a method for readers."""
    special = {"kare": "KARE", "fisher": "Fisher trace"}
    text = special.get(name, name.replace("_", " ").replace(":", ": "))
    return f"{text} + weight decay" if on_top else text
