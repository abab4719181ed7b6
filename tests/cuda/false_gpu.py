"""Tests on a false GPU: `@false_gpu(gib=16, capability="7.5")` runs a test in a process of its own, which has one.

Such a test is an ordinary one: its fixtures are made there, its parameters and marks count, and what fails there is
shown. It asks `falsecuda` for bytes in use, late copies and violations.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from falsecuda import Card, installed, why_not

RUN = Path(__file__).with_name("run.py")


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
    if reason := why_not():
        # torch's CUDA build has no room for a false GPU anywhere; the rest can be installed
        (pytest.fail if os.environ.get("CI") and "torch" not in reason else pytest.skip)(f"no false GPU here: {reason}")
    mark = pyfuncitem.get_closest_marker("false_gpu")
    assert mark
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RUN), *card.options(), "-m", "pytest", pyfuncitem.nodeid, "-m", ""]
        command += ["-q", "--no-header", "-rs", "-p", "no:cacheprovider", "--basetemp", folder]
        root = pyfuncitem.config.rootpath
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CUDA_"))}
        environment = {**kept, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [kept.get("PYTHONPATH")])])}
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=mark.args[1], check=False
            )
        except subprocess.TimeoutExpired as e:
            said = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
            pytest.fail(f"not done after {mark.args[1]:g} s on a false {card.name}\n{said[-8000:]}", pytrace=False)
    if done.returncode:
        pytest.fail(f"on a false {card.name}:\n{done.stdout[-20000:]}\n{done.stderr[-4000:]}", pytrace=False)
    if " skipped" in done.stdout:
        pytest.skip(done.stdout.partition("SKIPPED ")[2].partition("\n")[0])
    return True
