"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .keys import averaged_keys as averaged_keys
from .keys import current_values as current_values
from .mend_training import MendTraining as MendTraining
