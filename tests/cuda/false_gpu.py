"""Tests on a false GPU: `@false_gpu(gib=16, capability="7.5")` runs a test in a process of its own, which has one.

The processes are forked from one that has loaded what tests import, one in each session or worker of pytest.

Such a test is an ordinary one: its fixtures are made there, its parameters and marks count, and what fails there is
shown. It asks `falsecuda` for bytes in use, late copies and violations.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from falsecuda import Card, installed, why_not

RUN, SERVE = (Path(__file__).with_name(name) for name in ("run.py", "serve.py"))


def false_gpu(
    name: str = Card.name,
    gib: float = Card.gib,
    capability: str = Card.capability,
    count: int = Card.count,
    seconds: float = 240,
) -> pytest.MarkDecorator:
    """Marks a test to be run where torch sees so many GPUs of this kind, and to be ended after so many seconds."""
    return pytest.mark.false_gpu(Card(name, gib, capability, count), seconds)


def _card(item: pytest.Item) -> Card | None:
    """The card on which a test is still to be run in a process of its own."""
    mark = item.get_closest_marker("false_gpu")
    return mark.args[0] if mark and mark.args[0] != installed() else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """What a test's process makes for it is not made here too."""
    if isinstance(item, pytest.Function) and _card(item):
        item.fixturenames = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that is marked gpu is skipped where there is none, a real one or, by hand, a false one."""
    if item.get_closest_marker("gpu"):
        import torch  # which must not be there before a false GPU is

        if not torch.cuda.is_available():
            pytest.skip("wants a CUDA GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test's process."""
    if not (card := _card(pyfuncitem)):
        return None
    mark = pyfuncitem.get_closest_marker("false_gpu")
    assert mark
    seconds = mark.args[1]
    status, said = run_on(card, [pyfuncitem.nodeid, "-m", ""], seconds, pyfuncitem.config)
    if status is None:
        pytest.fail(f"not done after {seconds:g} s on a false {card.name}\n{said}", pytrace=False)
    if status:
        pytest.fail(f"on a false {card.name}:\n{said}", pytrace=False)
    if " skipped" in said:
        pytest.skip(said.partition("SKIPPED ")[2].partition("\n")[0])
    return True


def run_on(card: Card, arguments: list[str], seconds: float, config: pytest.Config) -> tuple[int | None, str]:
    """Run pytest on a false GPU: its exit status, None where its time was over, and what it said."""
    if reason := why_not():
        # torch's CUDA build has no room for a false GPU anywhere; the rest can be installed
        (pytest.fail if os.environ.get("CI") and "torch" not in reason else pytest.skip)(f"no false GPU here: {reason}")
    server = config.stash.get(SERVER, None)
    if server is None or server.process.poll() is not None:
        server = config.stash[SERVER] = _Server(config.rootpath)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        arguments = [*arguments, "-q", "--no-header", "-rs", "-p", "no:cacheprovider"]
        arguments += ["--basetemp", str(Path(folder, "tmp"))]
        status = server.ask({"card": asdict(card), "arguments": arguments, "log": str(log), "seconds": seconds})
        return status, log.read_text(errors="replace")[-20_000:]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the server end."""
    if server := config.stash.get(SERVER, None):
        server.close()


class _Server:
    """The process that tests are forked from."""

    def __init__(self, root: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CUDA_"))}
        path = os.pathsep.join([str(root), *filter(None, [kept.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), str(SERVE)],
            cwd=root,
            env={**kept, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, told: dict[str, Any]) -> int | None:
        """The exit status of a test's pytest, None where its time was over."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(told), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            self.close()
            pytest.fail(f"the process of false GPUs ended with status {self.process.wait()}", pytrace=False)
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self.process.communicate()  # closes what it reads


SERVER = pytest.StashKey[_Server]()
