"""The processes of a run: checks that they train together as the flags say, and the steps that they synchronize."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object
from torch import nn

T = TypeVar("T")


def refuse_split_launch(num_processes: int) -> None:
    """Refuse a launch whose processes do not train together.

    Raises:
        RuntimeError: if ``WORLD_SIZE`` and Accelerate disagree, so that every process would train alone and all would
            write the same files; or if ``accelerate launch`` was asked for several processes and started one.
    """
    if num_processes > 1:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise RuntimeError(
            f"expected the launcher's {world} processes to train together, but Accelerate sees one. "
            "On CPUs pass --cpu to the recipe: torchrun --nproc_per_node 2 recipes/train.py --cpu"
        )
    # `accelerate launch` sets these for the single process that it starts on CPUs instead of several.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RuntimeError(
            "expected the several processes that accelerate launch was asked for, but on CPUs it starts only one "
            "process. Use torchrun --nproc_per_node 2 RECIPE --cpu, or "
            "accelerate launch --multi_gpu --num_processes 2 RECIPE --cpu. (For one process, pass --num_processes 1 "
            "and unset MASTER_ADDR.)"
        )


def refuse_other_training(accelerator: Accelerator, mixed_precision: str) -> None:
    """Refuse launcher settings that would change the training that the flags describe; warn if flags override them.

    Raises:
        ValueError: if the launcher asks for gradient accumulation, DeepSpeed or Megatron-LM, or if Accelerate would
            ignore the mixed precision.
    """
    count = accelerator.gradient_accumulation_steps
    if count != 1:
        raise ValueError(
            f"--batch_size: expected a launcher that makes each batch a step, got gradient_accumulation_steps {count}, "
            "by which Accelerate would divide the loss. Unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS and choose "
            "--batch_size."
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            "--config_file: expected a launcher configuration with one process, MULTI_GPU or MULTI_CPU, got "
            f"{accelerator.distributed_type.value}, which has its own settings for batches and steps. "
            "Use recipes/configs/multi_gpu.yaml."
        )
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision: expected no or bf16 on the CPU, got fp16, which Accelerate would ignore.")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", mixed_precision) and accelerator.is_main_process:
        print(
            f"--mixed_precision {mixed_precision}, the recipe's own flag, overrides the launcher's {launched}. "
            "Pass the flag after the recipe.",
            file=sys.stderr,
        )


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Broadcast the running statistics of the main process, as DDP does before its forward passes."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on the main process alone; every process returns its result, or raises its ValueError."""
    answer: list[Any] = [None, None]
    own = None
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except ValueError as error:
            own, answer[1] = error, str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise own or ValueError(answer[1])
    return answer[0]  # type: ignore[no-any-return]


def everywhere(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Run ``work`` on every process; if one raises a ValueError, all do, so that none waits for it."""
    own = None
    try:
        work()
    except ValueError as error:
        own = error
    problems = gather_object([own and str(own)]) if accelerator.num_processes > 1 else []
    problem = next(filter(None, problems), None)
    if own or problem:
        raise own or ValueError(problem)
