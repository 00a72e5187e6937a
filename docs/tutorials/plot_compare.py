"""
Compare regularizers over seeds
===============================

To know if a method helps, you have to measure a difference, but the accuracy of a single run varies between seeds by
more than most methods gain. A comparison needs at least the same seeds for all methods, paired differences, and
intervals that account for the number of methods.
"""

import matplotlib.pyplot as plt
import torch
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.losses import ComplexityPenalty

torch.set_num_threads(1)

# %%
# Methods
# -------
# The training set has a hundred clean digits. Each method has one strength, which the project's comparison chose for
# this network and task on held-out examples (:doc:`/comparison`), with runs of 1000 steps; the runs here are shorter.
# If you choose strengths yourself, use held-out examples and other seeds than those of the results, and try equally
# many for each method.

METHODS = {
    "none": {},
    "weight decay": {"decay": 0.001},
    "label smoothing": {"smoothing": 0.4},
    "complexity penalty": {"penalty": 0.008},
}
SEEDS = range(8)
STEPS = 300

pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def accuracy(seed, decay=0.0, smoothing=0.0, penalty=0.0):
    """Return test accuracy at the end of training; the seed determines subset, initial weights and batches."""
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    x, y, x_test, y_test = pixels[order[:100]], labels[order[:100]], pixels[order[1000:]], labels[order[1000:]]
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    reg = ComplexityPenalty(model, weight=penalty)  # with weight 0 it is exactly zero and costs nothing
    for _ in range(STEPS):
        batch = torch.randint(100, (64,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch], label_smoothing=smoothing) + reg(x[batch])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).double().mean().item()


found = {name: torch.tensor([accuracy(seed, **options) for seed in SEEDS]) for name, options in METHODS.items()}
for name, values in found.items():
    print(f"{name:20} {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}")

# %%
# Why pairs
# ---------
# A seed that draws an easy subset is easy for every method. What the methods share cancels in the difference of two
# runs with the same seed, so the standard error shrinks if the runs are correlated:

for name, values in list(found.items())[1:]:
    paired = (values - found["none"]).std() / len(SEEDS) ** 0.5
    unpaired = (values.var() / len(SEEDS) + found["none"].var() / len(SEEDS)) ** 0.5
    print(f"{name:20} standard error of the difference: paired {paired:.4f}, unpaired {unpaired:.4f}")

# %%
# Intervals
# ---------
# The intervals use Student's t with one degree of freedom less than there are seeds. There are three differences, so
# each interval may err with a third of 5 % (Bonferroni), and together they hold with 95 % confidence. They cover
# seeds, not data sets, networks or the choice of strengths.

others = list(METHODS)[1:]
factor = student.ppf(1 - 0.05 / (2 * len(others)), df=len(SEEDS) - 1)
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
for row, name in enumerate(others):
    gain = found[name] - found["none"]
    half = factor * gain.std().item() / len(SEEDS) ** 0.5
    low, high = gain.mean().item() - half, gain.mean().item() + half
    verdict = "above none" if low > 0 else "below none" if high < 0 else "no significant difference"
    print(f"{name:20} {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]: {verdict}")
    axis.errorbar(gain.mean(), row, xerr=half, fmt="o", capsize=4, color="tab:blue")
    axis.plot(gain, [row + 0.18] * len(gain), ".", color="tab:gray", markersize=4)
axis.axvline(0, color="0.6", linewidth=0.8)
axis.set_yticks(range(len(others)), others)
axis.set_xlabel("test accuracy − none, corrected 95 % interval; dots: seeds")
axis.invert_yaxis()
plt.show()

# %%
# What it shows, and what not
# ---------------------------
# These runs support only the last column of the printed table. "No significant difference" does not mean that there
# is none: so few seeds can only detect differences larger than the half width. Nor is this a general result about the
# methods, with one task, one network and eight seeds. :doc:`/comparison` has the table with all settings, losses and
# their costs, and ``python recipes/compare.py --short`` runs its protocol in half a minute.
