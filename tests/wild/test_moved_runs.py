"""Runs that moved, alone or with what they read: to another folder, another machine, another name of the same."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from wild import CHATML, jsonl, llama, recipe, rows
from wild import student as make_student
from wild import tokenizer as make_tokenizer

from mot_lora import UserError, export, export_adapter, load_config
from mot_lora.analysis.consensus import consensus
from mot_lora.analysis.experiment import compare
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config
from mot_lora.records import RunRecord
from mot_lora.runs.distillation import run
from mot_lora.runs.inputs import by_content, places, relocated, resolved
from mot_lora.runs.ledger import read_run, settings
from mot_lora.runs.rundir import RunDir

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

Call = Callable[..., tuple[int, str, str]]
FEW = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_length": 512}


def prepare(folder: Path) -> Path:
    """A student, two teachers' traces and questions, and a config of two rounds; relative, as people write it."""
    make_student(folder / "base")
    data = [jsonl(folder / f"{name}.jsonl", rows(12, teacher=name)) for name in ("a", "b")]
    jsonl(folder / "questions.jsonl", [{"question": "How much is 50 + 50?", "answer": "100"}])
    tree = yaml.safe_load(
        recipe(
            folder,
            Path("base"),
            *(Path(f.name) for f in data),
            rounds=2,
            branch=FEW,
            eval={"data": "questions.jsonl", "holdout": 0.2, "max_new_tokens": 2},
        ).read_text()
    )
    tree["output"] = str(folder / "runs/tiny")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def weights_of(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("round-*/*/adapter_model.safetensors"))
    }


def trains_nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is left to train")


def go_on(path: Path, *overrides: str, **seams: Any) -> RunRecord:
    return run(load_config(path, overrides), train=trains_nothing, **seams)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and all that it read; it is not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    run(load_config(prepare(folder)))
    return folder


@pytest.fixture
def home(done: Path, tmp_path: Path) -> Path:
    """That folder where it was made, to be changed: it is brought back afterwards."""
    spare = shutil.copytree(done, tmp_path / "spare")
    yield done
    shutil.rmtree(done, ignore_errors=True)
    shutil.copytree(spare, done)


def test_a_run_that_was_interrupted_and_moved_ends_in_the_same_bytes(done: Path, tmp_path: Path) -> None:
    """huggingface/transformers' threads of paths in a Trainer's state; here within a branch of the second round."""

    def stop(stage: str, step: int, *_: Any, **__: Any) -> None:
        if (stage, step) == ("round 2, a, train", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load_config(prepare(tmp_path / "here")), progress=stop)
    (tmp_path / "here").rename(tmp_path / "there")
    now = tmp_path / "there/runs/tiny"
    steps: list[int] = []
    run(
        load_config(now / "config.yaml"),
        progress=lambda stage, step, *_, **__: steps.append(step) if stage == "round 2, a, train" else None,
    )
    assert steps[0] == 1  # on within the branch
    assert weights_of(now) == weights_of(done / "runs/tiny")
    assert len(weights_of(now)) == 4
    assert not (tmp_path / "here").exists()
    said = places(RunDir(now).config())
    assert said["student"] == str(tmp_path / "there/base")
    assert said["teachers.1.data"] == str(tmp_path / "there/b.jsonl")
    assert RunDir(now).config().output == str(now)


def test_everything_moved_together_is_found_by_every_command(home: Path, tmp_path: Path, call: Call) -> None:
    want = export(home / "runs/tiny", round=2, out=tmp_path / "before")
    there = home.rename(tmp_path / "there")
    now = there / "runs/tiny"
    got = export(now, round=2, out=tmp_path / "after")
    assert got == want
    exported = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert all(exported[0][k].equal(exported[1][k]) for k in exported[0])
    assert consensus(now, traces=1).rounds
    for command in ("data", "plan"):
        status, out, err = call(command, now / "config.yaml", "--json")
        assert (status, err) == (0, "")
    assert "assumed" not in out
    status, out, _ = call("run", now / "config.yaml", "--json")
    assert (status, json.loads(out)["run"]) == (0, str(now))
    assert not home.exists()


@pytest.mark.parametrize("as_it_was", ["copied", "renamed"])
def test_a_run_folder_of_another_name_is_the_same_run(home: Path, as_it_was: str) -> None:
    old, new = home / "runs/tiny", home / "kept/first"
    new.parent.mkdir()
    shutil.copytree(old, new) if as_it_was == "copied" else old.rename(new)
    go_on(home / "recipe.yaml", f"output={new}")
    go_on(new / "config.yaml")
    assert settings(RunDir(new)).student == str(home / "base")
    assert old.exists() == (as_it_was == "copied")


def test_a_run_is_found_from_another_working_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = home.rename(tmp_path / "there")
    monkeypatch.chdir(there / "runs")
    go_on(Path("tiny/config.yaml"))
    monkeypatch.chdir(there / "runs/tiny")
    go_on(Path("config.yaml"))
    assert [p.name for p in (there / "runs").iterdir()] == ["tiny"]  # and no other was begun
    assert export_adapter(".", round=2, out=tmp_path / "adapter").form == "lora"


def test_paths_that_were_given_in_python_are_those_of_their_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    run(Config.model_validate({**tree, "output": "runs/tiny"}), train=trains_nothing)  # student: base
    monkeypatch.chdir(tmp_path)
    assert settings(RunDir(home / "runs/tiny")).student == str(home / "base")
    assert places(RunDir(home / "runs/tiny").config())["eval.data"] == str(home / "questions.jsonl")


def test_the_new_place_of_each_part_can_be_named(home: Path, tmp_path: Path) -> None:
    (home / "base").rename(tmp_path / "model")
    with gzip.open(tmp_path / "traces.of.a.jsonl.gz", "wb") as file:
        file.write((home / "a.jsonl").read_bytes())
    (home / "a.jsonl").unlink()
    (home / "questions.jsonl").rename(tmp_path / "asked.jsonl")
    moved = {"student": "model", "teachers.0.data": "traces.of.a.jsonl.gz", "eval.data": "asked.jsonl"}
    go_on(home / "recipe.yaml", *(f"{key}={tmp_path / name}" for key, name in moved.items()))
    said = places(RunDir(home / "runs/tiny").config())
    assert {key: said[key] for key in moved} == {key: str(tmp_path / name) for key, name in moved.items()}
    # the run knows now, so that neither it nor others are told again
    go_on(home / "runs/tiny/config.yaml")
    export(home / "runs/tiny", round=2, out=tmp_path / "out")


def test_rows_in_another_format_or_dataset_are_the_same_rows(home: Path, tmp_path: Path) -> None:
    """From one split of a dataset to a file, as on a machine without network."""
    import datasets

    dataset = datasets.Dataset.from_list(rows(12, teacher="a"))
    datasets.DatasetDict({"train": dataset, "rest": dataset.select([0])}).save_to_disk(str(tmp_path / "saved"))
    go_on(home / "recipe.yaml", f"teachers.0.data={tmp_path / 'saved'}", "teachers.0.split=train")
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    go_on(home / "recipe.yaml", f"teachers.0.data={tmp_path / 'a.parquet'}")
    with pytest.raises(UserError, match=r"`teachers.0.data`: \S+saved does not hold what \S+a.parquet did"):
        go_on(home / "recipe.yaml", f"teachers.0.data={tmp_path / 'saved'}", "teachers.0.split=rest")


def test_a_source_that_stands_alone_in_a_list_is_no_other(home: Path) -> None:
    go_on(home / "recipe.yaml", f"teachers.0.data=[{home / 'a.jsonl'}]")


def test_a_student_of_the_hub_and_its_copy_in_a_folder_are_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    hub(cache, home / "base", "own/tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    go_on(home / "recipe.yaml", "student=own/tiny")
    assert RunDir(home / "runs/tiny").config().student == "own/tiny"
    export(home / "runs/tiny", round=2, out=tmp_path / "of-the-hub")
    go_on(home / "recipe.yaml")
    assert RunDir(home / "runs/tiny").config().student == str(home / "base")


def hub(cache: Path, model: Path, name: str) -> Path:
    """A cache of the Hub as huggingface_hub makes it: snapshots of links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("c0ffee")
    for i, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_a_path_into_the_hubs_cache_is_found_in_this_machines(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub(tmp_path / "hub", home / "base", "own/tiny")
    go_on(home / "recipe.yaml", f"student={snapshot}")
    (tmp_path / "hub").rename(tmp_path / "cache-of-another-disk")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache-of-another-disk"))
    export(home / "runs/tiny", round=2, out=tmp_path / "out")
    go_on(home / "runs/tiny/config.yaml")
    assert str(tmp_path / "cache-of-another-disk") in RunDir(home / "runs/tiny").config().student


def test_a_file_that_is_a_link_keeps_its_name(home: Path, tmp_path: Path) -> None:
    """What a link of the Hub's cache points at is called by a hash, which does not say what kind of file it is."""
    blob = shutil.copyfile(home / "a.jsonl", tmp_path / f"{1:064x}")
    (tmp_path / "a.jsonl").symlink_to(blob)
    (tmp_path / "current").symlink_to(home / "base")
    go_on(home / "recipe.yaml", f"teachers.0.data={tmp_path / 'a.jsonl'}", f"student={tmp_path / 'current'}")
    assert RunDir(home / "runs/tiny").config().student == str(tmp_path / "current")
    # the link may lead elsewhere then
    (home / "base").rename(tmp_path / "base")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "base")
    export(home / "runs/tiny", round=2, out=tmp_path / "out")


# --- what is not there, or not the same ------------------------------------------------------------------


def other_model(folder: Path, of: Path) -> Path:
    shutil.copytree(of, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t + 0.5 for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_student_or_other_rows_are_refused_by_name(home: Path, tmp_path: Path, call: Call) -> None:
    other = other_model(tmp_path / "other", home / "base")
    jsonl(tmp_path / "fewer.jsonl", rows(11, teacher="b"))
    said = refused(call("run", home / "recipe.yaml", f"student={other}", f"teachers.1.data={tmp_path / 'fewer.jsonl'}"))
    assert f"`student`: {other} does not hold what {home / 'base'} did" in said
    assert f"`teachers.1.data`: {tmp_path / 'fewer.jsonl'} does not hold what {home / 'b.jsonl'} did" in said
    assert "student=PATH" in said
    assert "--from-scratch" in said
    assert RunDir(home / "runs/tiny").config().student == str(home / "base")
    said = refused(call("export", home / "runs/tiny", "--round", 2, "--student", other, "--out", tmp_path / "out"))
    assert said.startswith(f"{other}: not the model that {home / 'runs/tiny'} started with")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_trained_further_in_one_module_is_another(tmp_path: Path) -> None:
    """Its config, the shapes of its tensors and the last megabyte of its file are the same."""
    llama(tmp_path / "base", intermediate_size=4096)
    merged = shutil.copytree(tmp_path / "base", tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 0.01
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    was, now = (Checkpoint.open(tmp_path / name).fingerprints() for name in ("base", "merged"))
    assert was["student"] == now["student"]
    assert was["weights"] != now["weights"]
    assert was == Checkpoint.open(shutil.copytree(tmp_path / "base", tmp_path / "copy")).fingerprints()


def test_weights_or_a_template_that_are_others_are_refused(home: Path, tmp_path: Path) -> None:
    now, file = home / "runs/tiny", home / "runs/tiny/environment.json"
    other = shutil.copytree(home / "base", tmp_path / "template")
    make_tokenizer(other, template=CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(UserError, match=rf"inputs \({other} has another tokenizer now\)"):
        go_on(home / "recipe.yaml", f"student={other}")
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "inputs": {**said["inputs"], "weights": "those of another"}}))
    with pytest.raises(UserError, match=rf"inputs \({home / 'base'} has other weights now\)"):
        go_on(home / "recipe.yaml")
    with pytest.raises(UserError, match="not the model that"):
        export(now, tmp_path / "out", round=2)
    # runs that were begun before these were recorded are not refused for them
    for what in ("weights", "tokenizer"):
        said["inputs"].pop(what)
    file.write_text(json.dumps(said))
    go_on(home / "recipe.yaml")
    assert set(RunDir(now).environment()["inputs"]) >= {"student", "weights", "tokenizer"}


def test_teachers_that_changed_places_are_not_taken_for_each_other(home: Path) -> None:
    with pytest.raises(UserError, match=r"`teachers.0.data`: .*`teachers.1.data`: "):
        go_on(home / "recipe.yaml", f"teachers.0.data={home / 'b.jsonl'}", f"teachers.1.data={home / 'a.jsonl'}")


def test_what_was_read_by_other_rules_is_still_another_setting(home: Path) -> None:
    """The same file again, but with other columns, or more of it, or questions where there were none."""
    with pytest.raises(UserError, match=r"other settings \(teachers.0.columns.gold\)"):
        go_on(home / "recipe.yaml", "teachers.0.columns={gold: teacher}")
    jsonl(home / "more.jsonl", [{"question": "What is 7?", "answer": "7"}])
    with pytest.raises(UserError, match=r"other settings \(eval.validation\)"):
        go_on(home / "recipe.yaml", f"eval.validation={home / 'more.jsonl'}")
    with pytest.raises(UserError, match=r"other settings \(teachers.0.data\)"):
        go_on(home / "recipe.yaml", f"teachers.0.data=[{home / 'a.jsonl'}, {home / 'b.jsonl'}]")


def test_what_is_gone_is_named_with_the_setting_that_says_where_it_is(home: Path, tmp_path: Path, call: Call) -> None:
    now = home / "runs/tiny"
    (home / "base").rename(tmp_path / "model")
    said = refused(call("run", now / "config.yaml"))
    assert said.startswith(f"{home / 'base'}: does not exist")
    assert said.endswith("student=PATH")
    (home / "b.jsonl").rename(tmp_path / "b.jsonl")
    said = refused(call("run", now / "config.yaml", f"student={tmp_path / 'model'}"))
    assert said.startswith(f"{home / 'b.jsonl'}: does not exist")
    assert said.endswith("teachers.1.data=PATH")
    for command in (
        ["export", now, "--round", 2, "--out", tmp_path / "out"],
        ["eval", now, "--round", 2, "--tasks", "gsm8k"],
    ):
        said = refused(call(*command))
        assert said.startswith(f"{home / 'base'}: the student of {now} is not there")
        assert "--student" in said
    status, out, _ = call(
        "export", now, "--round", 2, "--out", tmp_path / "out", "--student", tmp_path / "model", "--json"
    )
    assert (status, json.loads(out)["out"]) == (0, str(tmp_path / "out"))
    assert RunDir(now).config().student == str(home / "base")  # it was for this once


def test_what_needs_no_student_does_without(home: Path, tmp_path: Path, call: Call) -> None:
    (home / "base").rename(tmp_path / "model")
    (home / "a.jsonl").unlink()
    now = home / "runs/tiny"
    assert call("show", now)[0] == 0
    status, out, _ = call("report", now)
    assert status == 0
    assert f"without consensus: {home / 'base'}: the student of" in out
    assert "<svg" in (now / "report.html").read_text()
    assert call("report", now, "--quick")[0] == 0
    export_adapter(now, round=2, out=tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        home / "base"
    )
    other = other_model(tmp_path / "other", tmp_path / "model")
    with pytest.raises(UserError, match="not the model that"):
        export_adapter(now, round=2, out=tmp_path / "again", student=str(other))


def test_a_run_of_a_former_version_is_found_by_its_output(home: Path, tmp_path: Path) -> None:
    file = home / "runs/tiny/environment.json"
    said = json.loads(file.read_text())
    said.pop("folder")
    file.write_text(json.dumps(said))
    there = home.rename(tmp_path / "there")
    export(there / "runs/tiny", round=2, out=tmp_path / "out")
    go_on(there / "runs/tiny/config.yaml")
    assert RunDir(there / "runs/tiny").environment()["folder"] == str(there / "runs/tiny")


# --- comparisons -----------------------------------------------------------------------------------------


def test_a_comparison_that_moved_goes_on_and_borrows(tmp_path: Path) -> None:
    here = tmp_path / "here"
    config = load_config(prepare(here), ["rounds=1"])
    first = compare(config, [0], here / "arms", ["linear"], ["steps"])
    here.rename(tmp_path / "there")
    moved = load_config(tmp_path / "there/recipe.yaml", ["rounds=1"])
    # another arm of the same branches: they are those of the arm that was made before the move
    both = compare(moved, [0], tmp_path / "there/arms", ["linear", "ties"], ["steps"], train=trains_nothing)
    assert both[0] == first[0]
    assert both[1].arm == "ties"
    # and where the config names what is no more
    (tmp_path / "there").rename(tmp_path / "third")
    again = compare(moved, [0], tmp_path / "third/arms", ["linear", "ties"], ["steps"], train=trains_nothing)
    assert again == both
    assert read_run(RunDir(tmp_path / "third/arms/seed-0/ties")).stopped


# --- places ----------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    "student": "owner/model",
    "teachers": (
        {"name": "a", "data": ("x.jsonl", "y.jsonl")},
        {"name": "u", "union": ({"name": "v", "data": "owner/rows", "subset": "s", "split": "train"},)},
    ),
    "eval": {"data": "q.jsonl", "validation": "v.jsonl", "forgetting": {"sums": "reasoning_gym:chain_sum"}},
}


def test_every_place_is_known_by_its_setting() -> None:
    config = Config.model_validate(TREE)
    assert places(config) == {
        "student": "owner/model",
        "teachers.0.data.0": "x.jsonl",
        "teachers.0.data.1": "y.jsonl",
        "teachers.1.union.0.data": "owner/rows",
        "eval.data": "q.jsonl",
        "eval.validation": "v.jsonl",
        "eval.forgetting.sums": "reasoning_gym:chain_sum",
    }
    prints = ["student", "x.jsonl", "y.jsonl", "owner/rows s train", "q.jsonl", "v.jsonl", "reasoning_gym:chain_sum"]
    tree = by_content(config, {name: f"print {i}" for i, name in enumerate(prints)})
    assert tree["student"] == "print 0"
    assert tree["teachers"][0]["data"] == ["print 1", "print 2"]
    member = tree["teachers"][1]["union"][0]
    assert (member["data"], member["subset"], member["split"]) == ("print 3", None, None)
    assert (tree["eval"]["data"], tree["eval"]["validation"]) == ("print 4", "print 5")
    assert tree["eval"]["forgetting"] == {"sums": "print 6"}
    assert by_content(config, {}) == config.model_dump(mode="json")  # what is not known stands for itself


def test_what_is_there_is_not_looked_for(tmp_path: Path) -> None:
    for folder in ("was/run", "now/run"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("was/kept.jsonl", "now/kept.jsonl", "now/moved.jsonl"):
        (tmp_path / file).touch()
    was = tmp_path / "was"
    teachers = tuple({"name": n, "data": str(was / f"{n}.jsonl")} for n in ("kept", "moved", "lost"))
    config = Config.model_validate({"student": "owner/model", "teachers": teachers})
    got = places(relocated(config, was / "run", tmp_path / "now/run"))
    assert got == {
        "student": "owner/model",
        "teachers.0.data": str(was / "kept.jsonl"),
        "teachers.1.data": str(tmp_path / "now/moved.jsonl"),
        "teachers.2.data": str(was / "lost.jsonl"),
    }
    assert relocated(config, None, tmp_path / "now/run") == config


def test_relative_places_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").touch()
    Path("link.jsonl").symlink_to("x.jsonl")
    teachers = tuple({"name": f"t{i}", "data": d} for i, d in enumerate(("x.jsonl", "link.jsonl", "owner/rows")))
    config = Config.model_validate({"student": "owner/model", "teachers": teachers})
    assert list(places(resolved(config)).values()) == [
        "owner/model",
        str(tmp_path / "x.jsonl"),
        str(tmp_path / "link.jsonl"),
        "owner/rows",
    ]
