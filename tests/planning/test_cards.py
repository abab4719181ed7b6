from pathlib import Path

import pytest
import torch

from mot_lora.errors import UserError
from mot_lora.planning.cards import CARDS, USUAL, find_card, host_limit, host_memory, like, this_card


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_card_is_found_however_it_is_written(name: str) -> None:
    assert find_card(name).name == "RTX 4090"


def test_every_card_is_found_by_its_name() -> None:
    assert [find_card(card.name) for card in CARDS] == list(CARDS)
    assert find_card(USUAL).gib < 24  # what CUDA counts of it


@pytest.mark.parametrize(("name", "hint"), [("RTX 4091", "did you mean RTX 4090"), ("abacus", "RTX 3060")])
def test_an_unknown_card_is_told_with_what_to_do(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"`{name}`.*--gpu-gib.*{hint}"):
        find_card(name)


@pytest.mark.parametrize(
    ("name", "gbps"),
    [
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 576),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4060 Ti", 288),
        ("NVIDIA GeForce RTX 4060", 272),
        ("NVIDIA GeForce RTX 4080 SUPER", 736),
        ("NVIDIA GeForce RTX 3080 Ti", 912),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", None),
        ("Tesla T4", 320),
        ("NVIDIA T400", None),
        ("NVIDIA L4", 300),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A1000", None),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 NVL", 3938),
        ("NVIDIA H100 PCIe", 2000),
    ],
)
def test_a_variant_is_another_card(name: str, gbps: float | None) -> None:
    found = like(name)
    assert (found.gbps if found else None) == gbps


def test_a_cpu_has_the_memory_of_the_machine() -> None:
    card = this_card(torch.device("cpu"))
    assert card.gib == host_limit() / 2**30
    assert not card.is_gpu
    assert card.tflops is None


GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP_2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, files: tuple[str, str, str], limit: int | str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, current, cache = files
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"active_file 1\n{cache} {cached}\npgfault 77\n")


def within(root: Path, said: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(said)
    return root / "sys/fs/cgroup"


MIB = 2**20


def test_without_a_container_the_machine_is_the_limit(tmp_path: Path) -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert host_limit(tmp_path) == int(total.split()[1]) * 1024
    assert host_memory(tmp_path) > 100 * MIB
    top = within(tmp_path, "0::/user.slice\n")
    group(top / "user.slice", GROUP_2, "max", 50 * MIB, 0)
    assert host_limit(tmp_path) == int(total.split()[1]) * 1024


def test_a_container_has_less_than_the_machine(tmp_path: Path) -> None:
    """Version 2, seen from within, where its own group is at the top."""
    group(within(tmp_path, "0::/\n"), GROUP_2, 100 * MIB, 70 * MIB, 30 * MIB)
    assert host_limit(tmp_path) == 100 * MIB
    assert host_memory(tmp_path) == 60 * MIB  # file cache can be given up


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    top = within(tmp_path, "0::/kubepods/pod7/box\n")
    group(top / "kubepods", GROUP_2, 900 * MIB, 850 * MIB, 10 * MIB)
    group(top / "kubepods/pod7", GROUP_2, 300 * MIB, 20 * MIB, 0)
    group(top / "kubepods/pod7/box", GROUP_2, "max", 20 * MIB, 0)
    assert host_limit(tmp_path) == 300 * MIB
    assert host_memory(tmp_path) == 60 * MIB


@pytest.mark.parametrize("place", ["docker/abc", "."])
def test_version_1_is_read_too(tmp_path: Path, place: str) -> None:
    """Its path as the machine sees it, or as Docker does, where that path is not there."""
    top = within(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n")
    group(top / "memory", GROUP_1, 2**63 - 4096, 90 * MIB, 0)
    group(top / "memory" / place, GROUP_1, 80 * MIB, 90 * MIB, 50 * MIB)
    assert host_limit(tmp_path) == 80 * MIB
    assert host_memory(tmp_path) == 40 * MIB


def test_a_full_container_has_nothing_left(tmp_path: Path) -> None:
    group(within(tmp_path, "0::/\n"), GROUP_2, 80 * MIB, 90 * MIB, 0)
    assert host_memory(tmp_path) == 0
