"""Torch functions rebuilt from primitive operations, for derivatives that torch's own lack or get wrong."""

from alignreg.tangents.primitives.mode import Checkpoints as Checkpoints
from alignreg.tangents.primitives.mode import Primitives as Primitives
from alignreg.tangents.primitives.mode import is_checkpointed as is_checkpointed
