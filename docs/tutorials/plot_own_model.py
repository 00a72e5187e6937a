"""
A model of your own
===================

Real models may take and return dicts, you may want to measure only some of their parameters, and examples may come in
groups. This page does all of that at once: a small Transformer reads digits row by row, with a mask for hidden rows.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from alignreg import TangentFeatures
from alignreg.losses import ComplexityPenalty
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace

torch.set_num_threads(1)
torch.manual_seed(0)

# %%
# Dicts in, dicts out
# -------------------
# Inputs may be a tensor, or a tuple or dict of tensors, with the examples on the first axis. This model is called as
# ``model(**batch)`` and returns a dict.


class Reader(nn.Module):
    """Eight rows of eight pixels each are the tokens; hidden rows are masked."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, rows, hidden):
        """Return logits, and the pooled states that they are computed from."""
        states = self.encoder(self.embed(rows) + self.place, src_key_padding_mask=hidden)
        pooled = states.masked_fill(hidden[..., None], 0).sum(1) / (~hidden).sum(1, keepdim=True)
        return {"logits": self.head(pooled), "pooled": pooled}


pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
rows, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 8, 8)[order], torch.tensor(labels)[order]
half = torch.arange(len(y)) % 2  # every other digit loses three of its rows
hidden = torch.zeros(len(y), 8, dtype=torch.bool)
hidden[half == 1, 2:5] = True

x = {"rows": rows, "hidden": hidden}
train, test = slice(0, 1000), slice(1000, 1200)


def part(index):
    """Return some examples of the inputs."""
    return {name: tensor[index] for name, tensor in x.items()}


# %%
# Choose the outputs
# ------------------
# Tangent features belong to outputs of shape ``(n, c)``. If the model returns something else, ``forward_fn`` selects
# the outputs. ``params`` selects the parameters, with glob patterns of their names.

model = Reader()


def logits(model, batch):
    """Return the outputs that are differentiated."""
    return model(**batch)["logits"]


for params in (None, "encoder.*", ("encoder.layers.1.*", "head.*")):
    features = TangentFeatures(model, params=params, forward_fn=logits)
    share = features.trace(part(slice(0, 20))).item()
    print(f"{params!s:36} {features.num_parameters:6} parameters, tr K of 20 digits {share:.1f}")

# %%
# A collection with keywords
# --------------------------
# alignreg's metrics take *inputs*, others take predictions. A ``MetricCollection`` of both is updated by keywords,
# and each metric uses those that it knows: alignreg's use ``inputs``, ``group`` and ``target``, accuracy uses
# ``preds`` and ``target``. With ``groups``, the same pass also gives a value for each group of examples. The two
# groups are equally large, which is necessary to compare their alignments.

options = {"forward_fn": logits, "params": "encoder.*", "groups": ("whole", "hidden"), "sketch_dim": 32}
metrics = MetricCollection(
    {
        "alignment": TangentAlignment(model, 10, **options, return_std_error=True),
        "trace": TangentTrace(model, 10, **options),
        "accuracy": MulticlassAccuracy(10, average="micro"),
    }
)


def evaluate():
    """Measure on the test examples."""
    metrics.reset()
    model.eval()
    for index in torch.arange(test.start, test.stop).split(100):
        with torch.no_grad():
            preds = logits(model, part(index))
        metrics.update(inputs=part(index), preds=preds, target=y[index], group=half[index])
    model.train()
    return metrics.compute()


# %%
# Train it
# --------
# The loss takes the same ``forward_fn`` and ``params``. The metrics and the loss leave the model as it was: dropout
# is off inside them and on again afterwards.

reg = ComplexityPenalty(model, weight=0.001, forward_fn=logits, params="encoder.*")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
history = {}
for step in range(401):
    if step in (0, 50, 100, 200, 400):
        history[step] = evaluate()
    batch = torch.randint(train.stop, (64,))
    optimizer.zero_grad()
    loss = cross_entropy(logits(model, part(batch)), y[batch]) + reg(part(batch))
    loss.backward()
    optimizer.step()

print("names of the values:", ", ".join(history[0]))
print("step   accuracy   alignment ± s.e.: whole, hidden       trace: whole, hidden")
for step, found in history.items():
    alignments = ", ".join("{:.3f} ± {:.3f}".format(*found[f"alignment_{group}"]) for group in options["groups"])
    traces = ", ".join(f"{found[f'trace_{group}']:.3g}" for group in options["groups"])
    print(f"{step:4}   {found['accuracy']:8.3f}   {alignments}        {traces}")

# %%
# Layer by layer
# --------------
# Which part of the model is most aligned with the task? The exact kernel is the sum of one kernel per layer; a
# parameter belongs to the module that owns it. This metric keeps the first 60 examples.

layers = LayerwiseAlignment(model, num_outputs=10, forward_fn=logits, max_examples=60)
layers.update(part(test), y[test])
by_layer = layers.compute()
print("highest:", max(by_layer, key=by_layer.get))
figure, _ = layers.plot()
plt.show()
