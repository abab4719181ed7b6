"""The commands: each is one call into the package, and says what it did as a table or as JSON.

A command decides nothing that a function below does not: whoever uses Python can do all that it does.
"""

from mot_lora.cli.app import main

__all__ = ["main"]
