"""torchmetrics metrics of tangent features."""

from alignreg.estimators import Estimate as Estimate
from alignreg.metrics.alignment import TangentAlignment as TangentAlignment
from alignreg.metrics.base import TangentMetric as TangentMetric
from alignreg.metrics.complexity import PathComplexity as PathComplexity
from alignreg.metrics.complexity import PathHistory as PathHistory
from alignreg.metrics.layerwise import LayerwiseAlignment as LayerwiseAlignment
from alignreg.metrics.participation_ratio import TangentParticipationRatio as TangentParticipationRatio
from alignreg.metrics.probe_set import ProbeSetMetric as ProbeSetMetric
from alignreg.metrics.seen import Kept as Kept
from alignreg.metrics.seen import Sketched as Sketched
from alignreg.metrics.sketch import SketchMetric as SketchMetric
from alignreg.metrics.spectrum import TangentSpectrum as TangentSpectrum
from alignreg.metrics.trace import TangentTrace as TangentTrace
