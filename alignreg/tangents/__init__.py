"""Tangent features of a live model, and everything between the model and products with them."""

from alignreg.tangents.features import TangentFeatures as TangentFeatures
from alignreg.tangents.finite import NonFiniteGradientError as NonFiniteGradientError
from alignreg.tangents.finite import NonFiniteOutputError as NonFiniteOutputError
