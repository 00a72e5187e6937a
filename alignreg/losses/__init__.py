"""Differentiable losses on the tangent features of a live model, each added to a training loop with one line."""

from alignreg.losses.alignment import AlignmentLoss as AlignmentLoss
from alignreg.losses.base import TangentLoss as TangentLoss
from alignreg.losses.complexity import ComplexityPenalty as ComplexityPenalty
from alignreg.losses.kare import KARELoss as KARELoss
from alignreg.losses.participation_ratio import ParticipationRatioLoss as ParticipationRatioLoss
from alignreg.losses.probes import ProbeLoss as ProbeLoss
