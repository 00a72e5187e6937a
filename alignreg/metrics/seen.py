"""The data from which a metric computes its number: tables of the columns of a sketch, or the exact kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from alignreg import estimators, functional
from alignreg.population import Columns


class Sketched(NamedTuple):
    """Tables over the m columns of a sketch, any of which may be left out, and further sums over the examples."""

    gram: Tensor
    """Products of the columns ``(m, m)``, of centered features if the metric centers."""
    numerators: Tensor
    """The estimate of yᵀK_c y from each column, ``(m,)``."""
    pairs: Columns | None
    """The same over pairs of different examples, if the metric keeps :class:`.PairSums`."""
    rows: Tensor
    """The number of rows n·c, ()."""
    variance: Tensor
    """‖y − ȳ‖², (); NaN for a metric that needs no targets."""
    block: int
    """The number of consecutive columns that depend on each other."""
    exact: int
    """The number of leading columns along the directions of a pilot, which are not random."""

    @property
    def projection(self) -> Tensor:
        """The estimate of yᵀK_c y / ‖y − ȳ‖² ≥ 0."""
        return estimators.total(self.numerators, self.exact).clamp(min=0) / self.variance

    def standard_error(self, number: Callable[[Sketched], Tensor]) -> Tensor:
        """Return the standard error of a number computed from these data, by :func:`.estimators.standard_error`."""

        def without(gram: Tensor, numerators: Tensor, *pairs: Tensor) -> Tensor:
            some = self.pairs and self.pairs._replace(products=pairs[0], squares=pairs[1])
            return number(self._replace(gram=gram, numerators=numerators, pairs=some))

        pairs = () if self.pairs is None else (self.pairs.products, self.pairs.squares)
        tables = (self.gram, self.numerators, *pairs)
        return estimators.standard_error(without, *tables, block=self.block, exact=self.exact)


class Kept(NamedTuple):
    """The exact kernel of the kept examples, and their targets."""

    K: Tensor
    """The uncentered kernel ``(n, c, n, c)``."""
    y: Tensor
    """Values ``(n, c)``, NaN where they are unknown."""
    centered: bool
    """Whether the metric centers the kernel."""

    @property
    def kernel(self) -> Tensor:
        """The kernel, centered if the metric centers."""
        return functional.center(self.K) if self.centered else self.K
