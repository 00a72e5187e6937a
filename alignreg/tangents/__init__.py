"""Tangent features of a live model: what is between the model and products with them."""

from alignreg.tangents.features import TangentFeatures as TangentFeatures
