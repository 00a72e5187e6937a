"""torchmetrics metrics of tangent features."""

from alignreg.metrics.alignment import AlignmentEstimate as AlignmentEstimate
from alignreg.metrics.alignment import TangentAlignment as TangentAlignment
from alignreg.metrics.complexity import PathComplexity as PathComplexity
from alignreg.metrics.complexity import PathHistory as PathHistory
from alignreg.metrics.layerwise import LayerwiseAlignment as LayerwiseAlignment
from alignreg.metrics.spectrum import TangentSpectrum as TangentSpectrum
