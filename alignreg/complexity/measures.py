"""The measures of :mod:`alignreg.complexity`, which describes their common arguments and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alignreg import checks
from alignreg.complexity import weights
from alignreg.distributed.wrappers import unwrap
from alignreg.tangents.frozen import frozen
from alignreg.targets import encode


def rademacher_bound(lengths: Tensor, traces: Tensor, num_examples: int) -> Tensor:
    r"""Bound Σ_t (m_t/n) √(tr K_t) = Σ_t (m_t/n) ‖Φ_t‖_F on the Rademacher complexity of a learning flow.

    The sum bounds the empirical Rademacher complexity, on n examples, of the functions Σ_t ⟨δw_t, Φ_t⟩ of one output
    with ‖δw_t‖₂ ≤ m_t, for a sequence of feature maps Φ_t that are *fixed in advance*, independently of the data
    (Baratin et al. 2021, section 4, on the complexity of learning flows). The tangent features of a trained network
    depend on its data; for them the sum is a heuristic, not a bound.

    Args:
        lengths: m_t ≥ 0, the lengths of the steps in parameter space, ``(T,)``.
        traces: tr K_t ≥ 0 of the n examples at the start of each step, uncentered, ``(T,)``.
        num_examples: the number n.

    Raises:
        TypeError: if lengths or traces are no real tensor.
        ValueError: if the shapes differ, a value is negative or not finite, or n is no positive integer.

    Example:
        >>> import torch
        >>> from alignreg.complexity import rademacher_bound
        >>> from alignreg.metrics import PathComplexity
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> path = PathComplexity(net)
        >>> path.update(torch.eye(3))
        >>> with torch.no_grad():
        ...     net.weight += torch.tensor([[3.0, 0.0, 4.0]])
        >>> path.step()
        >>> lengths, traces, examples = path.history()
        >>> rademacher_bound(lengths, traces, int(examples[0]))  # 5 · √3 / 3
        tensor(2.8868, dtype=torch.float64)
    """
    lengths, traces = (
        checks.real(name, values, integers=True).detach().double()
        for name, values in (("lengths", lengths), ("traces", traces))
    )
    num_examples = checks.count("num_examples", num_examples)
    if lengths.ndim != 1 or lengths.shape != traces.shape:
        raise ValueError(
            f"lengths, traces: expected (T,) each, got shapes {tuple(lengths.shape)} and {tuple(traces.shape)}. "
            "Pair each step with the trace at its start."
        )
    for name, values in (("lengths", lengths), ("traces", traces)):
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite values that are not negative, got {checks.shown(values.tolist())}."
            )
    return (lengths * traces.to(lengths.device).sqrt()).sum() / num_examples


def margin(outputs: Tensor, y: Tensor, quantile: float = 0.0) -> Tensor:
    r"""Return the margin γ, the quantile over the examples of f_y(x) − max_{k≠y} f_k(x).

    The quantile 0.0 is the smallest margin of an example, which is negative if an example is misclassified; Jiang et
    al. 2020 use the quantile 0.1. Between two examples the quantile is interpolated linearly.

    Args:
        outputs: outputs of the network before the softmax, ``(n, c)`` with c ≥ 2.
        y: class indices ``(n,)``.
        quantile: a number in [0, 1].

    Returns:
        A float64 scalar, which can be the ``margin`` of the measures if it is positive.

    Raises:
        TypeError: if the outputs or y are no real tensor.
        ValueError: if the shapes do not fit, an output is not finite, a class is outside [0, c), or ``quantile`` is
            outside [0, 1].

    Example:
        >>> import torch
        >>> from alignreg.complexity import margin
        >>> margin(torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 6.0]]), torch.tensor([0, 2]))
        tensor(2., dtype=torch.float64)
    """
    f = checks.real("outputs", outputs, integers=True).detach().double()
    if outputs.ndim != 2 or outputs.shape[0] == 0 or outputs.shape[1] < 2:
        raise ValueError(f"outputs: expected (n, c) of at least two classes, got shape {tuple(outputs.shape)}.")
    checks.finite("outputs", f)
    quantile = checks.number("quantile", quantile, "a number in [0, 1]", lambda q: 0 <= q <= 1)
    if checks.dense("y", y).ndim != 1:
        raise ValueError(f"y: expected class indices (n,), got shape {tuple(y.shape)}. Use argmax(1) of one-hot rows.")
    own = encode(y, f.shape[1], len(f), name="y").to(f.device) > 0
    return torch.quantile(f[own] - f.masked_fill(own, -torch.inf).amax(1), quantile)


def frobenius_product(model: nn.Module, *, margin: float | None = None) -> Tensor:
    r"""Return the product of squared Frobenius norms Π_l ‖W_l‖_F², divided by γ² if a margin is given.

    This is one of the measures of Jiang et al. 2020 ("Fantastic generalization measures and where to find them"), based
    on the bounds of Neyshabur, Tomioka & Srebro 2015 ("Norm-based capacity control in neural networks").

    Example:
        >>> import torch
        >>> from alignreg.complexity import frobenius_product
        >>> net = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(net.weight)
        >>> frobenius_product(net, margin=0.5)
        tensor(8.0000, dtype=torch.float64)
    """
    norms = weights.stacked([torch.linalg.vector_norm(W) for W in weights.matrices(weights.layers(model)).values()])
    return _over(norms.square().prod(), margin, 2)


def spectral_product(model: nn.Module, *, margin: float | None = None) -> Tensor:
    r"""Return the product of squared spectral norms Π_l ‖W_l‖₂², divided by γ² if a margin is given.

    This is one of the measures of Jiang et al. 2020 ("Fantastic generalization measures and where to find them"), and a
    factor of the bounds of both Bartlett, Foster & Telgarsky 2017 and Neyshabur, Bhojanapalli & Srebro 2018. Without
    convolutions, its square root bounds the Lipschitz constant of a network with 1-Lipschitz activations.

    Example:
        >>> import torch
        >>> from alignreg.complexity import spectral_product
        >>> net = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(net.weight)
        >>> spectral_product(net)
        tensor(1., dtype=torch.float64)
    """
    norms = weights.stacked([weights.spectral_norm(W) for W in weights.matrices(weights.layers(model)).values()])
    return _over(norms.square().prod(), margin, 2)


def path_norm(model: nn.Module, shape: Sequence[int], *, margin: float | None = None) -> Tensor:
    r"""Return the squared ℓ2 path norm Σ_k f_{w²}(1)_k, divided by γ² if a margin is given.

    The network f is evaluated once, in evaluation mode, with squared weights and biases at an input of ones. With ReLU
    (or any activation that is the identity on numbers ≥ 0), the result is the sum over all paths, from an input or a
    bias to an output, of the squared product of the weights on the path (Neyshabur, Salakhutdinov & Srebro 2015,
    "Path-SGD"; computed in this way by Jiang et al. 2020). Other modules are applied unchanged: max-pooling keeps the
    largest sum and average pooling computes plain means; a tanh destroys the meaning as a sum of paths. ``shape`` is
    the shape of one example, without the batch axis. A ``ValueError`` is also raised if the output is not ``(1, c)``.

    Example:
        >>> import torch
        >>> from alignreg.complexity import path_norm
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, -3.0)
        >>> path_norm(net, (2,))
        tensor(18., dtype=torch.float64)
    """
    layers = weights.layers(model)
    sizes = [checks.count("shape", size) for size in checks.each(shape)]
    bare = unwrap(model)
    device = next(iter(layers.values())).weight.device
    with frozen(bare), torch.no_grad():
        squares = {name: p.detach().double().square() for name, p in bare.named_parameters()}
        # Copy the buffers, since a forward pass may write to them.
        buffers = {
            name: b.to(torch.float64 if b.is_floating_point() else b.dtype, copy=True)
            for name, b in bare.named_buffers()
        }
        ones = torch.ones(1, *sizes, dtype=torch.float64, device=device)
        outputs = functional_call(bare, {**squares, **buffers}, (ones,))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"model: expected an output (1, c) for one example of shape {tuple(sizes)}, got {got}. "
            "Pass the shape of an example without the batch axis, and flatten the outputs."
        )
    return _over(outputs.sum(), margin, 2)


def distance(model: nn.Module, initial: nn.Module | Mapping[str, Tensor], *, margin: float | None = None) -> Tensor:
    r"""Return the distance ‖w − w_0‖₂ from the initial parameters, biases included, divided by γ if a margin is given.

    The distance of the weights without biases is one of the measures of Jiang et al. 2020 ("Fantastic generalization
    measures and where to find them"), after Nagarajan & Kolter 2019 ("Generalization in deep networks: the role of
    distance from initialization"). Tied parameters count once.

    Example:
        >>> import copy, torch
        >>> from alignreg.complexity import distance
        >>> net = torch.nn.Linear(2, 1)
        >>> before = copy.deepcopy(net)
        >>> with torch.no_grad():
        ...     net.weight += torch.tensor([[3.0, 4.0]])
        >>> round(float(distance(net, before)), 4)
        5.0
    """
    weights.layers(model)
    start = weights.start(model, initial)
    parts = [torch.linalg.vector_norm(p.detach().double() - start[k]) for k, p in unwrap(model).named_parameters()]
    return _over(torch.linalg.vector_norm(weights.stacked(parts)), margin, 1)


def bartlett2017(model: nn.Module, initial: nn.Module | Mapping[str, Tensor], *, margin: float | None = None) -> Tensor:
    r"""Return the spectral complexity (Π_l ‖W_l‖₂) (Σ_l (‖(W_l − W_l⁰)ᵀ‖_{2,1} / ‖W_l‖₂)^{2/3})^{3/2}.

    It is divided by γ if a margin is given. ‖Aᵀ‖_{2,1} is the sum over the output units of the 2-norms of the rows of
    A. The measure is that of Bartlett, Foster & Telgarsky 2017 ("Spectrally-normalized margin bounds for neural
    networks", Theorem 1.1), for 1-Lipschitz activations and the initial weights as reference matrices, without biases.
    The code computes (Σ_l (‖(W_l − W_l⁰)ᵀ‖_{2,1} Π_{k≠l} ‖W_k‖₂)^{2/3})^{3/2}, which is equal, and which gives the
    limit where a W_l is zero.

    Example:
        >>> import copy, torch
        >>> from alignreg.complexity import bartlett2017
        >>> net = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(net.weight)
        >>> initial = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        >>> bartlett2017(net, initial)  # two rows of norm 1
        tensor(2.0000, dtype=torch.float64)
    """
    layers = weights.layers(model)
    now, start = weights.matrices(layers), weights.matrices(layers, weights.start(model, initial))
    spectral = weights.stacked([weights.spectral_norm(W) for W in now.values()])
    moved = weights.stacked([torch.linalg.vector_norm(W - start[path], dim=-1).sum() for path, W in now.items()])
    others = torch.stack([torch.cat([spectral[:at], spectral[at + 1 :]]).prod() for at in range(len(spectral))])
    return _over((moved * others).pow(2 / 3).sum() ** 1.5, margin, 1)


def neyshabur2018(
    model: nn.Module, initial: nn.Module | Mapping[str, Tensor], *, margin: float | None = None
) -> Tensor:
    r"""Return ‖V‖_F (‖U − U⁰‖_F + ‖U⁰‖₂) + √h for a network V φ(U x) with one hidden layer of h units.

    This is the measure of Neyshabur, Li, Bhojanapalli, LeCun & Srebro ("Towards understanding the role of
    over-parametrization in generalization of neural networks", ICLR 2019, arXiv 1805.12076). As in their bound, a
    margin γ divides the first term but not √h. Biases are left out. A ``ValueError`` is also raised if the layers are
    not two ``nn.Linear``, U then V, the second of which acts on the units of the first.

    Example:
        >>> import copy, torch
        >>> from alignreg.complexity import neyshabur2018
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> _ = torch.nn.init.eye_(net[0].weight), torch.nn.init.ones_(net[2].weight)
        >>> neyshabur2018(net, copy.deepcopy(net))  # 2 · (0 + 1) + √4
        tensor(4., dtype=torch.float64)
    """
    layers = weights.layers(model)
    others = [weights.named(path, layer) for path, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if others:
        raise ValueError(f"model: expected nn.Linear layers, with a number of hidden units, got {others[0]}.")
    if len(layers) != 2:
        raise ValueError(f"model: expected one hidden layer, so two layers, got {len(layers)}. Use bartlett2017.")
    start = weights.matrices(layers, weights.start(model, initial))
    (first, U), (second, V) = weights.matrices(layers).items()
    h = U.shape[-2]
    if V.shape[-1] != h:
        raise ValueError(
            f"model: expected {weights.named(second, layers[second])} to take the {h} units of "
            f"{weights.named(first, layers[first])}, got {V.shape[-1]}. "
            "Register the layers in the order of the forward pass."
        )
    moved, initially, last = weights.stacked(
        [torch.linalg.vector_norm(U - start[first]), weights.spectral_norm(start[first]), torch.linalg.vector_norm(V)]
    )
    return _over(last * (moved + initially), margin, 1) + math.sqrt(h)


def _over(value: Tensor, margin: float | Tensor | None, power: int) -> Tensor:
    if margin is None:
        return value
    if isinstance(margin, Tensor) and margin.numel() == 1 and not margin.is_complex():
        margin = margin.item()  # the result of the function `margin`
    hint = " Use a larger quantile, or leave margin out while examples are misclassified."
    return value / checks.positive("margin", margin, hint) ** power
