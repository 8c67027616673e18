from . import arithmetic as arithmetic
from . import float8 as float8
from . import merging as merging
from . import nvfp4 as nvfp4
