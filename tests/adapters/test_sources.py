"""Adapters from folders, Hub names, live models and Adapters, in any mixture."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_config, dense, fresh, peft_adapter, peft_model, stored
from peft import PeftModel

from mot_lora import Adapter, Factors, UserError, adapter_from_peft, fold_checkpoint, load_adapter, merge_adapters
from mot_lora.adapters.sources import check_bases, read_adapters, short_names
from mot_lora.checkpoints.checkpoint import Checkpoint

Q: dict[str, Any] = {"target_modules": ["q_proj"], "r": 3}


@pytest.fixture
def folders(bases: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Three adapters of one base."""
    made = {name: tmp_path / "adapters" / name for name in "abc"}
    for seed, folder in enumerate(made.values()):
        peft_adapter(bases["tied"], folder, seed, **Q)
    return made


@pytest.fixture
def live(bases: dict[str, Path], folders: dict[str, Path]) -> PeftModel:
    return peft_model(bases["tied"], **folders)


# --- whatever they are -----------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[dict[str, Path], PeftModel], Any]] = {
    "path": lambda folders, _: folders["b"],
    "text": lambda folders, _: str(folders["b"]),
    "Adapter": lambda folders, _: load_adapter(folders["b"]),
    "model and name": lambda _, live: (live, "b"),
    "Adapter of a model": lambda _, live: adapter_from_peft(live, "b"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_mix(folders: dict[str, Path], live: PeftModel, source: str) -> None:
    mixed = [folders["a"], SOURCES[source](folders, live), (live, "c")]
    merged = merge_adapters(mixed, weights=[3, 2, 1])
    assert [a.name for a in merged.adapters] == ["a", "b", "c"]
    exact = [dense(load_adapter(folders[n])) for n in "abc"]
    assert merged.shapes.keys() == exact[0].keys()
    for module, delta in merged:
        want = sum(w * d[module] for w, d in zip((3, 2, 1), exact, strict=True)) / 6
        torch.testing.assert_close(delta.double(), want, rtol=1e-5, atol=1e-7)


def test_a_live_model_stands_for_its_active_adapter(folders: dict[str, Path], live: PeftModel) -> None:
    live.set_adapter("b")
    merged = merge_adapters([folders["a"], live])
    assert [a.name for a in merged.adapters] == ["a", "b"]
    want = dense(load_adapter(folders["b"]))
    assert all(torch.equal(dense(merged.adapters[1])[m], d) for m, d in want.items())


def test_one_adapter_is_a_merge_too(folders: dict[str, Path]) -> None:
    for module, delta in merge_adapters([folders["a"]]):
        torch.testing.assert_close(delta.double(), dense(load_adapter(folders["a"]))[module], rtol=1e-6, atol=1e-8)


def test_a_link_to_a_folder_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folders["a"])
    assert load_adapter(tmp_path / "link").updates.keys() == load_adapter(folders["a"]).updates.keys()


def test_a_relative_path_and_the_folder_one_stands_in(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["a"])
    assert [a.name for a in read_adapters([".", "../b", Path("../c")])] == ["a", "b", "c"]


# --- names -----------------------------------------------------------------------------------------------


def test_folders_of_one_name_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    paths = [tmp_path / run / "checkpoint-9" for run in ("one", "two", "three")]
    for source, path in zip(folders.values(), paths, strict=True):
        shutil.copytree(source, path)
    merged = merge_adapters(paths, "dare_linear", density=0.5)
    assert [a.name for a in merged.adapters] == ["one/checkpoint-9", "two/checkpoint-9", "three/checkpoint-9"]
    # their names seed what is dropped, so they must not depend on where all of it lies
    shutil.move(tmp_path / "one", tmp_path / "elsewhere-one")
    assert [a.name for a in read_adapters(paths[1:])] == ["two/checkpoint-9", "three/checkpoint-9"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["x/a", "y/b"], ["a", "b"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["r/x/a", "s/x/a", "s/y/b"], ["r/x/a", "s/x/a", "s/y/b"]),
        (["only/one"], ["one"]),
        (["org/model-a", "other/model-a"], ["org/model-a", "other/model-a"]),
        ([], []),
    ],
)
def test_short_names_are_as_short_as_can_be(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(p) for p in paths]) == names


@pytest.mark.parametrize(
    "twice",
    [
        lambda f, _: [f, f],
        lambda f, _: [str(f), f],
        lambda f, _: [f, f / ".." / f.name],
        lambda f, link: [f, link],
    ],
    ids=["equal", "as text", "by another way", "by a link"],
)
def test_a_folder_twice_is_refused(folders: dict[str, Path], tmp_path: Path, twice: Any) -> None:
    (tmp_path / "link").symlink_to(folders["a"])
    with pytest.raises(UserError, match=r"listed twice.*weight"):
        merge_adapters(twice(folders["a"], tmp_path / "link"))


def test_adapters_of_one_name_are_refused(folders: dict[str, Path], live: PeftModel) -> None:
    with pytest.raises(UserError, match="different names"):
        merge_adapters([(live, "a"), (live, "a")])
    with pytest.raises(UserError, match="different names"):
        merge_adapters([folders["a"], (live, "a")])
    renamed = merge_adapters([load_adapter(folders["a"], "other"), (live, "a")])
    assert [a.name for a in renamed.adapters] == ["other", "a"]


# --- what is none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/nothing", "not here", "a/b/c", "", "nobody/nothing@main", "/no/where"])
def test_a_name_that_cannot_be_had_is_one_line(name: str, folders: dict[str, Path]) -> None:
    for call in (lambda: load_adapter(name), lambda: merge_adapters([folders["a"], name])):
        with pytest.raises(UserError) as e:
            call()
        assert "\n" not in str(e.value)
        assert name in str(e.value)


def test_what_is_no_adapter_is_named(bases: dict[str, Path], folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="Qwen3ForCausalLM is no adapter"):
        merge_adapters([fresh(bases["tied"])])
    with pytest.raises(UserError, match="dict is no adapter"):
        merge_adapters([folders["a"], {}])
    with pytest.raises(UserError, match="NoneType is no adapter"):
        merge_adapters([None])
    with pytest.raises(UserError, match=r"a full model, not an adapter: it has no adapter_config\.json"):
        merge_adapters([folders["a"], bases["tied"]])
    with pytest.raises(UserError, match="at least one"):
        merge_adapters([])


def test_a_live_model_without_such_an_adapter_lists_what_it_has(live: PeftModel) -> None:
    with pytest.raises(UserError, match="no adapter `d`; it has a, b, c"):
        merge_adapters([(live, "d")])


def test_a_model_with_an_adapter_of_transformers_own_is_read_or_named(
    bases: dict[str, Path], folders: dict[str, Path]
) -> None:
    model = fresh(bases["tied"])
    model.load_adapter(str(folders["a"]))
    try:
        merged = merge_adapters([model])
    except UserError as e:
        assert "Qwen3ForCausalLM" in str(e)  # noqa: PT017
    else:
        assert merged.shapes.keys() == load_adapter(folders["a"]).updates.keys()


# --- bases -----------------------------------------------------------------------------------------------


def test_adapters_of_two_bases_are_refused_unless_their_base_is_named(
    bases: dict[str, Path], folders: dict[str, Path]
) -> None:
    change_config(folders["b"], base_model_name_or_path="some/other-model")
    with pytest.raises(UserError, match=r"`a` was trained on .*, `b` on some/other-model.*base= or --base"):
        merge_adapters([folders["a"], folders["b"]])
    for base in (bases["tied"], str(bases["tied"]), Checkpoint.open(bases["tied"])):
        assert len(merge_adapters([folders["a"], folders["b"]], base=base).adapters) == 2
    change_config(folders["b"], base_model_name_or_path=None)  # one that does not say fits any
    merge_adapters([folders["a"], folders["b"]])


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B", "/models/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B", "/models/Qwen3-0.6B/", True),
        ("meta-llama/Llama-3.2-1B", "unsloth/llama-3.2-1b-unsloth-bnb-4bit", True),
        ("meta-llama/Llama-3.2-1B", "unsloth/llama-3.2-1b-bnb-4bit", True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", False),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", False),
        ("Qwen/Qwen3-0.6B", None, True),
        (None, None, True),
    ],
)
def test_a_4_bit_copy_of_a_model_is_the_model(one: str | None, other: str | None, alike: bool) -> None:
    def adapter(name: str, base: str | None) -> Adapter:
        return Adapter(name, {"m": Factors(torch.ones(1, 2), torch.ones(3, 1))}, base)

    adapters = [adapter("x", one), adapter("y", other)]
    if alike:
        check_bases(adapters)
        merge_adapters(adapters)
    else:
        with pytest.raises(UserError, match=r"`x` was trained on .*`y` on "):
            merge_adapters(adapters)


def test_adapters_of_other_shapes_are_refused(bases: dict[str, Path], qwen3: Path, tmp_path: Path) -> None:
    peft_adapter(bases["tied"], tmp_path / "small", 0, **Q)
    peft_adapter(bases["untied"], tmp_path / "alike", 1, **Q)
    peft_adapter(qwen3, tmp_path / "large", 0, **Q)
    with pytest.raises(UserError, match=r"`large`, module model\.layers\.0\.self_attn\.q_proj: shape .*one base"):
        merge_adapters([tmp_path / "small", tmp_path / "large"], base=bases["tied"])
    # of one shape, but of a base of another name
    with pytest.raises(UserError, match=r"`small` was trained on .*tied, `alike` on .*untied"):
        merge_adapters([tmp_path / "small", tmp_path / "alike"])


def test_a_layer_and_a_bare_parameter_do_not_mix(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(bases["tied"], tmp_path / "layer", 0, target_modules=["q_proj"])
    peft_adapter(bases["tied"], tmp_path / "bare", 0, target_modules=["o_proj"], target_parameters=["q_proj.weight"])
    with pytest.raises(UserError, match=r"q_proj: some adapters hold it as a layer, others as a bare parameter"):
        merge_adapters([tmp_path / "layer", tmp_path / "bare"])
    # two merges of one ledger add up
    layer, bare = (merge_adapters([tmp_path / name]) for name in ("layer", "bare"))
    out = fold_checkpoint(bases["tied"], [layer, bare], tmp_path / "out")
    q = "model.layers.0.self_attn.q_proj"
    change = stored(out)[f"{q}.weight"] - stored(bases["tied"])[f"{q}.weight"]
    torch.testing.assert_close(change, layer.delta(q) + bare.delta(f"{q}.weight"), rtol=1e-5, atol=1e-6)


def test_reading_is_left_until_it_is_needed(folders: dict[str, Path]) -> None:
    """A merge is only a plan: two adapters that are merged take what one module takes."""
    merged = merge_adapters([folders["a"], folders["b"]])
    first, again = merged.delta(next(iter(merged.shapes))), merged.delta(next(iter(merged.shapes)))
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
