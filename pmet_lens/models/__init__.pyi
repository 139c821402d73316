"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from .generation import answers as answers
from .tokens import Prompt as Prompt
