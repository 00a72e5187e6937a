"""What a metric has seen of some examples, of which it makes its number: columns of a sketch, or the exact kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from alignreg import estimators, functional
from alignreg.population import Columns


class Sketched(NamedTuple):
    """Tables over the m columns of a sketch, any of which may be left out, and what is known besides."""

    gram: Tensor
    """Products of the columns ``(m, m)``, of centered features where the metric centers."""
    numerators: Tensor
    """yᵀK_c y from each column, ``(m,)``."""
    pairs: Columns | None
    """The same over different examples, where the metric keeps :class:`.PairSums`."""
    rows: Tensor
    """n·c, ()."""
    variance: Tensor
    """‖y − ȳ‖², (); NaN for a metric that needs no targets."""
    block: int
    """How many columns in a row depend on each other."""

    @property
    def projection(self) -> Tensor:
        """yᵀK_c y / ‖y − ȳ‖² ≥ 0."""
        return self.numerators.mean().clamp(min=0) / self.variance

    def standard_error(self, number: Callable[[Sketched], Tensor]) -> Tensor:
        """Return the standard error of a number that is made of this, by :func:`.estimators.standard_error`."""

        def without(gram: Tensor, numerators: Tensor, *pairs: Tensor) -> Tensor:
            some = self.pairs and self.pairs._replace(products=pairs[0], squares=pairs[1])
            return number(self._replace(gram=gram, numerators=numerators, pairs=some))

        pairs = () if self.pairs is None else (self.pairs.products, self.pairs.squares)
        return estimators.standard_error(without, self.gram, self.numerators, *pairs, block=self.block)


class Kept(NamedTuple):
    """The exact kernel of examples that were kept, and their targets."""

    K: Tensor
    """``(n, c, n, c)``, as it is."""
    y: Tensor
    """Values ``(n, c)``, NaN where they are not known."""
    centered: bool
    """Whether the metric centers the kernel."""

    @property
    def kernel(self) -> Tensor:
        """The kernel, centered where the metric centers."""
        return functional.center(self.K) if self.centered else self.K
