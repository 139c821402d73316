"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .costs import Sizes as Sizes
from .planning import clock as clock
