"""The commands: each is one call into the package, and prints its result as a table or as JSON.

Commands make no decisions of their own: everything they do can be done from Python.
"""

from mot_lora.cli.app import main

__all__ = ["main"]
