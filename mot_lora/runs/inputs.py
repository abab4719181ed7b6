"""What a run reads, its student and its data: told by what they hold, wherever they lie."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from mot_lora.config import Config
from mot_lora.data.rows import source_name
from mot_lora.reader import absolute, at_places


def by_content(config: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """The settings as a tree, with the fingerprint of what lies at each place instead of the place, where it is known.

    Two of them are alike where the same was asked of the same, whatever its name: a model of the Hub and its copy in a
    folder, a split of a dataset and the file that it was written to.

    >>> config = Config(student="owner/model", teachers=({"name": "a", "data": "a.jsonl"},))
    >>> by_content(config, {"student": "c0ffee"})["student"]
    'c0ffee'
    """

    def known(source: str | None) -> str | None:
        return source and fingerprints.get(source_name(source), source)

    tree = _by_content(config.model_dump(mode="json"), fingerprints)
    tree["student"] = fingerprints.get("student", tree["student"])
    tree["eval"]["validation"] = known(tree["eval"]["validation"])
    tree["eval"]["forgetting"] = {name: known(source) for name, source in tree["eval"]["forgetting"].items()}
    return tree


def _by_content(node: Any, fingerprints: Mapping[str, str]) -> Any:
    if isinstance(node, list):
        return [_by_content(item, fingerprints) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    tree = {key: _by_content(value, fingerprints) for key, value in cast("dict[str, Any]", node).items()}
    data: str | list[str] = tree.get("data") or []
    sources = [data] if isinstance(data, str) else data
    found = [fingerprints.get(source_name(s, tree["subset"], tree["split"])) for s in sources]
    if found and all(found):
        tree |= {"data": found[0] if isinstance(data, str) else found, "subset": None, "split": None}
    return tree


def places(config: Config) -> dict[str, str]:
    """Where everything is that a run reads, by the key of the setting.

    >>> places(Config(student="owner/model", teachers=({"name": "a", "data": "a.jsonl"},)))
    {'student': 'owner/model', 'teachers.0.data': 'a.jsonl'}
    """
    found: dict[str, str] = {}
    at_places(config.model_dump(mode="json"), lambda key, place: found.setdefault(key, place))
    return found


def resolved(config: Config) -> Config:
    """With the places of what is on this disk as absolute paths: they mean the same in every working directory."""
    return _with_places(config, lambda key, place: absolute(place, Path(), "config", key))


def found(config: Config, was: Path | None, now: Path) -> Config:
    """With places where nothing is any more taken from where it is now: as the run's folder moved, from `was` to `now`,
    or in this machine's cache of the Hub. What is not found stays as it is.
    """
    return _with_places(config, lambda _, place: _found(place, was, now))


def gone(config: Config) -> dict[str, str]:
    """The places at which nothing is, by the key of the setting; names of the Hub are not asked."""
    return {key: place for key, place in places(config).items() if _is_gone(place)}


def _with_places(config: Config, change: Callable[[str, str], str]) -> Config:
    tree = config.model_dump(mode="json")
    changed = at_places(tree, change)
    return config if changed == tree else Config.model_validate(changed)


def _found(place: str, was: Path | None, now: Path) -> str:
    if not _is_gone(place):
        return place
    moved = [os.path.normpath(now / os.path.relpath(place, was))] if was else []
    _, cached, inside = place.partition("/models--")
    if not cached:
        _, cached, inside = place.partition("/datasets--")
    if cached:
        from huggingface_hub.constants import HF_HUB_CACHE

        moved.append(f"{HF_HUB_CACHE}{cached}{inside}")
    return next((path for path in moved if os.path.exists(path)), place)  # noqa: PTH110


def _is_gone(place: str) -> bool:
    return os.path.isabs(place) and not os.path.exists(place)  # noqa: PTH110, PTH117
