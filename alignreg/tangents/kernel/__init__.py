"""Exact Gram matrices of tangent features, by the rules of layers or from Jacobians."""
