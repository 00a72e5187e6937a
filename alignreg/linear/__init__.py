r"""Linear models f = Φw trained in the eigenbasis of their kernel: gradient descent, and SuperNat.

One thin SVD, Φ = Σ_j √λ_j u_j v_jᵀ, reduces training on n examples with P features to r = rank Φ numbers: with
a_j = u_jᵀ∇_f L, a step of size η changes w_j by −η√λ_j a_j. A metric A_ν = Σ_j √ν_j v_j v_jᵀ + Id on the complement
transforms (w, Φ) into (A_νᵀw, A_ν⁻¹Φ): f and all u_j stay the same, and λ_j becomes λ_j/ν_j. Everything is computed in
float64.
"""

from alignreg.linear.metric import one_step_bound as one_step_bound
from alignreg.linear.metric import optimal_metric as optimal_metric
from alignreg.linear.models import GradientDescent as GradientDescent
from alignreg.linear.models import SuperNat as SuperNat
