"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .measure import measure as measure
from .measure import one_at_a_time as one_at_a_time
from .measure import others_of as others_of
from .measure import sequential as sequential
from .measure import side_by_side as side_by_side
