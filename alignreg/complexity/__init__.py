r"""Complexity measures to compare with that of the path: a Rademacher bound, the margin, and norms of the weights.

The norms are those of a network of ``nn.Linear`` and ``nn.Conv2d`` layers W_1, ..., W_L, in the order in which its
modules are registered, each counted once. Modules without parameters are ignored. The kernel of a convolution counts
as the matrix (out, in/groups·kh·kw), as in Yoshida & Miyato 2017; its norm is not that of the map between whole images.
With groups, it counts as a block matrix, whose spectral norm is the largest one of its blocks. Biases count only where
a measure says so.

All measures are computed in float64 on the model's device, without a gradient, and leave the model unchanged. They omit
the constants, logarithms, data norms and roots of n of the bounds that they come from, so they compare networks trained
on the same data. Products over many layers may overflow to inf.

Common arguments of the norms are the network ``model``; ``initial``, the network before training or its state dict,
which must be a copy (``copy.deepcopy``), since the result of ``state_dict()`` changes with the model; and ``margin``,
γ > 0. A measure raises a ``TypeError`` if ``model`` is no module, or is sharded, and if ``initial`` is neither a model
nor a state dict. It raises a ``ValueError`` if the model has a normalization or another module with parameters, which
the norm would leave out, no layers, a layer under two names, or weights that are empty, complex or not finite; if
``initial`` does not fit the model or is not finite; or if γ is not positive.
"""

from alignreg.complexity.measures import bartlett2017 as bartlett2017
from alignreg.complexity.measures import distance as distance
from alignreg.complexity.measures import frobenius_product as frobenius_product
from alignreg.complexity.measures import margin as margin
from alignreg.complexity.measures import neyshabur2018 as neyshabur2018
from alignreg.complexity.measures import path_norm as path_norm
from alignreg.complexity.measures import rademacher_bound as rademacher_bound
from alignreg.complexity.measures import spectral_product as spectral_product
