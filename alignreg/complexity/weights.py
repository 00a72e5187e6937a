"""The weight matrices of a network of linear and convolutional layers, now and at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alignreg import checks
from alignreg.distributed.sharding import is_sharded
from alignreg.distributed.wrappers import unwrap

Layer = nn.Linear | nn.Conv2d

# These rescale the outputs of layers, even without parameters.
_NORMALIZATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


def layers(model: nn.Module) -> dict[str, Layer]:
    """Return the linear and convolutional layers by path, in the order of registration.

    :mod:`alignreg.complexity` lists the errors.

    Example:
        >>> list(layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    bare = unwrap(model)
    if is_sharded(bare):
        raise TypeError("model: expected whole parameters, got those of fully_shard. Pass a gathered copy.")
    by_path: dict[str, Layer] = {}
    paths: dict[int, str] = {}
    for path, module in bare.named_modules(remove_duplicate=False):
        own = {name for name, _ in module.named_parameters(recurse=False)}
        # Parametrized and pruned layers keep their parameters under other names.
        plain = isinstance(module, Layer) and "weight" in own and own <= {"weight", "bias"}
        if (own and not plain) or isinstance(module, _NORMALIZATIONS) or (isinstance(module, Layer) and not plain):
            raise ValueError(
                "model: expected nn.Linear and nn.Conv2d layers as the only modules with parameters and no "
                f"normalization, got {named(path, module)}, for which the measures are not defined. Fold a batch "
                "normalization into the layer before it, remove a parametrization, or measure another part."
            )
        if not isinstance(module, Layer):
            continue
        if id(module) in paths:
            raise ValueError(
                f"model: expected every layer under one name, got {paths[id(module)]!r} as {path!r} too, so that it is "
                "unclear how often it counts. Register copies (copy.deepcopy), or the layer once."
            )
        paths[id(module)] = path
        for name, parameter in module.named_parameters(recurse=False):
            _check(parameter, f"model: {named(path, module)}: {name}")
        by_path[path] = module
    if not by_path:
        raise ValueError(f"model: expected nn.Linear or nn.Conv2d layers, got {type(bare).__name__} without any.")
    return by_path


def start(model: nn.Module, initial: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the initial parameters by name, in float64, on the devices of the model's parameters.

    :mod:`alignreg.complexity` lists the errors.

    Example:
        >>> start(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)})
        {'weight': tensor([[1.]], dtype=torch.float64)}
    """
    if isinstance(initial, nn.Module):
        layers(initial)
        values: Mapping[str, Tensor] = dict(unwrap(initial).named_parameters(remove_duplicate=False))
    elif isinstance(initial, Mapping):
        values = initial
    else:
        raise TypeError(f"initial: expected a model or its state dict, got {type(initial).__name__}.")
    bare = unwrap(model)
    parameters = dict(bare.named_parameters(remove_duplicate=False))
    # A state dict also holds buffers.
    differing = (parameters.keys() - values.keys()) | (
        values.keys() - parameters.keys() - {k for k, _ in bare.named_buffers()}
    )
    if differing:
        raise ValueError(
            f"initial: expected the parameters of the model, got {min(differing)!r} in only one of the two. "
            "Save those of the same network, not wrapped."
        )
    for name, parameter in parameters.items():
        value = checks.dense(f"initial: {name}", values[name])
        if value.shape != parameter.shape:
            raise ValueError(
                f"initial: expected {name} of shape {tuple(parameter.shape)}, got {tuple(value.shape)}. "
                "Save those of the same network."
            )
        _check(value, f"initial: {name}")
    return {name: values[name].detach().to(p.device, torch.float64) for name, p in parameters.items()}


def matrices(of: Mapping[str, Layer], parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights ``(groups, out/groups, in/groups·kh·kw)`` by the path of the layer, in float64.

    ``parameters``, by name, replace those of the layers themselves.

    Example:
        >>> matrices({"": nn.Conv2d(4, 6, (3, 2), groups=2)})[""].shape
        torch.Size([2, 3, 12])
    """
    by_path = {}
    for path, layer in of.items():
        value = layer.weight if parameters is None else parameters[f"{path}.weight" if path else "weight"]
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        by_path[path] = value.detach().double().reshape(groups, len(value) // groups, -1)
    return by_path


def spectral_norm(blocks: Tensor) -> Tensor:
    """Return the spectral norm of the block-diagonal matrix with these blocks, ``(groups, rows, columns)``.

    Example:
        >>> spectral_norm(torch.tensor([[[3.0]], [[-4.0]]]))
        tensor(4.)
    """
    norms: Tensor = torch.linalg.matrix_norm(blocks, 2)
    return norms.amax()


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Stack scalars on the device of the first; the layers of a model may be on several devices.

    Example:
        >>> stacked([torch.tensor(1.0), torch.tensor(2.0)])
        tensor([1., 2.])
    """
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def named(path: str, module: nn.Module) -> str:
    """Return the name of a module for a message: ``'path' (Class)``."""
    return f"{path or 'the model itself'!r} ({type(module).__name__})"


def _check(value: Tensor, name: str) -> None:
    absent = "an uninitialized one" if isinstance(value, nn.UninitializedParameter) else ""
    absent = "one on the meta device" if value.is_meta else absent
    if absent or value.is_complex() or not value.numel() or not bool(torch.isfinite(value).all()):
        got = absent or "empty, complex, NaN or infinite ones"
        raise ValueError(f"{name}: expected finite real values, got {got}. Check the training, or the checkpoint.")
