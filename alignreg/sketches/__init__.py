"""Random directions in parameter space, random probes on outputs, and other draws that a seed reproduces.

Nothing here uses or changes torch's global random state. A seed is any integer; a wrong number is a ``ValueError``.
Values are drawn in float32 on the device where they are needed and then cast, so a float64 model sees the directions of
its float32 twin. CPU and CUDA draw different Gaussian numbers from the same seed, and the same signs.
"""

from alignreg.sketches.directions import Directions as Directions
from alignreg.sketches.directions import FactoredDirections as FactoredDirections
from alignreg.sketches.directions import GivenDirections as GivenDirections
from alignreg.sketches.directions import RandomDirections as RandomDirections
from alignreg.sketches.directions import factored as factored
from alignreg.sketches.directions import gaussian as gaussian
from alignreg.sketches.directions import rademacher as rademacher
from alignreg.sketches.draws import count_sketch as count_sketch
from alignreg.sketches.draws import probes as probes
from alignreg.sketches.draws import subset as subset
from alignreg.sketches.random import Distribution as Distribution
