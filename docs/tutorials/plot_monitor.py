"""
Watch alignment along training
==============================

A small network learns scikit-learn's digits while a fifth of the training labels is random. During training we measure
four properties of its tangent features, the gradients of its outputs with respect to its parameters: how well they are
aligned with the task, how large they are, how many directions they use, and what their spectrum looks like.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from alignreg.metrics import TangentAlignment, TangentParticipationRatio, TangentSpectrum, TangentTrace

torch.set_num_threads(1)
torch.manual_seed(0)

# %%
# Data and network
# ----------------
# There are 1000 examples for training and 400 for measuring. A fifth of the training labels is redrawn uniformly.

pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
x = torch.tensor(pixels / 16, dtype=torch.float32)[order]
y = torch.tensor(labels)[order]
x_test, y_test = x[1000:1400], y[1000:1400]
x, y = x[:1000], y[:1000].clone()
redrawn = torch.rand(1000) < 0.2
y[redrawn] = torch.randint(10, (int(redrawn.sum()),))

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

# %%
# The metrics
# -----------
# The metrics are created once and refer to the live model. Three of them keep the same sums of a sketch with 64
# random directions, and share its passes inside a ``MetricCollection``. With ``return_std_error=True`` each also
# returns the standard error of the sketch, from a jackknife over the directions. The spectrum needs the exact kernel,
# so it keeps only its first 50 examples.

sketched = MetricCollection(
    {
        "alignment": TangentAlignment(model, 10, return_std_error=True),
        "trace": TangentTrace(model, 10, return_std_error=True),
        "participation ratio": TangentParticipationRatio(model, 10, return_std_error=True),
    }
)
spectrum = TangentSpectrum(model, 10, k=(10, 40), max_examples=50)


def measure():
    """Measure on the clean test examples at this moment of training."""
    sketched.reset()
    spectrum.reset()
    for inputs, target in zip(x_test.split(200), y_test.split(200), strict=True):
        sketched.update(inputs=inputs, target=target)
    spectrum.update(x_test[:50], y_test[:50])
    with torch.no_grad():
        accuracy = [(model(a).argmax(1) == b).double().mean().item() for a, b in ((x, y), (x_test, y_test))]
    found = {**sketched.compute(), "train accuracy": accuracy[0], "test accuracy": accuracy[1]}
    return {**found, "spectrum": spectrum.compute()}


# %%
# The loop
# --------
# The network changes fast at first and slowly later, so we measure at steps that are spaced by factors of two.

moments = [0, *(2**k for k in range(11))]
history = []
for step in range(moments[-1] + 1):
    if step in moments:
        history.append(measure())
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

print("step   alignment ± s.e.   participation ratio ± s.e.   test accuracy")
for step, found in zip(moments, history, strict=True):
    (a, a_error), (p, p_error) = found["alignment"], found["participation ratio"]
    accuracy = found["test accuracy"]
    print(f"{step:4}   {a:.3f} ± {a_error:.3f}      {p:6.1f} ± {p_error:4.1f}              {accuracy:.3f}")

# %%
# The curves
# ----------
# Bands show ± 2 standard errors. They cover the error of the sketch for these examples, not the choice of examples or
# of the seed. The size of the features has a logarithmic axis; path complexity is computed from this size.

figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
at = [step + 1 for step in moments]
for axis, name in zip(axes.flat, ("alignment", "trace", "participation ratio"), strict=False):
    value = torch.stack([found[name].value for found in history])
    error = torch.stack([found[name].standard_error for found in history])
    axis.plot(at, value, marker=".")
    axis.fill_between(at, value - 2 * error, value + 2 * error, alpha=0.25, linewidth=0)
    axis.set(ylabel=f"{name}, test examples")
axes[0, 1].set_yscale("log")
for name in ("train accuracy", "test accuracy"):
    axes[1, 1].plot(at, [found[name] for found in history], marker=".", label=name)
axes[1, 1].legend(frameon=False)
for axis in axes[1]:
    axis.set(xscale="log", xlabel="optimizer steps + 1")
plt.show()

# %%
# The first moment and the one with the highest alignment are the easiest to compare:

peak = max(range(len(moments)), key=lambda i: history[i]["alignment"].value)
first, best, last = (history[i]["alignment"] for i in (0, peak, -1))
print(f"alignment at the start {first.value:.3f} ± {first.standard_error:.3f}")
print(f"highest, at step {moments[peak]}: {best.value:.3f} ± {best.standard_error:.3f}")
print(f"at the end {last.value:.3f} ± {last.standard_error:.3f}")
accuracies = [found["test accuracy"] for found in history]
top = max(range(len(moments)), key=accuracies.__getitem__)
print(f"test accuracy is highest at step {moments[top]}, {accuracies[top]:.3f}, and {accuracies[-1]:.3f} at the end")

# %%
# The spectrum at this moment
# ---------------------------
# ``TangentSpectrum`` gave ranks and trace ratios at each moment, and plots the eigenvalues of the last one.

print("step   effective rank   share of the 10, 40 largest of 500 eigenvalues")
for step, found in zip(moments, history, strict=True):
    numbers = found["spectrum"]
    shares = f"{numbers['trace_ratio_10']:.2f}, {numbers['trace_ratio_40']:.2f}"
    print(f"{step:4}   {numbers['effective_rank']:14.1f}   {shares}")
figure, _ = spectrum.plot()
plt.show()
