import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused, stored

import mot_lora
from mot_lora.config import Config
from mot_lora.reader import load_config
from mot_lora.records import RunRecord
from mot_lora.runs.records import ExportRecord
from mot_lora.settings import keys, template

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

MakeConfig = Callable[..., Config]
COMMAND = str(Path(sys.executable).parent / "mot-lora")


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_run_and_export_print_one_json_object(call: Any, config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = command("run", config_file, f"output={output}", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    assert set(said) == {"run", *RunRecord.model_fields}
    assert said["run"] == str(output)
    assert [r["round"] for r in said["rounds"]] == [1]
    written = json.loads((output / "round-001" / "round.json").read_text())
    assert written == {**said["rounds"][0], "sha256": written["sha256"]}
    # what is read, the stages, and no word from any library
    stages = done.stderr[done.stderr.index("load the student") :].splitlines()
    stage = r"(load the student|(before|round 1(, [ab])?), (train|loss|answer|fold))  \d+/\d+(  (left|loss) .*)?"
    assert all(re.fullmatch(stage, s) for s in stages), stages
    assert "b, one trace, trained between » and «" in done.stderr

    out = tmp_path / "student"
    status, printed, err = call("export", output, "--out", out, "--round", 1, "--json")
    assert (status, printed.count("\n")) == (0, 1)
    said = json.loads(printed)
    assert set(said) == {"out", *ExportRecord.model_fields}
    assert {k: said[k] for k in ("out", "round", "dtype")} == {"out": str(out), "round": 1, "dtype": "bfloat16"}
    assert said["worst"][1] <= said["survived"] <= 1.1
    assert [line.split()[0] for line in err.splitlines()] == ["write"]
    assert (out / "config.json").exists()


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_at_any_command_is_one_line_and_its_status(
    call: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    def load_config(*_: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(mot_lora.reader, "load_config", load_config)  # the moment at which the signal comes
    assert call("data", "my.yaml") == (status, "", "stopped; nothing half-written is left\n")


def test_a_mistake_is_one_line_and_status_2(config_file: Path) -> None:
    done = command("run", config_file, "rouds=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {config_file}: `rouds` is not a setting; did you mean `rounds`?\n"


# --- in this process, through the same main ------------------------------------------------------


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
    assert f"{absent}: no such file" in refused(call("run", config_file, out, f"eval.data={absent}"))
    assert "neither a local folder nor" in refused(call("run", config_file, out, "student=nobody/nothing", "--json"))
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
    table = "Merge of Thought, 4 held-out questions"
    assert again[again.index(table) :] == out[out.index(table) :]
    assert "started with other settings (branch.learning_rate)" in refused(call(*arguments, "branch.learning_rate=0.5"))
    config = yaml.safe_load(config_file.read_text())
    data = Path(config["teachers"][0]["data"])
    content = data.read_text()
    data.write_text(content + content.splitlines()[0] + "\n")
    assert f"{data} has changed" in refused(call(*arguments))
    data.write_text(content + "{\n")
    assert f"{data}:25: not JSON" in refused(call(*arguments, "teachers.0.on_bad_row=stop"))


def test_usage_mistakes_are_one_line_too(call: Any, config_file: Path) -> None:
    assert "--nonsense" in refused(call("run", config_file, "--nonsense"))
    assert "out" in refused(call("export", "somewhere")).lower()
    assert "frobnicate" in refused(call("frobnicate"))


@pytest.fixture
def adapters(qwen3: Path, make_adapter: Any) -> list[Path]:
    """Three adapters of different ranks and modules."""
    settings: list[dict[str, Any]] = [{"r": 2}, {"r": 4, "use_rslora": True}, {"target_modules": ["q_proj", "up_proj"]}]
    return [make_adapter(qwen3, name, seed=i, **settings[i]) for i, name in enumerate("abc")]


def json_of(result: tuple[int, str, str]) -> dict[str, Any]:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def test_merge_writes_what_python_would(call: Any, adapters: list[Path], tmp_path: Path) -> None:
    said = json_of(call("merge", *adapters, "--weights", "2,1,1", "--out", tmp_path / "mean", "--json"))
    assert (said["lost"], said["rank"], said["ranks"]["model.layers.0.self_attn.q_proj"]) == (0, 10, 10)
    merged, exact = mot_lora.load_adapter(tmp_path / "mean"), mot_lora.merge_adapters(adapters, weights=[2, 1, 1])
    for module in exact.shapes:
        torch.testing.assert_close(merged.updates[module].delta(), exact.delta(module))

    settings = ["--method", "ties", "--density", "q_proj=0.3,.*=0.5", "--scale", "2", "--rank", "3"]
    said = json_of(call("merge", *adapters, *settings, "--out", tmp_path / "ties", "--json"))
    dense = mot_lora.merge_adapters(adapters, "ties", density={"q_proj": 0.3, ".*": 0.5}, scale=2)
    copy = mot_lora.load_adapter(tmp_path / "ties")
    apart = {m: float((copy.updates[m].delta() - d).norm() / d.norm()) for m, d in dense}
    assert said["modules"] == pytest.approx(apart, rel=1e-3)
    assert max(apart.values()) > said["lost"] > min(apart.values()) > 0.01

    # the same from a file, where options count more; told as a table
    (tmp_path / "spec.yaml").write_text("method: ties\ndensity: {q_proj: 0.3, .*: 0.5}\nscale: 9")
    options = ["--spec", tmp_path / "spec.yaml", "--scale", "2", "--rank", "3", "--out", tmp_path / "spec"]
    status, out, _ = call("merge", *adapters, *options)
    assert status == 0
    assert f"{said['lost']:.2%} of the merge lost" in out
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ties", "spec")]
    assert files[0] == files[1]


def test_fold_writes_a_model_and_checks_it(call: Any, adapters: list[Path], qwen3: Path, tmp_path: Path) -> None:
    settings = ["--method", "dare_ties", "--density", "0.5", "--seed", "7", "--dtype", "float32"]
    said = json_of(call("fold", qwen3, *adapters, *settings, "--out", tmp_path / "out", "--verify", "--json"))
    merged = mot_lora.merge_adapters(adapters, "dare_ties", density=0.5, seed=7)
    assert said["modules"] == len(merged.shapes) == len(said["verified"]["tensors"])
    assert all(t["error"] <= 1.01 for t in said["verified"]["tensors"].values())
    mot_lora.verify_checkpoint(qwen3, merged, tmp_path / "out", torch.float32)
    other = mot_lora.merge_adapters(adapters, "dare_ties", density=0.5, seed=8)
    with pytest.raises(mot_lora.UserError, match="units of rounding"):
        mot_lora.verify_checkpoint(qwen3, other, tmp_path / "out", torch.float32)
    status, out, _ = call("fold", qwen3, *adapters, "--out", tmp_path / "table", "--verify")
    assert status == 0
    assert "the base's own" in out
    assert f"modules of {qwen3} updated" in out
    assert "of the update survived" in out
    assert "rounded away" not in out


def test_fold_says_that_a_small_update_rounds_away(call: Any, make_adapter: Any, qwen3: Path, tmp_path: Path) -> None:
    tiny = make_adapter(qwen3, "tiny", scale=1e-3)
    said = json_of(call("fold", qwen3, tiny, "--out", tmp_path / "json", "--json"))
    assert said["worst"][1] <= said["survived"] < 0.9
    status, out, _ = call("fold", qwen3, tiny, "--out", tmp_path / "text")
    worst = f"{said['survived']:.4f} of the update survived, {said['worst'][1]:.4f} in {said['worst'][0]}"
    line = f"{worst}: the rest rounded away; --dtype float32 keeps it, and so does `mot-lora merge`, as an adapter"
    assert (status, out.splitlines()[-1]) == (0, line)


def test_inspect_tells_and_draws(call: Any, adapters: list[Path], qwen3: Path, tmp_path: Path) -> None:
    picture = tmp_path / "agreement.png"
    said = json_of(call("inspect", *adapters, "--base", qwen3, "--plot", picture, "--json"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    read = [mot_lora.load_adapter(a) for a in adapters]
    dense = [torch.cat([u.delta(torch.float64).flatten() for _, u in sorted(a.updates.items())]) for a in read[:2]]
    assert [a["name"] for a in said["adapters"]] == ["a", "b", "c"]
    assert [a["norm"] for a in said["adapters"][:2]] == pytest.approx([float(d.norm()) for d in dense])
    cosine = float(dense[0] @ dense[1] / dense[0].norm() / dense[1].norm())
    assert said["overall"]["cosine"][0][1] == pytest.approx(cosine, abs=1e-6)
    weights = torch.cat([stored(qwen3)[f"{m}.weight"].double().flatten() for m in sorted(read[0].updates)])
    assert said["adapters"][0]["relative_norm"] == pytest.approx(float(dense[0].norm() / weights.norm()))
    merged = mot_lora.merge_adapters(adapters)
    lost_sq = sum(float(torch.linalg.svdvals(d.double())[4:].square().sum()) for _, d in merged)
    total_sq = sum(float(d.double().square().sum()) for _, d in merged)
    assert said["lost"]["4"] == pytest.approx((lost_sq / total_sq) ** 0.5)
    conflicts = entries = 0
    for module in merged.shapes:
        signs = torch.stack([a.updates[module].delta().sign() for a in read if module in a.updates])
        conflicts += int((signs.amax(0) * signs.amin(0) < 0).sum())
        entries += signs[0].numel()
    assert said["overall"]["sign_conflict"] == pytest.approx(conflicts / entries)
    assert set(said["layers"]) == {"model.layers.0", "model.layers.1"}

    status, out, _ = call("inspect", adapters[0])
    assert status == 0
    assert all(words in out for words in ("cosine of the updates", "model.layers.1", "rank-r copy"))


def test_mistakes_with_adapters_are_one_line(call: Any, adapters: list[Path], qwen3: Path, tmp_path: Path) -> None:
    a, b, _ = adapters
    out = ["--out", tmp_path / "out"]
    for words, arguments in (
        ("`ties` needs a `density`", ("merge", a, b, "--method", "ties", *out)),
        ("give a rank", ("merge", a, b, "--method", "ties", "--density", "0.5", *out)),
        ("density must be in (0, 1], not 2", ("merge", a, b, "--method", "ties", "--density", "2", *out)),
        ("give a number, or PATTERN=NUMBER", ("merge", a, b, "--method", "ties", "--density", "half", *out)),
        ("matches no module", ("merge", a, b, "--scale", "z_proj=2", *out)),
        ("one number an adapter", ("merge", a, b, "--weights", "1;2", *out)),
        ("3 weights for 2 adapters", ("merge", a, b, "--weights", "1,2,3", *out)),
        ("unknown method `mean`", ("merge", a, b, "--method", "mean", *out)),
        ("cannot be imported", ("merge", a, b, "--method", "nowhere:mean", *out)),
        ("listed twice", ("merge", a, a, *out)),
        ("rank must be at least 1", ("merge", a, b, "--rank", "0", *out)),
        ("space", ("merge", a, b, "--space", "dual", *out)),
        ("neither a local folder nor", ("merge", a, tmp_path / "absent", *out)),
        ("a full model, not an adapter", ("merge", a, qwen3, *out)),
        ("an adapter, not a model", ("fold", a, b, *out)),
        ("exists", ("fold", qwen3, a, "--out", a)),
        ("exists", ("merge", a, b, "--out", b)),
        ("spec.yaml: cannot be read", ("merge", a, b, "--spec", tmp_path / "spec.yaml", *out)),
        (".png, .svg or .pdf", ("inspect", a, "--plot", tmp_path / "picture.txt")),
        ("--out", ("fold", qwen3, a)),
    ):
        assert words in refused(call(*arguments)), arguments
        assert not (tmp_path / "out").exists()


def test_init_writes_a_config_that_loads_and_never_writes_over_one(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    status, out, err = call("init", path)
    assert (status, err) == (0, "")
    assert f"mot-lora data {path}" in out
    assert path.read_text(encoding="utf-8") == template()
    assert load_config(path, ["rounds=3"]).teachers[1].name == "second"
    path.write_text("mine")
    assert f"{path}: exists" in refused(call("init", path))
    assert path.read_text() == "mine"
    assert "cannot be written" in refused(call("init", tmp_path / "nowhere" / "my.yaml"))


def test_data_says_what_would_be_trained_on_and_does_nothing(call: Any, config_file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(config_file.read_text())
    data = Path(config["teachers"][0]["data"])
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows, rows[0], json.dumps({"question": "long", "answer": "9 " * 500})]) + "\n")
    arguments = (config_file, f"output={tmp_path / 'run'}", "branch.max_length=400")
    status, out, err = call("data", *arguments, "--json")
    assert (status, err) == (0, "")
    teacher = json.loads(out)["teachers"][0]
    assert teacher["left_out"] == {"duplicate": 1, "too long": 1}
    assert teacher["rows"] == len(rows) + 2 == teacher["used"] + teacher["held_out"] + 2
    assert [s["trained"] for s in teacher["sample"]] == [False, True]
    status, out, err = call("data", *arguments)
    assert (status, err) == (0, "")
    assert "1 duplicate" in out
    assert "b, one trace, trained between » and «" in out
    assert not (tmp_path / "run").exists()


def test_show_says_where_a_run_stands_and_report_writes_its_page(call: Any, config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, out, err = call("run", config_file, f"output={output}", "-q")
    assert (status, err) == (0, "")
    assert out == f"run folder: {output} (open report.html)\n"
    assert "finished: all rounds are done" in call("show", output)[1]
    page = (output / "report.html").read_bytes()
    assert call("report", output, "--out", tmp_path / "page.html") == (0, f"{tmp_path / 'page.html'}\n", "")
    assert (tmp_path / "page.html").read_bytes() == page
    assert "<svg" in page.decode()
    (output / "round-001" / "round.json").unlink()
    said = json.loads(call("show", output, "--json")[1])
    assert (said["rounds_done"], said["branches"], said["at_work"], said["stopped"]) == (0, ["a", "b"], None, "")
    assert "not running: no round is done yet, of round 1 a, b" in call("show", output)[1]
    shutil.rmtree(output / "round-001" / "b")
    assert "of round 1 a\n" in call("show", output)[1]
    for name in ("show", "report"):
        assert "not a run" in refused(call(name, tmp_path))


def test_from_scratch_begins_beside_and_quiet_ends_with_one_line(call: Any, config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("run", config_file, f"output={output}", "-q")
    assert call(*arguments)[0] == 0
    before = {f: f.read_bytes() for f in output.rglob("*") if f.is_file()}
    status, out, _ = call(*arguments, "seed=1", "--from-scratch")
    assert (status, out) == (0, f"run folder: {output}-2 (open report.html)\n")
    assert {f: f.read_bytes() for f in output.rglob("*") if f.is_file()} == before
    assert load_config(tmp_path / "run-2" / "config.yaml").seed == 1


def test_the_shell_completes_commands_and_options() -> None:
    environment = {**os.environ, "_MOT_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "mot-lora in", "COMP_CWORD": "1"}
    done = subprocess.run([COMMAND], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["init", "inspect"]
    assert "--install-completion" in command("--help").stdout


def test_help_names_every_argument(call: Any) -> None:
    for name, words in (
        ("init", ("CONFIG", "Example")),
        ("data", ("CONFIG", "KEY=VALUE", "--json", "Example")),
        ("run", ("CONFIG", "KEY=VALUE", "--from-scratch", "--repair", "--quiet", "--json", "Example")),
        ("show", ("RUN", "Example")),
        ("report", ("RUN", "--out", "Example")),
        ("export", ("RUN", "--out", "--round", "--as", "--dtype", "--rank", "Example")),
        (
            "merge",
            ("ADAPTER", "--method", "--weights", "--density", "--scale", "--space", "--rank", "--spec", "Example"),
        ),
        ("fold", ("BASE", "ADAPTER", "--method", "--seed", "--dtype", "--verify", "Example")),
        ("inspect", ("ADAPTER", "--base", "--plot", "--json", "Example")),
    ):
        status, out, err = call(name, "--help")
        assert (status, err) == (0, "")
        assert all(word in out for word in words)
    status, out, _ = call("--help")
    assert status == 0
    assert all(f" {name} " in out for name in ("run", "export", "merge", "--version"))
    assert call("--version") == (0, f"{metadata.version('mot-lora')}\n", "")


@pytest.mark.parametrize("name", ["data", "plan", "run", "compare"])
def test_help_names_every_setting_where_settings_are_taken(call: Any, name: str) -> None:
    status, out, _ = call(name, "--help")
    assert status == 0
    said = " ".join(out.split())
    assert all(" ".join(group.split()) in said for group in keys().split("\n\n"))


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
    with pytest.raises(AttributeError, match="No mot_lora attribute nothing"), contextlib.suppress(ImportError):
        mot_lora.nothing  # noqa: B018
