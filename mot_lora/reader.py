"""The one reader of settings: YAML files and overrides, with errors that name the file and the key."""

import difflib
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from mot_lora.config import Config, MergeConfig, Settings
from mot_lora.errors import UserError
from mot_lora.patterns import PerModule

DEMO = "demo:"  # student: demo:student is the student included in the package
GYM = "reasoning_gym:"  # data: reasoning_gym:chain_sum are generated questions
# owner/name, or an old name without owner; a name with a data file's extension is a file, even if it does not exist
HUB_NAME = re.compile(r"(?!.*\.(jsonl|ndjson|json|csv|tsv|parquet|txt|gz)$)[\w-][\w.-]*(/[\w-][\w.-]*)?")
# the keys whose values are paths or names on the Hub
PATHS = re.compile(
    r"student|(eval|(.*\.)?(noisy|(teachers|union|traces)\.\d+))\.data(\.\d+)?|eval\.(validation|forgetting\..*)"
)
DEEPEST = 8  # dots of such a key; unions may be nested
# what PyYAML raises for invalid text: its own errors, and those of `!!int ""`, `!!bool x` and `!!timestamp x`
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
S = TypeVar("S", bound=Settings)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config; `overrides` are `key=value`, with dots for inner keys and YAML values.

    Relative paths of inputs start at the file's folder, in overrides at the working directory. `output` always starts
    at the working directory; a run's own config.yaml has its folder as output. `demo:NAME` is a file of the package.

    Errors: UserError, one line that names the file and the key.

    >>> load_config("recipes/quickstart.yaml", ["rounds=2"]).rounds  # doctest: +SKIP
    2
    """
    path = Path(path)
    tree = at_places(_read_tree(path), lambda key, place: absolute(place, path.parent, str(path), key))
    if (
        path.name == "config.yaml" and path.with_name("environment.json").exists()
    ):  # a run's config, and the run may have been moved
        tree["output"] = str(path.parent)
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq or not key:
            raise UserError(f"override `{override}` is not key=value, e.g. rounds=2 or branch.steps=20")
        try:
            value = _load_yaml(text)
        except NOT_YAML as e:
            raise UserError(f"override `{override}`: the value is not YAML") from e
        value = at_places(value, lambda key, place: absolute(place, Path(), str(path), key), key)
        _set(tree, key.split("."), value, override)
    return parse_config(tree, str(path))


def _set(node: Any, keys: Sequence[str], value: Any, override: str) -> None:
    """Set a value at dotted keys of a tree; items of a list are numbered from 0."""
    for i, key in enumerate(keys):
        last = i + 1 == len(keys)
        if isinstance(node, list):
            items = cast("list[Any]", node)
            if key not in map(str, range(len(items))):  # int() also takes signs, and refuses long numbers
                raise UserError(f"override `{override}`: `{key}` is not one of 0 to {len(items) - 1}")
            if last:
                items[int(key)] = value
            node = items[int(key)]
        elif isinstance(node, dict):
            inner = cast("dict[str, Any]", node)
            if last:
                inner[key] = value
            node = inner.setdefault(key, {})
        else:
            raise UserError(f"override `{override}`: `{keys[i - 1]}` has no inner keys")


def parse_config(tree: Any, source: str) -> Config:
    """Validate a tree of settings; every error names `source`, the key, and the nearest valid key."""
    return _parse(Config, tree, source)


def load_merge(path: str | Path | None = None, **settings: Any) -> MergeConfig:
    """A merge spec from a YAML file (the settings under `merge:` in a config) and settings that replace the file's.

    A setting given as text is a number, or `PATTERN=NUMBER,PATTERN=NUMBER,...` by module. None means not given.

    Errors: UserError, one line that names the file or the option.

    >>> load_merge(method="ties", density="mlp.*=0.3,.*=0.5").density
    {'mlp.*': 0.3, '.*': 0.5}
    """
    tree = {} if path is None else _read_tree(Path(path))
    for key, value in settings.items():
        if value is not None:
            tree[key] = _per_module(key, value) if key in ("density", "scale") else value
    return _parse(MergeConfig, tree, "merge" if path is None else str(path))


def _per_module(key: str, text: Any) -> PerModule:
    if not isinstance(text, str):
        return text
    try:
        if "=" not in text:
            return float(text)
        pairs = [item.rpartition("=") for item in text.split(",")]
        return {pattern: float(number) for pattern, _, number in pairs}
    except ValueError as e:
        raise UserError(f"{key} {text!r}: give a number, or PATTERN=NUMBER,PATTERN=NUMBER,...") from e


def _parse(kind: type[S], tree: Any, source: str) -> S:
    try:
        settings = kind.model_validate(tree)
        settings.model_dump_json()  # a run folder saves it
        return settings
    except (UnicodeEncodeError, PydanticSerializationError) as e:
        raise UserError(f"{source}: a text holds half a character (a lone surrogate)") from e
    except ValidationError as e:
        errors = e.errors(include_url=False)
        # pydantic reports every alternative of a type: prefer the mapping
        first = next((x for x in errors if "dict[str,float]" in x["loc"][:-1]), errors[0])
        keys = [x for x in first["loc"] if x not in ("float", "dict[str,float]", "[key]", "[name]", "[numbers]")]
        loc = " ".join(".".join(map(str, keys)).split())  # one line, whatever the key
        if first["type"] == "extra_forbidden":
            known = _keys_beside(kind, first["loc"])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{source}: `{loc}` is not a setting; {hint}") from e
        what = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(f"{source}: {f'`{loc}`: ' if loc else ''}{what[0].lower()}{what[1:]}") from e


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [n.value for n, _ in node.value if isinstance(n, yaml.ScalarNode)]
        if twice := next((n for n in names if names.count(n) > 1 and n != "<<"), None):
            raise yaml.YAMLError(f"`{twice}` is given twice, in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree: Any = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); give the path of a YAML config") from e
    except NOT_YAML as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a config: it must hold `key: value` lines")
    return cast("dict[str, Any]", tree)


def demo_path(name: str = "") -> Path:
    """The path of a file included in the package, e.g. demo_path("student")."""
    return Path(str(resources.files("mot_lora") / "demo" / name))


def _keys_beside(kind: type[Settings], loc: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the group that a key is in."""
    for name in loc[:-1]:
        kind = (kind.inner(name) if isinstance(name, str) and name in kind.model_fields else None) or kind
    return list(kind.model_fields)


def at_places(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A tree of settings, or its part at a dotted key, with each path of an input replaced by `change(key, path)`."""
    if isinstance(value, dict) and key.count(".") < DEEPEST:
        inner = cast("dict[Any, Any]", value)
        return {k: at_places(v, change, f"{key}.{k}" if key else str(k)) for k, v in inner.items()}
    if isinstance(value, list) and key.count(".") < DEEPEST:
        return [at_places(v, change, f"{key}.{i}") for i, v in enumerate(cast("list[Any]", value))]
    return change(key, value) if isinstance(value, str) and PATHS.fullmatch(key) else cast("Any", value)


def absolute(place: str, folder: Path, source: str, key: str) -> str:
    """A path relative to a folder as an absolute path; one that does not exist and may be a name on the Hub stays.

    Links are not resolved: in the Hub's cache only the link's name has the file's extension.
    Errors: UserError, which names the source and the key, for an invalid path.
    """
    if place.startswith(DEMO):
        return str(demo_path(place.removeprefix(DEMO)))
    if place.startswith(GYM):
        return place
    try:
        path = folder / Path(place).expanduser()
        target = path.resolve()
        path = target if path.name in ("", "..") else path.parent.resolve() / path.name
        return place if not target.exists() and HUB_NAME.fullmatch(place) else str(path)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{source}: `{key}`: {place!r} is not a usable path ({e})") from e
