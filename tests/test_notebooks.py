"""The notebooks, executed as they stand. `python tests/test_notebooks.py` executes them and writes them back."""

import ast
import base64
import importlib
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.timeout(900)  # seconds, for whole runs on a slow machine

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ("bring_your_own_trainer", "quickstart")
PLACES = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|Users|usr|opt|var)/|[A-Z]:\\|site-packages")


class ThisPython(AsyncKernelManager):
    """Starts kernels of this Python, whatever kernels are installed."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def load(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def execute(name: str, folder: Path) -> NotebookNode:
    """The notebook with what it gives in an empty folder and a fresh kernel of this Python."""
    notebook = load(name)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(folder)}},
    )
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(folder / ".ipython")}
    client.execute(env={**os.environ, **own})
    notebook.metadata.language_info = {"name": "python"}  # not which Python it was
    return notebook


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> list[tuple[str, list[str]]]:
    """What sorts of output a cell has."""
    return [(o.output_type, [o.name] if o.output_type == "stream" else sorted(o.data)) for o in cell.outputs]


def text(notebook: NotebookNode, cell: str) -> str:
    """What a cell printed, and its results as text."""
    outputs = next(c.outputs for c in code(notebook) if c.id == cell)
    return "\n".join(o.text if o.output_type == "stream" else o.data["text/plain"] for o in outputs)


def words(notebook: NotebookNode) -> str:
    """All that can be read in a notebook."""
    shown = [o.get("data", {"": o.get("text")}) for cell in code(notebook) for o in cell.outputs]
    outputs = [said for data in shown for kind, said in data.items() if not kind.startswith("image/")]
    return "\n".join([cell.source for cell in notebook.cells] + outputs)


def pictures(notebook: NotebookNode) -> list[bytes]:
    found = [o.data["image/png"] for c in code(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    return [base64.b64decode(picture) for picture in found]


def check_outputs(notebook: NotebookNode, committed: NotebookNode) -> None:
    """Nothing on stderr, and the committed file has outputs of the same kinds."""
    assert [kinds(cell) for cell in code(notebook)] == [kinds(cell) for cell in code(committed)]
    assert "stderr" not in str([kinds(cell) for cell in code(notebook)])
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_is_clean(name: str) -> None:
    notebook = load(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert not PLACES.search(words(notebook))
    assert all(not cell.metadata for cell in notebook.cells)
    assert f"blob/main/notebooks/{name}.ipynb" in notebook.cells[0].source
    assert any(cell.outputs for cell in code(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_imports_what_there_is(name: str) -> None:
    lines = "\n".join(cell.source for cell in code(load(name))).splitlines()
    tree = ast.parse("\n".join(re.sub(r"^( *)%.*", r"\1pass", line) for line in lines))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert len([node for node in imports if str(node.module).startswith("mot_lora")]) >= 3
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    notebook, committed = execute("quickstart", tmp_path), load("quickstart")
    check_outputs(notebook, committed)
    assert [p[:4] for p in pictures(notebook)] == [b"\x89PNG"] * 4
    assert [p[:4] for p in pictures(committed)] == [b"\x89PNG"] * 4

    rounds = re.findall(r"(before|after round \d).*?([\d.]+) % \(([\d.]+) to ([\d.]+)\)", text(notebook, "run"))
    assert [row[0] for row in rounds] == ["before", "after round 1", "after round 2"]
    assert float(rounds[-1][2]) > float(rounds[0][1])  # the end's lower bound is above where it began
    assert re.search(r"done in \d+:\d\d", text(notebook, "run"))
    assert "model.safetensors" in text(notebook, "export")
    assert re.search(r"<think>\n.+\n</think>\n\n\d+$", text(notebook, "own").strip(), re.DOTALL)

    in_loop, in_4_bits, in_16_bits = text(notebook, "same").splitlines()
    right, right_4, right_16 = (int(re.search(r": (\d+) of 60 right", s)[1]) for s in (in_loop, in_4_bits, in_16_bits))
    assert abs(right - right_4) <= 3
    assert abs(right - right_16) <= 6
    assert int(re.search(r"(\d+) texts", in_4_bits)[1]) >= 50


@pytest.mark.slow
def test_bring_your_own_trainer(tmp_path: Path) -> None:
    notebook, committed = execute("bring_your_own_trainer", tmp_path), load("bring_your_own_trainer")
    check_outputs(notebook, committed)
    said = text(notebook, "compare")
    assert float(re.search(r"losses of a step: (\S+)", said)[1]) < 1e-3
    rows = [line.split() for line in said.splitlines() if re.match(r" +(steps|gains_first) ", line)]
    assert [row[:3] for row in rows] == [
        [teacher, trainer, "10"] for teacher in ("steps", "gains_first") for trainer in ("built-in", "trl")
    ]
    assert rows[0][3] == rows[1][3]  # as many tokens trained: the masks are the same
    assert rows[2][3] == rows[3][3]


if __name__ == "__main__":
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(name, Path(folder))
        (NOTEBOOKS / f"{name}.ipynb").write_text(nbformat.writes(executed) + "\n", encoding="utf-8")
