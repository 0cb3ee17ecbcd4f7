"""Faults and generated input: what a run and the readers survive. The tests run short forms.

The models, corpora and settings are those of the tests, whose folder is put on the path here.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
