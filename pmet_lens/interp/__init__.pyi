"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .variance import split as split
