"""Exact Gram matrices of tangent features: a rule a layer, and the general way."""
