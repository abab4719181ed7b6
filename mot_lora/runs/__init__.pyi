from .distillation import preview as preview, run as run, stages as stages
from .export import export as export, export_adapter as export_adapter
from .ledger import read_ledger as read_ledger, read_run as read_run, read_state as read_state
from .loop import Evaluate as Evaluate, Loop as Loop, Train as Train
from .rundir import RunDir as RunDir
