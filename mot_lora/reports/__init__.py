"""Reports: what people look at: live displays, tables, charts and pages, made from records.

Nothing is measured here: a number on a page stands in a record, and a page asks nothing of the network.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
