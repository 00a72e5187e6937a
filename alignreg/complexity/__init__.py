r"""Measures of complexity to set beside the path's: a Rademacher bound, the margin, and norms of the weights.

The norms are of a network of ``nn.Linear`` and ``nn.Conv2d`` layers W_1, ..., W_L, in the order in which its modules
are registered, each counted once. Modules without parameters pass; a normalization, or any other module with
parameters, is an error, since the norms would leave it out. The kernel of a convolution counts as the matrix
(out, in/groups·kh·kw) (as in Yoshida & Miyato 2017), whose norm is not that of the map of whole images; with groups
as the block matrix with those rows, whose spectral norm is the largest of its blocks'. Biases count where it is said.

All are computed in float64, on the model's device, and carry no gradient; the model stays as it is. None has the
constants, logarithms, norms of the data or roots of n of the bound that it comes from: they compare networks trained on
the same data. Products of many layers may exceed float64, and are then inf.
"""

from alignreg.complexity.measures import bartlett2017 as bartlett2017
from alignreg.complexity.measures import distance as distance
from alignreg.complexity.measures import frobenius_product as frobenius_product
from alignreg.complexity.measures import margin as margin
from alignreg.complexity.measures import neyshabur2018 as neyshabur2018
from alignreg.complexity.measures import path_norm as path_norm
from alignreg.complexity.measures import rademacher_bound as rademacher_bound
from alignreg.complexity.measures import spectral_product as spectral_product
