"""Programs to run, each by its path or as ``python -m recipes.NAME``; what they share is imported from beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
