"""What runs of other packages' training loops are compared with: the same in plain PyTorch."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from alignreg.callbacks.monitor import unpack_batch
from alignreg.losses import ComplexityPenalty
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace

RATE, EPOCHS, BATCH, ACCUMULATED = 0.2, 2, 4, 2
VALIDATED = 26  # of the fourth batches of two ranks one has two examples, the other none


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(n, seed):
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] + 0.3).argmax(1)


class Keywords(nn.Module):
    """As the Trainer wants a model: keywords in, a dict with the loss out."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, pixels, labels=None):
        logits = self.net(pixels)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Scaled(Keywords):
    """Divides by the examples of all micro-batches and ranks by itself."""

    accepts_loss_kwargs = True

    def forward(self, pixels, labels=None, num_items_in_batch=None):
        found = super().forward(pixels, labels)
        if num_items_in_batch is not None:
            found["loss"] = found["loss"] * len(pixels) / num_items_in_batch
        return found


def logits(model, x):
    return model(**x)["logits"]


def metrics(model, forward_fn=None):
    """A scalar, an estimate and a dict."""
    return MetricCollection(
        [
            TangentAlignment(model, 3, sketch_dim=8, forward_fn=forward_fn),
            TangentTrace(model, 3, sketch_dim=8, return_std_error=True, forward_fn=forward_fn),
            LayerwiseAlignment(model, 3, forward_fn=forward_fn),
        ]
    )


def measured(model, batches, forward_fn=None):
    """Return the metrics' values by the names of the adapters, from a plain loop on one process."""
    alignment = TangentAlignment(model, 3, sketch_dim=8, forward_fn=forward_fn)
    trace = TangentTrace(model, 3, sketch_dim=8, return_std_error=True, forward_fn=forward_fn)
    layers = LayerwiseAlignment(model, 3, forward_fn=forward_fn)
    for inputs, target in batches:
        for metric in (alignment, trace, layers):
            metric.update(inputs, target)
    value, error = trace.compute()
    found = {"TangentAlignment": alignment.compute(), "TangentTrace": value, "TangentTrace/standard_error": error}
    found |= {f"LayerwiseAlignment/{layer}": value for layer, value in layers.compute().items()}
    return {f"tangent/{name}": float(value) for name, value in found.items()}


def difference(found, expected):
    """Return the largest relative difference of values by name."""
    assert set(expected) <= set(found), sorted(found)
    return max(abs(found[name] - value) / abs(value) for name, value in expected.items())


def penalty(model):
    return ComplexityPenalty(model, weight=0.5, examples=3, every_n_steps=2, forward_fn=logits)


def rows(n):
    """The dataset of a Trainer."""
    return [{"pixels": pixels, "labels": int(label)} for pixels, label in zip(*data(n, seed=n), strict=True)]


def dicts(n):
    x, y = data(n, seed=n)
    return [{"pixels": pixels, "labels": labels} for pixels, labels in zip(x.split(BATCH), y.split(BATCH), strict=True)]


def trained_plainly(model, n, rank=0, ranks=1):
    """Train with a penalty and gradient accumulation; `model` may be under DDP. Return the weights of each epoch."""
    reg = penalty(model)
    reg.gradient_accumulation_steps = ACCUMULATED
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    batches, step, weights = dicts(n)[rank::ranks], 0, []
    for _ in range(EPOCHS):
        for start in range(0, len(batches), ACCUMULATED):
            window = batches[start : start + ACCUMULATED]
            reg.step.fill_(step * ACCUMULATED)  # the last window of an epoch may be short, and is a step all the same
            for index, batch in enumerate(window):
                if ranks > 1:
                    model.require_backward_grad_sync = index == len(window) - 1
                example = unpack_batch(batch)
                loss = model(**batch)["loss"] + reg(example["inputs"], example["target"])
                (loss / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        weights.append(flat(model))
    return weights


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(weights, expected):
    return float((weights - expected).norm() / expected.norm())
