"""Metrics and losses on low-rank sketches of a network's tangent features."""

from alignreg import complexity as complexity
from alignreg import estimators as estimators
from alignreg import functional as functional
from alignreg import linear as linear
from alignreg import losses as losses
from alignreg import metrics as metrics
from alignreg import moments as moments
from alignreg import plotting as plotting
from alignreg import sketches as sketches
from alignreg.tangents import TangentFeatures as TangentFeatures

__version__ = "0.1.0"
