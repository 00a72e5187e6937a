"""A live model with selected parameters, frozen and linearized at a batch in every call."""

from __future__ import annotations

import re
import warnings
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from alignreg import checks
from alignreg.distributed.wrappers import hooks_on_outputs, unwrap
from alignreg.tangents import graph, normalization
from alignreg.tangents.agreement import representatives
from alignreg.tangents.batch import as_batch, size, take
from alignreg.tangents.frozen import Frozen, frozen, hooks_on_gradients
from alignreg.tangents.linearization import Bound, ForwardFn, Linearization
from alignreg.tangents.normalization import Statistics
from alignreg.tangents.parameters import as_patterns, require_values, select
from alignreg.tangents.primitives import Primitives
from alignreg.tangents.switches import eager


class LiveModel(ABC):  # noqa: B024 - subclasses compute things from the model
    """A reference to a model, which is used in its present state in every call, and is never registered or copied.

    :class:`alignreg.TangentFeatures` describes the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        chunk_size: int | None = None,
        statistics: Statistics = "running",
    ) -> None:
        if chunk_size is not None:
            chunk_size = checks.count("chunk_size", chunk_size)
        if forward_fn is not None:
            checks.function("forward_fn", forward_fn, "(model, x) -> (n, c)")
        bare = unwrap(model)
        patterns = as_patterns(params)
        self._shapes = {name: p.shape for name, p in select(bare, patterns).items()}
        self._patterns = patterns
        self._forward_fn = forward_fn
        self._chunk_size = chunk_size
        checks.choice("statistics", statistics, ("running", "training"))
        self.statistics = statistics
        self.over_ranks = False
        """If true, ``SyncBatchNorm`` uses the statistics of all ranks, which must then make every call together."""
        self._bound: Bound | None = Bound(bare, forward_fn)
        self._refused: set[str] = set()  # parameters for which the rules of layers fail
        self._proven: set[Any] = set()  # kinds of self-checks that have passed
        self._held: tuple[Frozen, dict[str, Any]] | None = None
        self._warned: set[str] = set()
        self._memo: dict[int, Any] | None = None
        self._looks = 0

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        if self._bound is None:
            raise RuntimeError("these tangent features lost their model when they were pickled. Call bind(model).")
        if self._memo is not None:
            # These features were copied before their model, in a deepcopy that has finished by now.
            copied = self._memo.get(id(self._bound.model), self._bound.model)
            self._forward_fn = _copied(self._forward_fn, self._memo)
            self._memo = None
            self._bound = Bound(copied, self._forward_fn)
        return self._bound.model

    @property
    def forward_fn(self) -> ForwardFn | None:
        """The function that computes the outputs, if there is one."""
        return self._forward_fn

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters w by name, with their present values."""
        live = dict(self.model.named_parameters())
        changed = [name for name, shape in self._shapes.items() if name not in live or live[name].shape != shape]
        if changed:
            raise RuntimeError(
                f"parameters {changed} of the model were removed or changed shape since it was bound. Create new "
                "tangent features for the changed model."
            )
        require_values(live)
        if self._patterns is None:
            self._notice({name for name, p in live.items() if p.requires_grad} - self._shapes.keys(), "trainable")
        self._notice({name for name in self._shapes if not live[name].requires_grad}, "frozen")
        return {name: live[name] for name in self._shapes}

    def _notice(self, names: set[str], become: str) -> None:
        if names:
            self._warn(
                f"parameters {sorted(names)} have become {become} since the model was bound: "
                f"{'they do not count' if become == 'trainable' else 'they still count'}. Call bind(model) to select "
                "parameters anew."
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)

    @property
    def like(self) -> Tensor:
        """A detached parameter, for the dtype and device of all of them."""
        for name in self._shapes:
            with suppress(AttributeError):
                if not (parameter := self.model.get_parameter(name)).is_meta:
                    return parameter.detach()
        return next(iter(self.parameters.values())).detach()  # raises an error that names the missing parameters

    @property
    def num_parameters(self) -> int:
        """The number of parameters P, which is the length of a tangent feature."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of each layer's parameters, by the path of the module that owns them."""
        owners: dict[str, list[str]] = {}
        for name in self._shapes:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return owners

    def bind(self, model: nn.Module) -> None:
        """Refer to ``model``, with the same parameters, from now on; or select parameters of the same model again.

        Raises:
            ValueError: if the selected parameters of another model differ in name or shape.
        """
        bare = unwrap(model)
        shapes = {name: p.shape for name, p in select(bare, self._patterns).items()}
        if shapes != self._shapes and (self._bound is None or bare is not self.model):
            odd = sorted(name for name in shapes.keys() | self._shapes if shapes.get(name) != self._shapes.get(name))
            raise ValueError(f"model: its selected parameters differ from those bound before: {odd}.")
        self._shapes = shapes
        self._bound = Bound(bare, self._forward_fn)
        self._refused, self._proven, self._warned = set(), set(), set()
        self._memo = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveModel:
        # A copy refers to the same live model, unless the same deepcopy copies the model: before this object, or after
        # it, which `memo` shows when the copy is first used.
        bound = None if self._bound is None else Bound(self.model, self._forward_fn)
        copied = copy(self)
        own = {"_refused": set(self._refused), "_proven": set(self._proven), "_warned": set(self._warned)}
        copied.__dict__.update(own, _bound=bound, _memo=memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_memo": None, "_held": None}

    def leaves(self, x: Any) -> list[Tensor]:
        """Return the leaves (mostly parameters) that the outputs at a batch depend on, which receive gradients."""
        with self._linearized(x, create_graph=True, backward_only=True) as at:
            return at.graph_leaves

    def require_independent_examples(self, x: Any) -> None:
        """Raise a ``ValueError`` if the outputs of an example depend on the other examples of its batch."""
        with self._linearized(x, create_graph=False) as at:
            at.require_independent_examples()

    @contextmanager
    def held(self, *, detached: bool) -> Iterator[dict[int, Tensor]]:
        """Freeze the model for all calls inside the block, and for backward passes through their results.

        With ``detached``, calls differentiate with respect to detached aliases of the parameters, so that hooks and
        caches of the parameters do not see these passes. The block gets the parameters by the ``id`` of their aliases,
        and must pass on the gradients.
        """
        require_values(dict(self.model.named_parameters()))
        with self._frozen() as inside:
            own = dict(self.model.named_parameters())  # inside, those of a sharded model are whole
            aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in own.items()} if detached else own
            self._held = inside, aliases
            try:
                yield {id(aliases[name]): p for name, p in own.items()}
            finally:
                self._held = None

    @eager
    def agree(self, x: Any, outputs: Tensor) -> bool:
        """Return whether ``outputs`` ``(n, c)`` of your own forward pass may replace those computed here.

        They may not if your pass had dropout, other statistics in normalizations, or autocast. To detect this, each
        output is compared at the first, the last and a random example (at all examples with batch statistics). Nor may
        they if attention, recurrent layers or compiled parts ran in kernels that are differentiable only once, if the
        graph does not lead to the parameters (the outputs of a copy of the model, or behind a ``detach``), or if it
        contains hooks on gradients.

        Example:
            >>> from alignreg import TangentFeatures
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
            >>> x = torch.randn(5, 3)
            >>> TangentFeatures(net).agree(x, net(x)), TangentFeatures(net.eval()).agree(x, net(x))
            (False, True)
        """
        batch, outputs = as_batch(x), checks.dense("outputs", outputs)
        n = size(batch)
        if outputs.ndim != 2 or len(outputs) != n or not self.serves(outputs):
            return False
        rows = torch.tensor(representatives(n, seed=self._looks), device="cpu")
        if self.couples_examples:
            rows = torch.randperm(n, generator=torch.Generator().manual_seed(self._looks), device="cpu")
        self._looks += 1
        with self._linearized(take(batch, rows), create_graph=False) as at:
            if outputs.shape[1:] != at.y.shape[1:] or outputs.dtype != at.y.dtype:
                return False
            # Do not require all parameters: a few examples use only some of the experts that a batch uses.
            return at.params.keys() - at.unused <= self.reached(outputs) and at.reproduces(
                outputs.detach(), rows, outputs
            )

    def serves(self, outputs: Tensor) -> bool:
        """Return whether the graph of ``outputs`` is twice differentiable and contains no hooks on gradients."""
        hooked = hooks_on_gradients(self.model) or hooks_on_outputs(outputs)
        return not hooked and graph.twice_differentiable(outputs)

    def reached(self, outputs: Tensor) -> set[str]:
        """Return the names of the parameters that the graph of ``outputs`` leads to."""
        return graph.sources(outputs, {name: p for name, p in self.parameters.items() if p.requires_grad})[0]

    @property
    def couples_examples(self) -> bool:
        """True if, in the present modes, batch statistics make the outputs of an example depend on the others."""
        return self.statistics == "training" and any(map(normalization.couples_examples, self.model.modules()))

    def _frozen(self) -> AbstractContextManager[Frozen]:
        return frozen(self.model, statistics=self.statistics, over_ranks=self.over_ranks)

    @contextmanager
    def _linearized(self, x: Any, *, create_graph: bool, backward_only: bool = False) -> Iterator[Linearization]:
        model = self.model
        batch = as_batch(x)
        checks.flag("create_graph", create_graph)
        selected = self.parameters
        with ExitStack() as stack:
            if self._held is not None:
                inside, every = self._held
                stack.enter_context(torch.enable_grad())
            else:
                inside = stack.enter_context(self._frozen())
                every = dict(model.named_parameters())
            if create_graph and not backward_only:
                stack.enter_context(Primitives())
            assert self._bound is not None
            evaluation = Linearization(
                self._bound,
                {name: every[name] for name in selected},
                {name: p for name, p in every.items() if name not in selected},
                batch,
                inside,
                self._chunk_size,
                self._proven,
                create_graph=create_graph,
                keep_graph=backward_only,
            )
            self._notice_unused(evaluation.unused)
            yield evaluation

    def _notice_unused(self, names: set[str]) -> None:
        kinds = {re.sub(r"\d+", "", name) for name in self._shapes.keys() - names}
        # Ignore a parameter if others of its kind are used, as with a mixture of experts.
        if odd := sorted(name for name in names if re.sub(r"\d+", "", name) not in kinds):
            self._warn(
                f"the model's outputs do not depend on {odd}, whose features are zero. This is correct for layers that "
                "these outputs do not use, such as the pooler of an encoder. It is wrong if other tensors replace "
                "these weights, such as merged adapters or a weight that is cached in evaluation mode."
            )


def _copied(fn: ForwardFn | None, memo: Mapping[int, Any]) -> ForwardFn | None:
    """Return the copy that a deepcopy made of a function, or of the object of a method; else the function itself."""
    if isinstance(fn, MethodType):
        return MethodType(fn.__func__, memo.get(id(fn.__self__), fn.__self__))
    copied: ForwardFn | None = memo.get(id(fn), fn)
    return copied
