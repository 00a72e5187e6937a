"""
Watch alignment along training
==============================

A small network learns scikit-learn's digits, a fifth of whose training labels are wrong. On the way we ask its tangent
features, the gradients of its outputs with respect to its parameters, four things: how well they are aligned with the
task, how large they are, how many directions they use, and what their spectrum looks like.
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
# 1000 examples to train on, 400 to watch. A fifth of the training labels is redrawn uniformly.

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
# They are made once and refer to the live model. Three of them keep the same sums of a sketch, 64 random directions
# along which the features are pushed, and share it inside a ``MetricCollection``. With ``return_std_error=True`` each
# gives the standard error that these directions leave, by a jackknife. The spectrum needs the exact kernel, so it
# keeps its first 50 examples only.

sketched = MetricCollection(
    {
        "alignment": TangentAlignment(model, 10, return_std_error=True),
        "trace": TangentTrace(model, 10, return_std_error=True),
        "participation ratio": TangentParticipationRatio(model, 10, return_std_error=True),
    }
)
spectrum = TangentSpectrum(model, 10, k=(10, 40), max_examples=50)


def measure():
    """Look at the clean test examples at this moment of training."""
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
# Training changes fast at first and slowly later, so the moments at which we look are spaced by factors of two.

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
# What one sees
# -------------
# Bands are ± 2 standard errors. They hold the error of the sketch for these examples, and say nothing of other
# examples or another seed. The size of the features needs a logarithmic axis; it is what the complexity of the path
# that training takes is made of.

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
# The two moments that are easiest to compare are the first one and that of the highest alignment:

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
# ``TangentSpectrum`` gave ranks and trace ratios at each moment, and draws the eigenvalues of the last one.

print("step   effective rank   share of the 10, 40 largest of 500 eigenvalues")
for step, found in zip(moments, history, strict=True):
    numbers = found["spectrum"]
    shares = f"{numbers['trace_ratio_10']:.2f}, {numbers['trace_ratio_40']:.2f}"
    print(f"{step:4}   {numbers['effective_rank']:14.1f}   {shares}")
figure, _ = spectrum.plot()
plt.show()
