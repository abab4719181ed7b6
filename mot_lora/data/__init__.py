"""Data: from the rows that people have to traces, tokens and judged answers.

It knows how people write rows, conversations, chains of thought, chat templates and answers. Nothing here loads a
model's weights or trains.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
