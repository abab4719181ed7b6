"""The settings as people read them: the template of `mot-lora init`, the reference, and the keys that help lists.

All three are made from config.py, where each setting is described once.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mot_lora.config import Config, DataConfig, Settings, TeacherConfig

# What a new config sets where the default is another: data, one trace at a time, states to go on from, an early end.
CHOSEN = {
    "teachers.data",
    "branch.batch_size",
    "branch.gradient_accumulation",
    "branch.save_steps",
    "stop.patience",
    "output",
}
HEAD = """\
# A run of Merge of Thought:  mot-lora data THIS_FILE   shows what would be trained on
#                             mot-lora run THIS_FILE    does it, and goes on where it was stopped
# Paths are taken from this file's folder. Any setting can also be given on the command line: rounds=3 lora.r=8
# A setting behind # is not set: what stands there is an example.
"""
SECOND_TEACHER = """\
  - name: second
    data: traces/second.jsonl
"""
WIDTH, COLUMN = 120, 32  # of the template's lines, and where its comments begin
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
PLAIN: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, the values it takes, what it does; `example` is None where the default is one."""

    key: str
    values: str
    choices: bool
    required: bool
    default: Any
    example: Any
    about: str

    @property
    def has_default(self) -> bool:
        """Whether something holds where it is not given."""
        return self.default not in (None, (), {})

    @property
    def in_force(self) -> bool:
        """Whether a new config sets it; otherwise it stands in a comment."""
        return self.required or self.example is None or self.key in CHOSEN


@dataclass(frozen=True)
class Group:
    """The settings under one key of the YAML, and the groups within; an `optional` one is off unless given."""

    key: str
    about: str
    optional: bool
    is_list: bool
    settings: tuple[Setting, ...]
    groups: tuple["Group", ...]

    @property
    def in_force(self) -> bool:
        """Whether a new config sets any of them; otherwise the group stands in a comment."""
        return not self.optional and any(s.in_force for s in self.settings)

    def walk(self) -> Iterator["Group"]:
        """The group and all within it, in order."""
        yield self
        for group in self.groups:
            yield from group.walk()


def settings() -> Group:
    """All that can be set, as the YAML groups it; the settings of a teacher stand under `teachers`.

    >>> [group.key for group in settings().groups]
    ['teachers', 'branch', 'lora', 'merge', 'eval', 'stop', 'compare']
    """
    return _group(Config, "", set())


def template() -> str:
    """A config to start from: every setting with what it means, those that are not set behind `#`."""
    top = settings()
    teachers, *groups = top.groups
    student, *others = top.settings
    blocks = [
        HEAD.splitlines(),
        _entry(student, ""),
        [*_block(teachers, ""), *SECOND_TEACHER.splitlines()],
        [line for setting in others for line in _entry(setting, "")],
        *(_block(group, "") for group in groups),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def reference() -> str:
    """Every setting in Markdown: a heading and a table for each group, of key, values, default and what it does."""
    return "\n".join(line for group in settings().walk() for line in _section(group))


def keys() -> str:
    """The keys of all settings by group, a paragraph each, with what the group is for.

    >>> keys().split("\\n\\n")[3]
    'lora (the adapter of every branch): r, alpha, dropout, rslora, target_modules'
    """
    return "\n\n".join(
        (f"{group.key} ({_phrase(group.about)}): " if group.key else "")
        + ", ".join(_last(s.key) for s in group.settings)
        for group in settings().walk()
    )


# --- what the model says -----------------------------------------------------------------------------


def _group(
    kind: type[Settings], key: str, seen: set[type[Settings]], optional: bool = False, is_list: bool = False
) -> Group:
    """The group of a kind of settings. A kind is described where it stands first: a teacher under `teachers`."""
    seen.add(kind)
    single: list[Setting] = []
    groups: list[Group] = []
    for name, field in _fields(kind):
        full = f"{key}.{name}" if key else name
        inner = kind.inner(name)
        if inner is None or inner in seen:
            single.append(_setting(full, field))
        else:
            groups.append(_group(inner, full, seen, field.default is None, get_origin(field.annotation) is tuple))
    about = " ".join((kind.__doc__ or "").split()) if key else ""
    return Group(key, about, optional, is_list, tuple(single), tuple(groups))


def _fields(kind: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """The fields in the order of the YAML: how rows are read follows the `data` that they are read from."""
    fields = kind.model_fields
    inherited = [name for name in fields if issubclass(kind, DataConfig) and name in DataConfig.model_fields]
    own = [name for name in fields if name not in inherited]
    after = own.index("data") + 1 if inherited else 0
    return [(name, fields[name]) for name in (*own[:after], *inherited, *own[after:])]


def _setting(key: str, field: FieldInfo) -> Setting:
    bounds = [f"{BOUNDS[b]} {getattr(m, b):g}" for m in field.metadata for b in BOUNDS if hasattr(m, b)]
    required = field.is_required()
    return Setting(
        key=key,
        values=", ".join([_values(field.annotation), *bounds]),
        choices=_is_choice(field.annotation),
        required=required,
        default=None if required else field.default,
        example=field.examples[0] if field.examples else None,
        about=field.description or "",
    )


def _is_choice(annotation: Any) -> bool:
    """Whether a field takes one of some words, or nothing."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(get_origin(kind) is Literal for kind in kinds if kind is not NoneType)


def _values(annotation: Any) -> str:
    """The values of a type, as YAML writes them: `[text, ...]` is a list, `{text: number}` a mapping."""
    *most, last = _alternatives(annotation)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(annotation: Any) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(args[0])
    if origin is Literal:
        return [str(choice) for choice in args]
    if origin in (Union, UnionType):
        return [word for arg in args if arg is not NoneType for word in _alternatives(arg)]
    if origin is tuple:
        return [f"[{_values(args[0])}, ...]"]
    if origin is dict:
        return [f"{{{_values(args[0])}: {_values(args[1])}}}"]
    return ["teacher" if annotation is TeacherConfig else PLAIN[annotation]]


def _phrase(sentences: str) -> str:
    """The first of some sentences, as it stands within another."""
    first = sentences.partition(". ")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


# --- the template ------------------------------------------------------------------------------------


def _block(group: Group, indent: str) -> list[str]:
    """The lines of a group, its key first."""
    off = "" if group.in_force else "# "
    lines = _commented(f"{indent}{off}{_last(group.key)}:", _phrase(group.about))
    inner = f"{indent}{off}  " + ("  " if group.is_list else "")
    items = [line for s in group.settings for line in _entry(s, inner, group.in_force)]
    if group.is_list:  # of one item
        items[0] = f"{indent}  - {items[0].lstrip()}"
    return [*lines, *items, *(line for g in group.groups for line in _block(g, inner))]


def _entry(setting: Setting, indent: str, group_in_force: bool = True) -> list[str]:
    """The lines of one setting: its value and what it does."""
    off = "" if setting.in_force or not group_in_force else "# "
    about = f"{setting.values}: {setting.about}" if setting.choices else setting.about
    value = setting.default if setting.example is None else setting.example
    if setting.has_default and value != setting.default:
        about += f" (default: {_yaml(setting.default)})"
    return _commented(f"{indent}{off}{_last(setting.key)}: {_yaml(value)}", about)


def _commented(left: str, about: str) -> list[str]:
    """A line with a comment, which goes on below itself where it is long."""
    indent = left[: len(left) - len(left.lstrip())]
    below = f"{indent}#".ljust(COLUMN) + "# "
    beside = f"{left}  ".ljust(COLUMN) + "# "
    room = len(beside) < WIDTH - COLUMN
    lines = textwrap.wrap(about, WIDTH, initial_indent=beside if room else below, subsequent_indent=below)
    return lines if room else [left, *lines]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


# --- the reference -----------------------------------------------------------------------------------


def _section(group: Group) -> list[str]:
    """The heading and the table of a group, in Markdown."""
    heading = f"## `{group.key}`" if group.key else "## The run"
    rows = [f"| `{s.key}` | {_code(s.values)} | {_default(s)} | {_code(s.about)} |" for s in group.settings]
    return [
        heading,
        "",
        *([group.about, ""] if group.about else []),
        "| Setting | Values | Default | What it does |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    return f"`{_yaml(setting.default)}`" if setting.has_default else "-"


def _code(text: str) -> str:
    """With what is YAML in a text marked as code: lists, mappings, and what has a dot or a line below within."""
    return re.sub(r"\[.*\]|\{.*\}|\b\w+(?:[._*]\w+)+\b", lambda m: f"`{m[0]}`", text)
