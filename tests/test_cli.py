import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mot_lora
from mot_lora.cli import main
from mot_lora.config import Config
from mot_lora.records import RunRecord

MakeConfig = Callable[..., Config]
COMMAND = str(Path(sys.executable).parent / "mot-lora")


@pytest.fixture
def config_file(make_config: MakeConfig, tmp_path: Path) -> Path:
    config = make_config(rounds=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"output"})))
    return path


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_run_and_export_print_one_json_object(config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = command("run", config_file, f"output={output}", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    assert set(said) == {"run", *RunRecord.model_fields}
    assert said["run"] == str(output)
    assert [r["round"] for r in said["rounds"]] == [1]
    assert said["rounds"][0] == json.loads((output / "round-001" / "round.json").read_text())
    # the stages, and no word from any library
    stages = done.stderr.splitlines()
    assert stages[0] == "load the student"
    assert all(re.fullmatch(r"load the student|(before|round 1(, [ab])?), (train|answer|fold)", s) for s in stages)
    assert len(stages) == len(set(stages))

    out = tmp_path / "student"
    done = command("export", output, "--out", out, "--round", 1, "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert json.loads(done.stdout) == {"out": str(out), "round": 1, "dtype": "bfloat16"}
    assert done.stderr.splitlines() == ["write"]
    assert (out / "config.json").exists()


def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [COMMAND, "run", str(config_file), f"output={output}"]
    with subprocess.Popen(
        [*arguments, "rounds=50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("round 1, b, train") for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    branch = output / "round-001" / "a"
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in branch.iterdir()}
    assert "adapter_model.safetensors" in {f.name for f in before}
    done = command("run", config_file, f"output={output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "round 1, b, train" in done.stdout
    assert "round 1, a, train" not in done.stdout
    assert f"run folder: {output}" in done.stdout
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in branch.iterdir()} == before
    assert process.returncode == 130
    assert stderr == "stopped; the same command goes on from what is finished\n"


def test_a_mistake_is_one_line_and_status_2(config_file: Path) -> None:
    done = command("run", config_file, "rouds=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {config_file}: `rouds` is not a setting; did you mean `rounds`?\n"


# --- in this process, through the same main ------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line: its exit status, and what it printed to both streams."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["mot-lora", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as e:
            status = e.code
        out = capfd.readouterr()
        return status, out.out, out.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a user's mistake."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    return err.removeprefix("error: ").rstrip()


def test_mistakes_name_the_file_or_key(call: Any, config_file: Path, tmp_path: Path) -> None:
    out = f"output={tmp_path / 'run'}"
    assert "`branch.stepz` is not a setting; did you mean `steps`?" in refused(
        call("run", config_file, "branch.stepz=1")
    )
    assert "`rounds`" in refused(call("run", config_file, "rounds=0"))
    assert "not key=value" in refused(call("run", config_file, "rounds"))
    assert str(tmp_path / "absent.yaml") in refused(call("run", tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "bad.yaml: not YAML" in refused(call("run", tmp_path / "bad.yaml"))
    (tmp_path / "blank.yaml").write_text("student: s")
    assert "`teachers`" in refused(call("run", tmp_path / "blank.yaml"))
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in refused(call("run", config_file, out, "device=cuda"))
    absent = tmp_path / "absent.jsonl"
    assert f"{absent}: cannot be read" in refused(call("run", config_file, out, f"eval.data={absent}"))
    assert "neither a folder here nor" in refused(call("run", config_file, out, "student=nobody/nothing", "--json"))
    assert not (tmp_path / "run").exists()
    assert "not a run" in refused(call("export", tmp_path / "run", "--out", tmp_path / "out"))
    (tmp_path / "file").write_text("")
    under = f"output={tmp_path / 'file' / 'run'}"
    assert "cannot be written" in refused(call("run", config_file, under))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert "holds something that is not a run" in refused(call("run", config_file, f"output={taken}"))


def test_a_run_is_told_as_a_table_and_told_again(call: Any, config_file: Path, tmp_path: Path) -> None:
    arguments = ("run", config_file, f"output={tmp_path / 'run'}")
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    for text in ("before", "a alone", "b alone", "after round 1", "all rounds are done"):
        assert text in out
    status, again, err = call(*arguments)
    assert (status, err) == (0, "")
    assert "load the student" not in again
    assert again == out[out.index(again[:40]) :]
    assert "begun with other settings (branch.learning_rate)" in refused(call(*arguments, "branch.learning_rate=0.5"))
    config = yaml.safe_load(config_file.read_text())
    data = Path(config["teachers"][0]["data"])
    content = data.read_text()
    data.write_text(content + content.splitlines()[0] + "\n")
    assert f"{data} changed since" in refused(call(*arguments))
    data.write_text(content + "{\n")
    assert f"{data}:25: not JSON" in refused(call(*arguments))


def test_usage_mistakes_are_one_line_too(call: Any, config_file: Path) -> None:
    assert "--nonsense" in refused(call("run", config_file, "--nonsense"))
    assert "out" in refused(call("export", "somewhere")).lower()
    assert "frobnicate" in refused(call("frobnicate"))


def test_help_names_every_argument(call: Any) -> None:
    for name, words in (
        ("run", ("config", "overrides", "--json", "Example")),
        ("export", ("RUN", "--out", "--round", "--dtype")),
    ):
        status, out, err = call(name, "--help")
        assert (status, err) == (0, "")
        assert all(word in out for word in words)
    status, out, _ = call("--help")
    assert status == 0
    assert "run" in out
    assert "export" in out


def test_no_arguments_show_the_help(call: Any) -> None:
    _, out, err = call()
    assert "export" in out + err
    assert "error:" not in err


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "math_verify")
    code = f"""
import sys, contextlib
import mot_lora, mot_lora.cli
assert "linear" in mot_lora.__all__
sys.argv = ["mot-lora", "run", "--help"]
with contextlib.suppress(SystemExit):
    mot_lora.cli.main()
print([m for m in {heavy} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_every_public_name_is_there() -> None:
    assert all(getattr(mot_lora, name) is not None for name in mot_lora.__all__)
    with pytest.raises(AttributeError, match="no attribute `nothing`"), contextlib.suppress(ImportError):
        mot_lora.nothing  # noqa: B018
