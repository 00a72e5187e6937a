"""One of two gloo processes: `python callback_worker.py RANK STORE OUT`. Writes what it found as json."""

import os

import torch
from callback_cases import VALIDATED, Keywords, Scaled, data, metrics, trained_plainly
from callback_runs import (
    Module,
    Values,
    lightning_regularized,
    lightning_run,
    lightning_trainer,
    loader_of,
    losses,
    regularized,
    transformers_run,
)
from ranks import report
from torch import nn

from alignreg.callbacks.lightning import TangentMonitor

DDP = {"devices": 2, "strategy": "ddp"}


def not_a_number(folder, rank):
    """The inputs of one rank are broken; of the other none."""
    x, y = data(16, 0)
    x[1] = torch.nan  # of rank 1, whose examples are every second
    values = Values()
    trainer = lightning_trainer(folder, TangentMonitor(metrics), values, **DDP)
    trainer.validate(Module(), loader_of(x, y), verbose=False)
    return values.seen[0]


def work(rank, folder):
    # As torchrun leaves them, but for the port: processes meet in a file.
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    environment |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in environment.items()}
    found = {"lightning": lightning_run(folder, 24, **DDP)[0], "not a number": not_a_number(folder, rank)}
    found["transformers"] = transformers_run(folder, 40, VALIDATED)
    expected = trained_plainly(nn.parallel.DistributedDataParallel(Keywords()), 40, rank, 2)
    found["weights"] = {
        "lightning": lightning_regularized(folder, **DDP),
        "plain": regularized(folder, 40, expected),
        "scaled": regularized(folder, 40, expected, model=Scaled()),
        "compute_loss_func": regularized(folder, 40, expected, compute_loss_func=losses),
    }
    return found


if __name__ == "__main__":
    report(work)
