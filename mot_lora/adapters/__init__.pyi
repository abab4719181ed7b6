from .inspection import inspect_adapters as inspect_adapters
from .live import adapter_from_peft as adapter_from_peft
from .live import add_merged_adapter as add_merged_adapter
from .load import load_adapter as load_adapter
from .save import save_adapter as save_adapter
from .sources import merge_adapters as merge_adapters
