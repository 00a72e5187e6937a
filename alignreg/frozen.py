"""A live model as a fixed, differentiable function, and back to exactly what it was."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignreg.primitives import Primitives
from alignreg.sharding import gathered

T = TypeVar("T")


@contextmanager
def frozen(model: nn.Module, *, normalization: Primitives | None = None) -> Iterator[None]:
    """Let the model be differentiated as a deterministic function of its parameters inside the block.

    Inside: gradients are on, whatever the caller's ``no_grad`` or ``inference_mode``; every module is in evaluation
    mode (dropout off, normalisation with its running statistics, which stay untouched); autocast is off, that
    of a ``forward`` patched by Accelerate included; compiled parts run eagerly; attention takes the kernel
    that can be differentiated twice and forward, recurrent layers leave the fused kernels that cannot; parameters
    that ``fully_shard`` spread over ranks are whole.
    Afterwards, also after an exception, everything is as before.

    Args:
        model: the bare model.
        normalization: how to run normalisations for derivatives of derivatives; fused if there are none.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # A batching rule that torch lacks, and the switch of recurrent layers below: notes, the results are the same.
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(gathered(model))
        for device in {"cpu", *(parameter.device.type for parameter in model.parameters())}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # In evaluation mode attention would take a fused path that has no forward-mode derivative.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in modules):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # only then can a part of the model be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(module.__dict__.__setitem__, "training", module.training)
            module.__dict__["training"] = False
            if "_original_forward" in module.__dict__ and "forward" in module.__dict__:
                stack.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
                module.__dict__["forward"] = module.__dict__["_original_forward"]
        if normalization is not None:
            stack.enter_context(normalization)
        yield


def repeatably(fn: Callable[..., T], *args: Any, devices: set[torch.device]) -> T:
    """Call ``fn`` and put the global random states back: every call draws what the caller would draw next."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        return fn(*args)


@final
class Saved:
    """What autograd keeps for the backward pass: bytes by storage, and dtypes.

    Args:
        besides: tensors that are kept anyway.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self._besides = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self.dtypes: set[torch.dtype] = set()
        self._storages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(self._storages.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest."""
        return max(self._storages.values(), default=0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is saved inside the block."""

        def pack(tensor: Tensor) -> Tensor:
            self.dtypes.add(tensor.dtype)
            if tensor.layout != torch.strided:
                return tensor.detach()
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._besides:
                self._storages[storage.data_ptr()] = storage.nbytes()
            # A saved output that is kept as it is holds its own graph, which holds it: neither is ever freed.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def failing_module(error: BaseException, model: nn.Module) -> str:
    """Name the innermost module of ``model`` on the way to ``error``: ``'path' (Class)``."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = "the model"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            found = f"{paths[id(owner)] or 'the model'!r} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
