"""Runs of the rules of layers over a batch: in memory that there is, vectorised where torch can, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

from alignreg.tangents.batch import Batch
from alignreg.tangents.kernel import recorder
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.recorder import Site
from alignreg.tangents.linearization import Evaluation


def visit(
    at: Evaluation,
    batch: Batch,
    layer_of: Mapping[str, str],
    refused: set[str],
    consume: Callable[[Site, Gradients], None],
    *,
    batched: bool,
) -> None:
    """Hand over the gradients of a batch, layer by layer: :func:`.recorder.visit`, without what is refused."""
    params = at.leaves()
    recorder.visit(
        lambda: at.function(params, batch),
        {name: params[name] for name in layer_of if name not in refused},
        layer_of,
        consume,
        dtype=at.gram_dtype,
        create_graph=at.create_graph,
        batched=batched,
    )


def batched_or_not(
    run: Callable[[bool], None], layer_of: Mapping[str, str], refused: set[str], *, vectorize: bool
) -> None:
    """Run with all outputs at once if that may be, or else one by one, or else refuse all rules."""
    for batched in (True, False)[0 if vectorize else 1 :]:
        try:
            run(batched)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the plain forward pass ran; the general way decides
            failure = error
        else:
            return
    warnings.warn(
        f"the exact kernel of this model goes without the rules of its layers, which is slower: {failure}",
        UserWarning,
        stacklevel=2,
    )
    refused.update(layer_of)
    run(False)


def refuse(names: tuple[str, ...], refused: set[str]) -> None:
    """Let parameters go the general way from now on, with a warning."""
    refused.update(names)
    warnings.warn(
        f"the rule for {', '.join(names)} does not give its gradients here, because the model uses it in "
        "another way too or its examples depend on each other; it goes the general way, which is right and slower.",
        UserWarning,
        stacklevel=2,
    )


def limit(at: Evaluation) -> int:
    """How many numbers the rows of a layer may take at once: no more than are quick on a CPU."""
    fit = max(1, at.working_memory // 4 // at.gram_dtype.itemsize)
    return min(fit, 2**22) if at.y.device.type == "cpu" else fit


def examples_at_once(at: Evaluation) -> int:
    """Return for how many examples there is memory in one pass."""
    # The gradients of all outputs at the largest layer, in the six or so copies that are alive together.
    return int(max(1, at.working_memory // max(1, 6 * at.c * at.largest_activation_bytes // at.n)))
