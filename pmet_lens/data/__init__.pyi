"""What notebooks and figures use of this room beside the names of `pmet_lens` itself."""

from . import world as world
from .datasets import parse_known as parse_known
from .file_format import hash_of as hash_of
from .file_format import whole as whole
from .world import Document as Document
from .world import World as World
