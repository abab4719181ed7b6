"""The pages that are made from the code: settings, commands and the Python API.

`python docs/make/pages.py` renews them, and so does `make docs`.
"""

import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

import mot_lora
from mot_lora.cli.app import app
from mot_lora.records import Record
from mot_lora.settings import reference

DOCS = Path(__file__).parent.parent
MADE = "<!-- Made by docs/make/pages.py from the code: change it there. -->\n"

SETTINGS = """\
# Settings

A config is a YAML file. `mot-lora init my.yaml` writes one with every setting and what it means, and any setting can be
replaced on the command line: `mot-lora run my.yaml rounds=3 merge.method=ties merge.density=0.5`. Relative paths are
taken from the config's folder, but `output` from the folder in which the command is given. An unknown key is an error.

"""
COMMANDS = """\
# Commands

Every command takes `--help`, and `--json` to print one JSON object on standard output and nothing else there. A
mistake in what was given ends with exit status 2 and one line on standard error, which names the file, the key or the
adapter and says what to do. Ctrl-C ends with 130. `mot-lora --install-completion` sets up the shell's completion.

"""
API = """\
# Python API

All of this is imported from `mot_lora`. The packages below have more; only what stands here is kept from one version to
the next. `train=`, `evaluate=` and `progress=` of `run` take functions of your own:
[How it works](how-it-works.md#your-own-parts) has an example.

"""
PACKAGES = {  # the order in which people meet them
    "reports": "Run and compare",
    "runs": "A run's folder",
    "analysis": "Questions asked of runs",
    "adapters": "Adapters",
    "checkpoints": "Full models",
    "merging": "Merging",
    "": "Settings, records and errors",
}


def settings() -> str:
    """The settings, as the config's models describe them."""
    return MADE + SETTINGS + reference().rstrip() + "\n"


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command: the name it has in Python, and what is said of it to Typer."""

    name: str
    kind: Any
    info: Any
    default: Any

    @property
    def is_argument(self) -> bool:
        return isinstance(self.info, typer.models.ArgumentInfo)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def value(self) -> str:
        """What stands for its value in a command line; empty where it takes none."""
        choices = [c for a in (self.kind, *get_args(self.kind)) if get_origin(a) is Literal for c in get_args(a)]
        return "" if self.kind is bool else self.info.metavar or "|".join(choices) or self.name.upper()

    @property
    def names(self) -> list[str]:
        """The names of an option, those that turn it off included; Typer keeps the first in the default's place."""
        said = [d for d in (self.info.default, *(self.info.param_decls or ())) if str(d).startswith("-")]
        return [n for d in said or [f"--{self.name.replace('_', '-')}"] for n in d.split("/")]


def commands() -> str:
    """The commands, as the CLI describes them."""
    parts: dict[str, list[str]] = {}
    for command in app.registered_commands:
        parts.setdefault(str(command.rich_help_panel), []).append(_command(command))
    return MADE + COMMANDS + "\n".join(f"## {part}\n\n" + "\n".join(of) for part, of in parts.items())


def parameters(function: Any) -> list[Parameter]:
    """The arguments and options of a command's function."""
    hints = get_type_hints(function, include_extras=True)
    of = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return [Parameter(name, *get_args(hints[name]), default) for name, default in of.items()]


def _command(command: Any) -> str:
    name = command.name or command.callback.__name__
    *about, example = [" ".join(p.split()) for p in inspect.cleandoc(command.callback.__doc__).split("\n\n")]
    all_of = parameters(command.callback)
    arguments, options = [p for p in all_of if p.is_argument], [p for p in all_of if not p.is_argument]
    usage = [*map(_place, arguments), *(f"{o.names[0]} {o.value}" for o in options if o.required), "[OPTIONS]"]
    rows = [*(f"| `{a.value}` | {a.info.help}{_default(a)} |" for a in arguments), *map(_option, options)]
    example = example.removeprefix("Example: ")
    head = [f"### {name}", "", "\n\n".join(about), "", "```", f"mot-lora {name} {' '.join(usage)}", "```", ""]
    return "\n".join([*head, "| | |", "|---|---|", *rows, "", "For example:", "", "```", example, "```", ""])


def _place(argument: Parameter) -> str:
    many = "list" in str(argument.kind) and not argument.value.endswith("...")
    place = argument.value + ("..." if many else "")
    return place if argument.required else f"[{place}]"


def _option(option: Parameter) -> str:
    names = ", ".join(f"`{n}`" for n in option.names)
    value = f" `{option.value}`".replace("|", "\\|") if option.value else ""
    return f"| {names}{value} | {option.info.help}{_default(option)} |"


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "" if parameter.is_argument else " (required)"
    return "" if parameter.default in (None, "") or not parameter.value else f" (default: `{parameter.default}`)"


def exported() -> dict[str, str]:
    """Every name that `mot_lora` exports, and the module that defines it."""
    tree = ast.parse((Path(mot_lora.__file__).parent / "__init__.pyi").read_text("utf-8"))
    return {a.name: n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}


def api() -> str:
    """Every exported name: a line each, to be read on the forge, and what mkdocstrings makes of its docstring."""
    of: dict[str, list[str]] = {}
    for name, module in exported().items():
        package = module.partition(".")[0]
        of.setdefault(package if package in PACKAGES else "", []).append(name)
    return MADE + API + "\n".join(_part(heading, of[package]) for package, heading in PACKAGES.items())


def _part(heading: str, names: list[str]) -> str:
    rows = [f"| [`{n}`](#{_where(n)}) | {_first_line(getattr(mot_lora, n))} |" for n in names]
    entries = [
        f"::: {_where(n)}\n    options:\n      heading: {n}\n      toc_label: {n}\n{_fields(getattr(mot_lora, n))}"
        for n in names
    ]
    return "\n".join([f"## {heading}", "", "| | |", "|---|---|", *rows, "", *entries])


def _fields(value: Any) -> str:
    """The fields of a record, which have no docstrings of their own; those of a config are on the page of settings."""
    if not (inspect.isclass(value) and issubclass(value, Record)):
        return ""
    types = ((n, inspect.formatannotation(f.annotation).replace("'", '"')) for n, f in value.model_fields.items())
    return "\n".join(
        ["", "```python", *(f"{n}: {re.sub(r'[a-z_.]+[.](?=[A-Z])', '', t)}" for n, t in types), "```", ""]
    )


def _where(name: str) -> str:
    """Where a name is defined, below what wraps it."""
    return f"{getattr(getattr(mot_lora, name), '__module__', f'mot_lora.{exported()[name]}')}.{name}"


def _first_line(value: Any) -> str:
    said = (inspect.getdoc(value) or "") if callable(value) else "The merge methods, by name."
    return re.split(r"\n\n|(?<=\.)\s", said)[0].replace("\n", " ").replace("|", "\\|")


PAGES = {"settings.md": settings, "commands.md": commands, "python-api.md": api}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
