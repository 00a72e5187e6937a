"""A live model as a fixed, differentiable function, with its state restored exactly afterwards."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import is_
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from alignreg.distributed.sharding import gathered
from alignreg.tangents import normalization
from alignreg.tangents.normalization import Statistics
from alignreg.tangents.switches import DIFFERENTIABLE, RECURRENT, global_hooks_on_gradients

T = TypeVar("T")


@final
class Frozen:
    """A model inside :func:`frozen`, which describes the arguments."""

    def __init__(self, model: nn.Module, statistics: Statistics, *, over_ranks: bool) -> None:
        self.over_ranks = over_ranks
        self._modules = list(model.named_modules())
        self._outside = [_Attributes(module) for _, module in self._modules]
        self._scripted = {
            module: module.training for _, module in self._modules if isinstance(module, torch.jit.ScriptModule)
        }
        self._classes: list[tuple[nn.Module, Any]] = []
        self._stand_ins: dict[int, _StandIn] = {}
        for _, module in self._modules:
            attributes = module.__dict__
            # Buffers need copies too, since a checkpointed module runs again in a backward pass.
            for holder in (attributes, attributes.get("_buffers")):
                for name, value in holder.items() if isinstance(holder, dict) else ():  # scripted modules have no dict
                    if _may_change(value):
                        self._stand_ins.setdefault(id(value), _StandIn(value)).places.append((holder, name))
            # The user's hooks on gradients are meant for the gradients of training; they would change the features.
            for place in _HOOKS_ON_GRADIENTS:
                if attributes.get(place):
                    attributes[place] = OrderedDict()
            if "_original_forward" in attributes and "forward" in attributes:  # Accelerate has patched it
                attributes["forward"] = attributes["_original_forward"]
            keeps = statistics == "training" and normalization.keeps_running_statistics(module)
            training = module.training and keeps
            if module in self._scripted:
                module.training = training  # not in __dict__
            else:
                attributes["training"] = training
            if isinstance(module, nn.SyncBatchNorm) and training:
                kind: Any = type(module)
                self._classes.append((module, kind))
                attributes["ranks"] = normalization.ranks_of(module) if over_ranks else None
                module.__class__ = normalization.differentiable(kind)
        self.couples_examples = statistics == "training" and any(
            normalization.couples_examples(module) for _, module in self._modules
        )
        self._modes = [module.training for _, module in self._modules]
        for stand_in in self._stand_ins.values():
            stand_in.renew()
        self._inside = [_Attributes(module) for _, module in self._modules]

    def settle(self) -> bool:
        """Undo the changes of a forward pass to modules, and return whether there were any; refuse changes of modes."""
        changed = False
        for (path, module), mode, attributes in zip(self._modules, self._modes, self._inside, strict=True):
            if module.training != mode:
                raise RuntimeError(
                    f"the forward pass switches {path or 'the model'!r} ({type(module).__name__}) to "
                    f"{'training' if module.training else 'evaluation'} mode, so that the differentiated function "
                    "differs from the model as it predicts. Set modes outside of forward()."
                )
            changed |= attributes.restore()
        written = [stand_in for stand_in in self._stand_ins.values() if stand_in.is_written()]
        if written:
            for stand_in in written:
                stand_in.renew()
            self._inside = [_Attributes(module) for _, module in self._modules]
        return changed or bool(written)

    def leave(self) -> None:
        """Restore everything."""
        for attributes in self._outside:
            attributes.restore()
        for script, mode in self._scripted.items():
            script.training = mode
        for module, own in self._classes:
            module.__class__ = own


_HOOKS_ON_GRADIENTS = ("_backward_hooks", "_backward_pre_hooks")


def hooks_on_gradients(model: nn.Module) -> bool:
    """Return whether hooks on the gradients of parameters or modules affect passes outside of :func:`frozen`."""
    own = any(module.__dict__.get(place) for module in model.modules() for place in _HOOKS_ON_GRADIENTS)
    return own or global_hooks_on_gradients() or any(p._backward_hooks for p in model.parameters())  # noqa: SLF001 - there is no public list


def _may_change(value: Any) -> bool:
    """Return whether a forward pass may change a value in place and must get a copy (not lists, dicts and sets)."""
    if not isinstance(value, Tensor):
        return isinstance(value, torch.Generator)
    # Other modules may share parameters; tensors with a graph or without values cannot be changed in place.
    return not (isinstance(value, nn.Parameter) or value.requires_grad or is_lazy(value))


@final
class _StandIn:
    """A copy that replaces a tensor or random generator in all modules that hold it."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.places: list[tuple[dict[str, Any], str]] = []

    def renew(self) -> None:
        self._copy = self._value.detach().clone() if isinstance(self._value, Tensor) else self._value.clone_state()
        for holder, name in self.places:
            holder[name] = self._copy
        self._version = self._now()

    def is_written(self) -> bool:
        return bool(self._now() != self._version)

    def _now(self) -> Any:
        if isinstance(self._copy, Tensor):
            return self._copy._version  # noqa: SLF001 - counts changes in place
        return self._copy.get_state().tolist()


@final
class _Attributes:
    """The attributes of a module, and the contents of the lists, dicts and sets among them."""

    def __init__(self, module: nn.Module) -> None:
        self._live = module.__dict__
        self.values = dict(self._live)
        held: list[Any] = [value for value in self.values.values() if isinstance(value, (dict, list, set))]
        self._empty = [one for one in held if not one]  # most of them, such as dicts of hooks
        self._contents = [(one, one.copy()) for one in held if one]

    def restore(self) -> bool:
        """Restore the attributes, and return whether one had changed."""
        changed = not _same(self._live, self.values)
        if changed:
            for name in self._live.keys() - self.values:
                del self._live[name]
            self._live.update(self.values)
        for held in self._empty:
            if held:
                changed = True
                held.clear()
        for held, before in self._contents:
            if not _same(held, before):
                changed = True
                held.clear()
                held.extend(before) if isinstance(held, list) else held.update(before)
        return changed


def _same(one: Any, other: Any) -> bool:
    """Return whether two lists, dicts or sets hold the same objects."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(map(is_, one, other)) and all(map(is_, one.values(), other.values()))
    return bool(one == other) if isinstance(one, set) else all(map(is_, one, other))


# If two threads measured one model at the same time, each would save the changes of the other as the original state.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def frozen(model: nn.Module, *, statistics: Statistics = "running", over_ranks: bool = False) -> Iterator[Frozen]:
    """Let the model be differentiated as a deterministic function of its parameters inside the block.

    Inside the block:

    - Gradients are on, even under the caller's ``no_grad`` or ``inference_mode``, and autocast is off, including that
      of a ``forward`` patched by Accelerate.
    - Every module is in evaluation mode: dropout is off, and normalizations use running statistics and leave them
      unchanged. With ``statistics="training"``, modules that train with batch statistics keep their modes.
    - Compiled parts run eagerly, attention uses a kernel that is differentiable twice and forward, and recurrent
      layers use no fused kernels, which are not.
    - Parameters that ``fully_shard`` distributes over ranks are whole. Hooks on the gradients of modules are off.
    - Copies replace buffers, and other tensors and random generators of modules. Other threads wait for the model.

    Afterwards, even after an exception, everything is as before, including attributes that the forward pass sets.
    ``over_ranks`` lets a ``SyncBatchNorm`` use the statistics of all ranks.
    """
    with ExitStack() as stack:
        stack.enter_context(_LOCKS.setdefault(model, threading.RLock()))
        stack.enter_context(DIFFERENTIABLE.held())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(RECURRENT.held())
        stack.enter_context(_alone())
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(gathered(model))
        for device in {"cpu", *(parameter.device.type for parameter in model.parameters())}:
            stack.enter_context(torch.autocast(device, enabled=False))
        inside = Frozen(model, statistics, over_ranks=over_ranks)
        stack.callback(inside.leave)
        yield inside


def repeatably(fn: Callable[..., T], *args: Any, devices: set[torch.device]) -> T:
    """Call ``fn`` and restore the global random states, so that every call draws the same numbers."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        return fn(*args)


def draws(fn: Callable[..., T], *args: Any, devices: set[torch.device]) -> tuple[T, bool]:
    """Call ``fn`` and return whether it draws from the global random states, which are then restored.

    Otherwise they are left alone, since other threads may be drawing and must not get the same numbers twice.
    """
    before = _random_states(devices)
    try:
        result = fn(*args)
    except BaseException:
        _put_back(before, fn, *args)
        raise
    return result, _put_back(before, fn, *args)


def _put_back(before: dict[torch.device, Tensor], fn: Callable[..., Any], *args: Any) -> bool:
    """Restore the random states if ``fn`` changed them, and return whether it did."""
    after = _random_states(set(before))
    if all(map(torch.equal, before.values(), after.values())):
        return False
    if threading.active_count() > 1:
        with suppress(Exception), torch.no_grad(), _Draws() as seen:  # type: ignore[no-untyped-call]
            fn(*args)
        if not seen.any:
            return False
    for device, state in before.items():
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """Restore the CPU's random state, even after an exception, unless another thread may have changed it."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        if threading.active_count() == 1 and not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)


def _random_states(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    states = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


@final
class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records whether an operation draws random numbers."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@final
class Saved:
    """A record of the tensors that autograd saves for the backward pass, except ``besides``: sizes and dtypes."""

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self._besides = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self.dtypes: set[torch.dtype] = set()
        self._storages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """The size of all saved tensors."""
        return sum(self._storages.values())

    @property
    def largest(self) -> int:
        """The size of the largest saved tensor."""
        return max(self._storages.values(), default=0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the tensors that are saved inside the block."""

        def pack(tensor: Tensor) -> Tensor:
            self.dtypes.add(tensor.dtype)
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._besides:
                    self._storages[storage.data_ptr()] = storage.nbytes()
            # Detach, since a saved output that keeps its graph would form a reference cycle.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def failing_module(error: BaseException, model: nn.Module) -> str:
    """Return the name of the innermost module of ``model`` that raised ``error``: ``'path' (Class)``."""
    paths = {id(module): path for path, module in model.named_modules()}
    name = "the model"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            name = f"{paths[id(owner)] or 'the model'!r} ({type(owner).__name__})"
        trace = trace.tb_next
    return name
