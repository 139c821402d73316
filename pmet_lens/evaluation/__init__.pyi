"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .metrics import interval as interval
from .metrics import means as means
from .metrics import paired as paired
from .scoring import score as score
