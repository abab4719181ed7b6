"""Folders of models and adapters, on this disk or downloaded from the Hub."""

from pathlib import Path
from typing import Any, cast

from mot_lora.errors import UserError


def locate(
    name: str | Path, patterns: list[str] | None = None, kind: str = "model", ignore: list[str] | None = None
) -> Path:
    """A local folder, or that of a Hub repository, with its files that match the patterns downloaded."""
    path = Path(name)
    return path if path.is_dir() else download(str(name), patterns, kind, ignore)


def download(
    name: str, patterns: list[str] | None = None, kind: str = "model", ignore: list[str] | None = None
) -> Path:
    """The folder of a Hub repository, its files that match the patterns downloaded once into the Hub's cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            cast("Any", huggingface_hub).snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignore)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"{name}: neither a local folder nor a {kind} that can be downloaded from the Hub ({reason})"
        ) from e
