"""Directions from a few examples, a pilot, along which features are counted exactly, and not estimated by a sketch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchmetrics.utilities import rank_zero_warn

from alignreg import functional
from alignreg.distributed.wrappers import broadcast
from alignreg.metrics.records import digest
from alignreg.moments import Moments
from alignreg.sketches.directions import Directions, GivenDirections, JoinedDirections
from alignreg.tangents import TangentFeatures
from alignreg.tangents.batch import Batch, as_inputs, flat, map_tensors, tensors

EXAMPLES = 32
"""The number of examples of the first update that are the pilot by default."""
RANDOM = 24
"""The least number of random directions beside those of a pilot: the standard error comes from them."""
NUMBERS = 2**27
"""The most numbers that the directions of a pilot may have. Models with more parameters have fewer directions."""


_AT_ONCE = 2**22
"""The most numbers of the sketch that are drawn at once."""


class Pilot(NamedTuple):
    """The leading directions of the features of a pilot, and their products with a sketch."""

    directions: GivenDirections
    """Q: k orthonormal directions, or fewer and zeros."""
    overlap: Tensor
    """QᵀS ``(k, m)``, in float64."""
    found: int
    """The number of directions that are not zero."""


def given(pilot: Any) -> Batch | bool:
    """Return the inputs of a pilot, or whether the first update brings them.

    Raises:
        TypeError: if ``pilot`` is neither a flag nor made of tensors.
        ValueError: if the inputs are empty or have a gradient history.
    """
    if isinstance(pilot, bool):
        return pilot
    try:
        return as_inputs(pilot)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pilot: expected True, False or inputs of a few examples. {error}") from None


def most(pilot: Batch | bool, sketch_dim: int) -> int:
    """Return the number of directions of a pilot beside which enough random ones are left."""
    return max(0, min(sketch_dim // 2, sketch_dim - RANDOM)) if pilot is not False else 0


def fitting(k: int, features: TangentFeatures) -> int:
    """Return as many of k directions as can be held; none in half precision, where they would not be orthonormal."""
    exact = all(torch.finfo(p.dtype).eps <= torch.finfo(torch.float32).eps for p in features.parameters.values())
    return min(k, NUMBERS // features.num_parameters) if exact else 0


@final
class Source:
    """Where the pilot of a metric comes from, and the pilot from its first update on.

    Args:
        examples: inputs, ``True`` for the first examples of the first update, or ``False`` for no pilot.
        k: the number of its directions.
        centered: center the features of the pilot.
    """

    def __init__(self, examples: Batch | bool, k: int, *, centered: bool) -> None:
        self.k = k
        self.pilot: Pilot | None = None
        self._examples = examples
        self._centered = centered

    def find(self, features: TangentFeatures, batch: Batch | None, sketch: Directions) -> Pilot:
        """Return the pilot of this rank, which may have found nothing.

        Args:
            features: the tangent features of the model.
            batch: the first batch; ``None`` for a rank that has none.
            sketch: the random directions.
        """
        examples = (
            map_tensors(lambda t: t[:EXAMPLES], batch)
            if self._examples is True and batch is not None
            else self._examples
        )
        if isinstance(examples, bool):
            return none(features, self.k, sketch)
        try:
            pilot = of(features, examples, self.k, sketch, centered=self._centered)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if batch is not None:
                features.outputs(batch)  # raises what is wrong with the batch itself
            if self._examples is not True:
                raise ValueError(f"pilot: expected inputs that the model takes, one by one. {error}") from error
            _warn(f"found no directions ({error}).")  # a sketch needs less than a kernel
            return none(features, self.k, sketch)
        if pilot.found < self.k:
            _warn(f"found {pilot.found} of {self.k} directions.")
        return pilot

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Forget a pilot that was found inside the block if the block raises."""
        before = self.pilot
        try:
            yield
        except BaseException:
            self.pilot = before
            raise

    @property
    def overlap(self) -> Tensor:
        """QᵀS ``(k, m)`` of the pilot that was found."""
        assert self.pilot is not None
        return self.pilot.overlap

    def join(self, sketch: Directions) -> Directions:
        """Return the directions [Q, S]."""
        if self.pilot is None:
            return sketch
        return JoinedDirections(self.pilot.directions, sketch)

    def project(self, z: Tensor) -> Tensor:
        """Return Φ[Q, RS], without the part of S in Q, from Φ[Q, S] ``(n, c, k + m)``."""
        if self.pilot is None:
            return z
        known = z[..., : self.k]
        return torch.cat([known, z[..., self.k :] - known @ self.pilot.overlap.to(z)], dim=-1)


def key(pilot: Batch | bool) -> Any:
    """Return an identifier of a pilot, for the names of states."""
    if isinstance(pilot, bool):
        return pilot
    return [(tuple(part.shape), digest({"": part})) for part in tensors(pilot)]


def none(features: TangentFeatures, k: int, sketch: Directions) -> Pilot:
    """Return a pilot that has found no directions."""
    return Pilot(_given(_zeros(features, k)), torch.zeros(k, sketch.m, dtype=torch.float64), 0)


def of(features: TangentFeatures, examples: Batch, k: int, sketch: Directions, *, centered: bool) -> Pilot:
    """Return the k leading eigenvectors of ΦᵀΦ for a few examples.

    From an eigenvector v of K = ΦΦᵀ they are Φᵀv/√λ, so they cost one kernel and k backward passes.

    Args:
        features: the tangent features of the model.
        examples: the pilot.
        k: the number of directions.
        sketch: the random directions S that are used beside them.
        centered: center the features of the pilot.

    Raises:
        TypeError: as :meth:`.TangentFeatures.kernel`.
        ValueError: as :meth:`.TangentFeatures.kernel`.
    """
    K = features.kernel(examples).to(torch.float64)
    rows = K.shape[0] * K.shape[1]
    values, vectors = torch.linalg.eigh((functional.center(K) if centered else K).reshape(rows, rows))
    # Smaller eigenvalues may be rounding errors. An inexact direction costs precision and no bias.
    rank = min(k, int((values > 1e-5 * values.amax()).sum()) if bool(values.amax() > 0) else 0)
    if not rank:
        return none(features, k, sketch)
    leading = vectors.T.flip(0)[:rank] / values.flip(0)[:rank, None].sqrt()
    back = {
        name: flat(value) for name, value in features.pullback(examples, leading.reshape(rank, *K.shape[:2])).items()
    }
    # They are orthonormal but for rounding errors.
    gram = torch.stack([(value @ value.T).to(K) for value in back.values()]).sum(0)
    change = torch.linalg.inv(torch.linalg.cholesky(gram))
    directions = _zeros(features, k)
    for name, value in back.items():
        Q = directions[name]
        Q[:rank] = (change.to(value) @ value).reshape(rank, *Q.shape[1:])
    return Pilot(_given(directions), _overlap(features, directions, sketch), rank)


def without_overlap(sums: Moments, low: Tensor, high: Tensor, *, replaceable: bool) -> Moments:
    """Return sums along [Q, RS] from those along [Q, S]; or along S only, if several pilots were merged.

    Args:
        sums: the sums.
        low: the minimum of QᵀS over what was merged.
        high: its maximum, which differs if there were several Q.
        replaceable: whether sums along S are all that is needed.

    Raises:
        RuntimeError: if they are not, and several pilots were merged.
    """
    if torch.equal(low, high):
        return sums.deflated(low)
    advice = "Give all metrics the same pilot=x, or pilot=False."
    if not replaceable:
        raise RuntimeError(f"pilot: expected the merged sums to have the same pilot, got several. {advice}")
    rank_zero_warn(
        f"The sums were merged, or loaded and continued, with several pilots, so only the random directions are used. "
        f"{advice}",
        UserWarning,
    )
    return sums.without(len(low))


def agree(pilot: Pilot, group: ProcessGroup | None) -> Pilot:
    """Return the pilot of the first rank, on all ranks."""
    directions = {name: broadcast(value, group) for name, value in pilot.directions.tensors.items()}
    device = next(iter(directions.values())).device
    return pilot._replace(directions=_given(directions), overlap=broadcast(pilot.overlap.to(device), group).cpu())


def _overlap(features: TangentFeatures, directions: dict[str, Tensor], sketch: Directions) -> Tensor:
    """Return QᵀS ``(k, m)``."""
    total: Tensor | float = 0.0
    for name, like in _likes(features).items():
        Q, step = flat(directions[name]), max(1, _AT_ONCE // max(1, like.numel()))
        parts = [
            (Q @ flat(sketch.block(name, like, start, min(start + step, sketch.m))).T).cpu()
            for start in range(0, sketch.m, step)
        ]
        total = total + torch.cat(parts, dim=1).double()
    assert isinstance(total, Tensor)
    return total


def _warn(found: str) -> None:
    rank_zero_warn(
        f"The pilot of a sketch metric {found} The error may be larger than without one. Pass pilot=x with about 32 "
        "varied examples, or pilot=False.",
        UserWarning,
    )


def _zeros(features: TangentFeatures, k: int) -> dict[str, Tensor]:
    return {name: like.new_zeros(k, *like.shape) for name, like in _likes(features).items()}


def _given(directions: dict[str, Tensor]) -> GivenDirections:
    return GivenDirections(directions, {name: value.shape[1:] for name, value in directions.items()})


def _likes(features: TangentFeatures) -> dict[str, Tensor]:
    """Return a tensor like each parameter, sharded or not, that holds no memory."""
    parameters = features.parameters.items()
    return {name: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for name, p in parameters}
