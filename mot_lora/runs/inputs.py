"""A run's inputs, its student and data, identified by content instead of by path."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from mot_lora.config import Config
from mot_lora.data.rows import source_name
from mot_lora.reader import absolute, at_places

CACHED = re.compile(r"[/\\]((?:models|datasets)--.*)")  # a place in the Hub's cache, after the folder of the cache


def by_content(config: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """The settings as a tree in which each path with a known fingerprint is replaced by that fingerprint.

    Two such trees are equal if the settings and the contents of the inputs are, whatever the inputs are called: a model
    of the Hub and a local copy of it, or a split of a dataset and a file with the same rows.

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
    contents = [fingerprints.get(source_name(s, tree["subset"], tree["split"])) for s in sources]
    if contents and all(contents):
        tree |= {"data": contents[0] if isinstance(data, str) else contents, "subset": None, "split": None}
    return tree


def places(config: Config) -> dict[str, str]:
    """The path of every input of a run, by the key of its setting.

    >>> places(Config(student="owner/model", teachers=({"name": "a", "data": "a.jsonl"},)))
    {'student': 'owner/model', 'teachers.0.data': 'a.jsonl'}
    """
    paths: dict[str, str] = {}
    at_places(config.model_dump(mode="json"), lambda key, place: paths.setdefault(key, place))
    return paths


def resolved(config: Config) -> Config:
    """The config with local paths made absolute, so that they do not depend on the working directory."""
    return _with_places(config, lambda key, place: absolute(place, Path(), "config", key))


def relocated(config: Config, was: Path | None, now: Path) -> Config:
    """The config with missing paths replaced by their new location: moved along with the run's folder, from `was` to
    `now`, or in this machine's cache of the Hub. A path found in neither stays.
    """
    return _with_places(config, lambda _, place: _relocated(place, was, now))


def missing(config: Config) -> dict[str, str]:
    """The local paths that do not exist, by the key of the setting; names on the Hub are not looked up."""
    return {key: place for key, place in places(config).items() if _is_missing(place)}


def _with_places(config: Config, change: Callable[[str, str], str]) -> Config:
    tree = config.model_dump(mode="json")
    changed = at_places(tree, change)
    return config if changed == tree else Config.model_validate(changed)


def _relocated(place: str, was: Path | None, now: Path) -> str:
    if not _is_missing(place):
        return place
    moved = list[str]()
    with suppress(ValueError):  # on Windows, from one drive to another there is no way
        moved += [os.path.normpath(now / os.path.relpath(place, was))] if was else []
    if cached := CACHED.search(place):
        from huggingface_hub.constants import HF_HUB_CACHE

        moved.append(os.path.normpath(f"{HF_HUB_CACHE}/{cached[1]}"))
    return next((path for path in moved if os.path.exists(path)), place)  # noqa: PTH110


def _is_missing(place: str) -> bool:
    return os.path.isabs(place) and not os.path.exists(place)  # noqa: PTH110, PTH117
