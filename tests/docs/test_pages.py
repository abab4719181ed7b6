"""The manual: pages that are made from the code are as the code is, and what pages say can be done is done."""

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import typer
import yaml

import mot_lora
from mot_lora.cli.app import app
from mot_lora.config import Config
from mot_lora.reader import parse_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted(DOCS.glob("*.md"))]
REPOSITORY = re.compile(r"https://github\.com/mot-lora/mot-lora/(?:blob|tree)/main/([^)\s#]+)(?:#([^)\s]+))?")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
on_pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def made(name: str) -> ModuleType:
    """A script of docs/make as a module."""
    spec = util.spec_from_file_location(f"docs_{name}", DOCS / "make" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings.md", "commands.md", "python-api.md"])
def test_a_page_that_is_made_is_up_to_date(page: str) -> None:
    assert (DOCS / page).read_text("utf-8") == made("pages").PAGES[page](), "renew it with `make docs`"


def test_the_commands_page_has_every_command_and_every_option() -> None:
    text = (DOCS / "commands.md").read_text("utf-8")
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = re.split(r"^###? ", text.partition(f"### {name}\n")[2], flags=re.MULTILINE)[0]
        assert section, name
        said = set(re.findall(r"`(--?[a-z-]+)`", section))
        real = {o for p in command.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
        assert said == real - {"--help"}, name


def test_the_api_page_has_every_exported_name() -> None:
    text = (DOCS / "python-api.md").read_text("utf-8")
    assert set(re.findall(r"heading: (\w+)", text)) == set(mot_lora.__all__)


def test_the_settings_page_has_every_setting() -> None:
    text = (DOCS / "settings.md").read_text("utf-8")
    for group in ("", "branch", "lora", "merge", "eval", "stop", "compare"):
        fields = Config.model_fields if not group else Config.model_fields[group].annotation.model_fields  # type: ignore[union-attr]
        for name in fields:
            assert f"`{group}.{name}`" in text or f"`{name}`" in text or f"`{name}." in text, (group, name)


@pytest.mark.parametrize("picture", ["packages.svg", "loop.svg"])
def test_a_picture_is_up_to_date(picture: str) -> None:
    assert (DOCS / "pictures" / picture).read_text("utf-8") == made("pictures").DRAWN[picture](), "renew: `make docs`"


def test_the_picture_shows_the_packages_in_the_order_that_is_checked() -> None:
    names: dict[str, float] = {}
    for text in ElementTree.parse(DOCS / "pictures" / "packages.svg").iter("{http://www.w3.org/2000/svg}text"):
        if text.get("font-weight"):
            names[text.text or ""] = float(text.get("y", 0))
    above = names.pop("modules at the root")
    layers = [layer for layer in made("pictures").layers() if (ROOT / "mot_lora" / layer[0]).is_dir()]
    heights = [{names.pop(name) for name in layer} for layer in layers]  # each layer on one line
    assert all(len(ys) == 1 for ys in heights)
    flat = [y for ys in heights for y in ys]
    assert flat == sorted(flat)
    assert flat[-1] < above
    assert not names
    folders = {p.parent.name for p in (ROOT / "mot_lora").glob("*/__init__.py")}
    assert folders == {name for layer in layers for name in layer}


@on_pages
def test_links_lead_to_what_is_there(page: Path) -> None:
    """Within the repository; zensical checks those between the pages of the site, and none that leave it."""
    text = page.read_text("utf-8")
    for path, anchor in REPOSITORY.findall(text):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"
    for target in LINK.findall(BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            there = page.parent / path if path else page
            assert there.exists(), target
            if page.parent == DOCS:
                assert DOCS in [there, *there.resolve().parents], f"{target} is not in the site"
            if anchor and page.name != "python-api.md":
                assert anchor in anchors(there), target


@on_pages
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|json|md|ipynb))`", page.read_text("utf-8")):
        if path.split("/")[0] in ("mot_lora", "tests", "docs", "notebooks", "recipes") or path.endswith(".py"):
            assert (ROOT / path).exists() or (ROOT / "mot_lora" / path).exists(), path


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@on_pages
def test_configs_on_a_page_are_read(page: Path) -> None:
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        if language == "yaml":
            values = yaml.safe_load(text)
            parse_config({"student": "s", "teachers": [{"name": "t", "data": "t.jsonl"}], **values}, page.name)


@on_pages
def test_commands_on_a_page_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    said = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    said += re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    group = typer.main.get_command(app)
    for line in said:
        words = shlex.split(line.strip(), comments=True) if line.strip().startswith("mot-lora ") else []
        if len(words) < 2 or words[1].startswith("-"):
            continue
        command = group.commands.get(words[1])  # type: ignore[attr-defined]
        assert command is not None, line
        real = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words[2:] if w.startswith("--")} <= real | {"--help"}, line


@on_pages
def test_python_on_a_page_imports_what_there_is(page: Path) -> None:
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        if language == "python":
            compile(text, page.name, "exec")
            for names in re.findall(r"^from mot_lora import (.+)$", text, re.MULTILINE):
                assert {n.strip() for n in names.split(",")} <= set(mot_lora.__all__)


@on_pages
def test_targets_of_make_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", page.read_text("utf-8"))) <= targets


def test_the_demo_has_one_table() -> None:
    first, second = (BLOCK.findall((ROOT / page).read_text("utf-8")) for page in ("README.md", "docs/index.md"))
    tables = [text for of in (first, second) for _, text in of if "held-out questions" in text]
    assert len(tables) == 2
    assert tables[0] == tables[1]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


class Images(HTMLParser):
    """The addresses of what a page loads by itself."""

    def __init__(self) -> None:
        """None yet."""
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        stylesheet = tag == "link" and of.get("rel") in ("stylesheet", "preload", "icon", "preconnect")
        self.loaded += [a for a in (of.get("src"), of.get("href") if stylesheet else None) if a]


@pytest.mark.slow
def test_the_site_is_built_without_a_complaint_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    for folder in ("docs", "mot_lora"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for file in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True)
    assert built.returncode == 0, (built.stdout + built.stderr).decode()
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        parser = Images()
        parser.feed(page.read_text("utf-8"))
        assert not [a for a in parser.loaded if "://" in a or a.startswith("//")], page
        assert all(
            (page.parent / a.partition("?")[0]).exists() for a in parser.loaded if not a.startswith(("/", "data:"))
        )
