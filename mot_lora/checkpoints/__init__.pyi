from .checkpoint import Checkpoint as Checkpoint
from .fold import fold_checkpoint as fold_checkpoint
from .layout import Layout as Layout
from .placement import Placement as Placement
from .tensorfile import TensorFile as TensorFile
from .tensorfile import write_tensors as write_tensors
from .verify import verify_checkpoint as verify_checkpoint
