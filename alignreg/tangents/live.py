"""A live model: referred to, with parameters selected, frozen and linearized at a batch whenever it is asked."""

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


class LiveModel(ABC):  # noqa: B024 - what is made of a model is left to subclasses
    """A model that is referred to, never registered or copied, and seen as it is at the time of a call.

    The arguments are those of :class:`alignreg.TangentFeatures`.
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
        """Whether a ``SyncBatchNorm`` takes the statistics of all ranks, which must then make every call together."""
        self._bound: Bound | None = Bound(bare, forward_fn)
        self._refused: set[str] = set()  # parameters that the model uses otherwise than the rules of layers know
        self._proven: set[Any] = set()  # kinds of self-checks that held
        self._held: tuple[Frozen, dict[str, Any]] | None = None
        self._warned: set[str] = set()
        self._memo: dict[int, Any] | None = None
        self._looks = 0

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        if self._bound is None:
            raise RuntimeError("these tangent features lost their model in pickling: call bind(model) first.")
        if self._memo is not None:
            # Copied before its model was, in one deepcopy that is over by now.
            copied = self._memo.get(id(self._bound.model), self._bound.model)
            self._forward_fn = _copied(self._forward_fn, self._memo)
            self._memo = None
            self._bound = Bound(copied, self._forward_fn)
        return self._bound.model

    @property
    def forward_fn(self) -> ForwardFn | None:
        """The function that makes outputs of the model, if there is one."""
        return self._forward_fn

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters w by name, as they are now."""
        live = dict(self.model.named_parameters())
        changed = [name for name, shape in self._shapes.items() if name not in live or live[name].shape != shape]
        if changed:
            raise RuntimeError(
                f"parameters {changed} of the model were removed or changed shape since it was bound. "
                "Make new tangent features for the changed model."
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
        """A parameter without its gradient, which tells their dtype and device."""
        for name in self._shapes:
            with suppress(AttributeError):
                if not (found := self.model.get_parameter(name)).is_meta:
                    return found.detach()
        return next(iter(self.parameters.values())).detach()  # raises, and says what is missing

    @property
    def num_parameters(self) -> int:
        """P, the length of a tangent feature."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of each layer's parameters; a layer is the path of the module that owns them."""
        owners: dict[str, list[str]] = {}
        for name in self._shapes:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return owners

    def bind(self, model: nn.Module) -> None:
        """Refer to ``model`` from now on, which must have the same parameters; or select them anew of the same model.

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
        self._refused = set()
        self._proven = set()
        self._warned = set()
        self._memo = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveModel:
        # A copy of what watches the model watches the same live model, unless the model is being copied along: before,
        # or after, which shows at the first use.
        bound = None if self._bound is None else Bound(self.model, self._forward_fn)
        copied = copy(self)
        own = {"_refused": set(self._refused), "_proven": set(self._proven), "_warned": set(self._warned)}
        copied.__dict__.update(own, _bound=bound, _memo=memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_memo": None, "_held": None}

    def leaves(self, x: Any) -> list[Tensor]:
        """Return the leaves, parameters mostly, that the outputs at a batch depend on, where gradients may flow to."""
        with self._linearized(x, create_graph=True, backward_only=True) as at:
            return at.graph_leaves

    def require_independent_examples(self, x: Any) -> None:
        """Check that the outputs of an example do not depend on the others of its batch.

        Raises:
            ValueError: if they do.
        """
        with self._linearized(x, create_graph=False) as at:
            at.require_independent_examples()

    @contextmanager
    def held(self, *, detached: bool) -> Iterator[dict[int, Tensor]]:
        """Make all calls inside the block, and backward passes through their results, of the model as it is now.

        Args:
            detached: differentiate with respect to detached aliases of the parameters, by whose ``id`` the parameters
                are yielded. What hangs on the parameters themselves (hooks, caches) does not see these passes, and is
                to be handed the gradients of the aliases.
        """
        own = dict(self.model.named_parameters())
        require_values(own)
        with self._frozen() as inside:
            own = dict(self.model.named_parameters())  # those of a sharded model are whole by now
            aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in own.items()} if detached else own
            self._held = inside, aliases
            try:
                yield {id(aliases[name]): p for name, p in own.items()}
            finally:
                self._held = None

    @eager
    def agree(self, x: Any, outputs: Tensor) -> bool:
        """Say whether ``outputs`` of a forward pass of yours can stand for those that are differentiated here.

        They cannot where dropout is on, normalization takes other statistics than here or autocast rounds, for which
        they are compared, output by output, at the first, the last and a random example (all of them where the batch
        is normalized by its own statistics); nor where attention, recurrent layers or compiled parts ran in kernels
        that are differentiated once only, where their graph does not lead to the parameters, as that of a copy of the
        model or past a ``detach``, or where hooks on gradients are in it.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            outputs: ``(n, c)``.

        Raises:
            TypeError: as :meth:`outputs`.
            ValueError: as :meth:`outputs`.

        Example:
            >>> import torch
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
            # Not all parameters: a few examples use some of the experts that a batch does.
            return at.params.keys() - at.unused <= self.reached(outputs) and at.reproduces(
                outputs.detach(), rows, outputs
            )

    def serves(self, outputs: Tensor) -> bool:
        """Say whether the graph of ``outputs`` can be differentiated twice, and has no hooks on gradients in it."""
        hooked = hooks_on_gradients(self.model) or hooks_on_outputs(outputs)
        return not hooked and graph.twice_differentiable(outputs)

    def reached(self, outputs: Tensor) -> set[str]:
        """Return the names of the parameters that the graph of ``outputs`` leads to."""
        return graph.sources(outputs, {name: p for name, p in self.parameters.items() if p.requires_grad})[0]

    @property
    def couples_examples(self) -> bool:
        """Whether, in the present modes, outputs of an example depend on the others of its batch by its statistics."""
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
        # Of experts, say, some are used and some are not.
        if odd := sorted(name for name in names if re.sub(r"\d+", "", name) not in kinds):
            self._warn(
                f"the model's outputs do not depend on {odd}, whose features are zero. That is as it should be for "
                "layers that these outputs do not use, as the pooler of an encoder; it is not for weights whose "
                "place something else holds, such as merged adapters or a weight that is cached in evaluation mode."
            )


def _copied(fn: ForwardFn | None, memo: Mapping[int, Any]) -> ForwardFn | None:
    """Return what a deepcopy made of a function: of a method, that of the copied object, if there is one."""
    if isinstance(fn, MethodType):
        return MethodType(fn.__func__, memo.get(id(fn.__self__), fn.__self__))
    copied: ForwardFn | None = memo.get(id(fn), fn)
    return copied
