"""Runs of Lightning and of the Trainer, on one process or as one of several."""

import torch
from callback_cases import (
    ACCUMULATED,
    BATCH,
    EPOCHS,
    RATE,
    Keywords,
    data,
    dicts,
    distance,
    flat,
    logits,
    measured,
    metrics,
    net,
    penalty,
    rows,
)
from lightning import pytorch as pl
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import TrainerCallback, TrainingArguments

from alignreg.callbacks.lightning import TangentMonitor
from alignreg.callbacks.transformers import TangentTrainer
from alignreg.losses import ComplexityPenalty


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.inference_modes = set()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.inference_modes.add(torch.is_inference_mode_enabled())
        self.log("loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


class Values(pl.Callback):
    """Keeps what was logged in each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def loader(n):
    return loader_of(*data(n, seed=n))


def loader_of(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def in_order(n):
    """For training: Lightning's own sampler on several ranks would shuffle."""
    examples = TensorDataset(*data(n, seed=n))
    sampler = DistributedSampler(examples, shuffle=False) if dist.is_initialized() else None
    return DataLoader(examples, batch_size=BATCH, sampler=sampler)


def lightning_trainer(folder, *callbacks, **options):
    options = {"max_epochs": EPOCHS, "devices": 1, "logger": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **quiet, **options)


def lightning_run(folder, n, **options):
    """Return the values of each epoch, and of a validation in inference mode at the end, and the model."""
    values, module = Values(), Module()
    trainer = lightning_trainer(folder, TangentMonitor(metrics), values, **options)
    trainer.fit(module, in_order(40), loader(n))
    module.inference_modes.clear()
    with torch.inference_mode():  # which Lightning takes for validate() as well, but not with gloo
        trainer.validate(module, loader(n), verbose=False)
    assert module.inference_modes == {True}
    return values.seen, module


def lightning_plainly(n, ranks):
    """The same on one process, the last values twice: ranks take examples in turn, losses are means over them."""
    module, values = Module(), []
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    parts = {
        size: [[part[rank::ranks].split(BATCH) for part in data(size, size)] for rank in range(ranks)]
        for size in (40, n)
    }
    for _ in range(EPOCHS):
        for batches in zip(*(zip(*part, strict=True) for part in parts[40]), strict=True):
            optimizer.zero_grad()
            (sum(cross_entropy(module(x), y) for x, y in batches) / ranks).backward()
            optimizer.step()
        values.append(measured(module, [batch for part in parts[n] for batch in zip(*part, strict=True)]))
    return [*values, values[-1]], module


class Regularized(Module):
    """As docs/adapters.md shows it."""

    def __init__(self):
        super().__init__()
        self.reg = ComplexityPenalty(self, weight=0.5, examples=3, every_n_steps=2)

    def on_train_start(self):
        self.reg.bind(self.trainer.model)

    def training_step(self, batch):
        return super().training_step(batch) + self.reg(*batch)


def lightning_regularized(folder, **options):
    """Return how far weights trained with a penalty are from those of a plain loop on the same processes."""
    module, plain = Regularized(), Module()
    lightning_trainer(folder, **options).fit(module, in_order(40))
    model = nn.parallel.DistributedDataParallel(plain) if dist.is_initialized() else plain
    reg = ComplexityPenalty(model, weight=0.5, examples=3, every_n_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(EPOCHS):
        for x, y in in_order(40):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) + reg(x, y)).backward()
            optimizer.step()
    return distance(flat(module), flat(plain))


class Reported(TrainerCallback):
    """What goes to loggers."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if any(name.startswith("eval_") for name in logs):
            self.seen.append(dict(logs))


def arguments(folder, **options):
    return TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "num_train_epochs": EPOCHS,
            "train_sampling_strategy": "sequential",
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        | options,
    )


def trainer(folder, n, validated, model=None, kind=TangentTrainer, options=None, **tangents):
    """Return a Trainer, with what goes to its loggers in `reported`."""
    made = kind(
        model or Keywords(),
        arguments(folder, **(options or {})),
        train_dataset=rows(n),
        eval_dataset=rows(validated),
        **tangents,
    )
    made.reported = Reported()
    made.callback_handler.callbacks.insert(0, made.reported)
    return made


def watched(model):
    return metrics(model, logits)


def transformers_run(folder, n, validated):
    """Train with metrics alone, and return the values of each epoch as reported, and the largest difference."""
    run = trainer(folder, n, validated, metrics=watched)
    run.train()
    returned = run.evaluate()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [{**entry, "step": 0} for entry in logged] == [{**entry, "step": 0} for entry in run.reported.seen]
    assert {**logged[-1], **returned} == logged[-1]
    return [{name.removeprefix("eval_"): value for name, value in entry.items()} for entry in logged]


def transformers_plainly(n, validated, ranks):
    """The same on one process; ranks take batches in turn. The last evaluation is run twice."""
    model, values = Keywords(), []
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    batches = dicts(n)
    shown = [({"pixels": batch["pixels"]}, batch["labels"]) for batch in dicts(validated)]
    for _ in range(EPOCHS):
        for start in range(0, len(batches), ranks):
            optimizer.zero_grad()
            (sum(model(**batch)["loss"] for batch in batches[start : start + ranks]) / ranks).backward()
            optimizer.step()
        values.append(measured(model, shown, logits))
    return [*values, values[-1]]


def losses(outputs, labels, num_items_in_batch=None):
    """A Trainer's compute_loss_func, which is not scaled any more."""
    return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def regularized(folder, n, expected, **options):
    """Return how far weights trained with a penalty are from the expected ones, after each epoch."""
    seen = []

    class Weights(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            seen.append(flat(model))

    run = trainer(
        folder,
        n,
        BATCH,
        options={"gradient_accumulation_steps": ACCUMULATED, "eval_strategy": "no"},
        regularizer=penalty,
        callbacks=[Weights()],
        **options,
    )
    run.train()
    return max(distance(one, other) for one, other in zip(seen, expected, strict=True))
