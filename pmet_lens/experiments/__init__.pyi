"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .measurements import measure as measure
from .measurements import one_at_a_time as one_at_a_time
from .measurements import others_of as others_of
from .measurements import sequential as sequential
from .measurements import side_by_side as side_by_side
