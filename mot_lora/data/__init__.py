"""Data: from the rows that people have to traces, tokens and judged answers.

It knows the world's spellings of rows, conversations, chains of thought, chat templates and answers, and nothing of
models' weights or of training.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
