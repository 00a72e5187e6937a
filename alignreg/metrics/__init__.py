"""torchmetrics metrics of tangent features."""

from alignreg.metrics.alignment import AlignmentEstimate as AlignmentEstimate
from alignreg.metrics.alignment import TangentAlignment as TangentAlignment
