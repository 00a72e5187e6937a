"""Numbers of the paper's own code."""

import json

import torch
from paths import DATA
from torch import nn

EXPECTED = json.loads((DATA / "oracle_expected.json").read_text())
# From alignment.py of the paper's repository (tfjgeorge/ntk_alignment, commit 7132338) on NNGeometry 0.2.1, float64.
CASES = torch.load(DATA / "oracle_cases.pt", weights_only=True)


def oracle_case(name, dtype=torch.float64):
    case = CASES[name]
    widths = [case["inputs"].shape[1]]
    widths += [value.shape[0] for key, value in case["state_dict"].items() if key.endswith("weight")]
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(case["state_dict"])
    labels = case["labels"]
    return model.to(dtype), case["inputs"].to(dtype), labels if case["n_output"] > 1 else labels.to(dtype)
