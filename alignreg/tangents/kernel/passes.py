"""Run the rules of layers over a batch within the memory budget: vectorized, one output at a time, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import final

import torch

from alignreg.tangents.batch import Batch, tensors
from alignreg.tangents.kernel import recorder
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.taps import Site
from alignreg.tangents.linearization import Linearization


@final
class Rules:
    """The rules of layers that hold for a model at one batch.

    Args:
        at: the model at the examples.
        layer_of: the layer of each parameter, which orders the layers in results.
        refused: parameters whose rules are known to fail; further failures are added.
    """

    def __init__(self, at: Linearization, layer_of: Mapping[str, str], refused: set[str]) -> None:
        self.at = at
        self.layer_of = layer_of
        # Rules need the gradients of individual examples.
        self._refused = set(layer_of) if at.couples_examples else refused

    def visit(self, batch: Batch, consume: Callable[[Site, Gradients], None], *, batched: bool) -> None:
        """Call ``consume`` with the gradients of a batch, layer by layer (:func:`.recorder.visit`), unless refused."""
        params = self.at.leaves()
        watched = {name: params[name] for name in self.layer_of if name not in self._refused}
        recorder.visit(
            lambda: self.at.function(params, batch),
            watched,
            self.layer_of,
            consume,
            constants=[*self.at.others.values(), *(p for name, p in params.items() if name not in watched)],
            inputs=tensors(batch),
            dtype=self.at.gram_dtype,
            create_graph=self.at.create_graph,
            batched=batched,
            limit=self.at.fit(self.at.gram_dtype.itemsize, part=4),
        )

    def run(self, visits: Callable[[bool], None]) -> None:
        """Call ``visits(True)`` (outputs together); if it fails, ``visits(False)``; if that fails, refuse all rules."""
        for batched in (True, False)[0 if self.at.vectorizes else 1 :]:
            try:
                visits(batched)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - the plain forward pass ran, so the rules are the cause
                failure = error
            else:
                return
        warnings.warn(
            f"the exact kernel of this model is computed without the rules of its layers, which is slower: {failure}",
            UserWarning,
            stacklevel=2,
        )
        self._refused.update(self.layer_of)
        visits(False)

    def refuse(self, names: Iterable[str], *, quietly: bool = False) -> None:
        """Compute parameters from their Jacobian from now on, with a warning."""
        names = tuple(names)
        self._refused.update(names)
        if not quietly:
            warnings.warn(
                f"the rule for {', '.join(names)} does not give its gradients here, because the model also uses it in "
                "another way or its examples depend on each other. It is computed from its Jacobian, which is correct "
                "but slower.",
                UserWarning,
                stacklevel=2,
            )

    def without(self, groups: Iterable[tuple[str, ...]]) -> list[str]:
        """Return the parameters that the outputs depend on and that are in none of the groups, in order."""
        taken = {name for names in groups for name in names} | self.at.unused
        return [name for name in self.layer_of if name not in taken]

    @property
    def hold_for_most(self) -> bool:
        """Whether the rules are not known to fail for more than half of the numbers in the parameters."""
        sizes = {name: self.at.params[name].numel() for name in self.layer_of}
        return 2 * sum(sizes[name] for name in sizes.keys() & self._refused) <= sum(sizes.values())

    @property
    def limit(self) -> int:
        """The largest number of values in the rows of a layer at once, limited to a fast size on a CPU."""
        fit = self.at.fit(self.at.gram_dtype.itemsize, part=4)
        return min(fit, 2**22) if self.at.y.device.type == "cpu" else fit

    @property
    def examples_at_once(self) -> int:
        """The number of examples that fit in one pass."""
        # About six copies of the gradients of all outputs at the largest layer exist at the same time.
        return self.at.fit(6 * self.at.c * self.at.largest_activation_bytes // self.at.n)
