"""Functions of torch from primitive operations, for derivatives that torch's own do not have or get wrong."""

from alignreg.tangents.primitives.mode import Checkpoints as Checkpoints
from alignreg.tangents.primitives.mode import Primitives as Primitives
from alignreg.tangents.primitives.mode import is_checkpointed as is_checkpointed
