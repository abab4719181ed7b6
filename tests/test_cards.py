from pathlib import Path

import pytest
import torch

from mot_lora.cards import CARDS, USUAL, find_card, this_card
from mot_lora.errors import UserError


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


def test_a_cpu_has_the_memory_of_the_machine() -> None:
    card = this_card(torch.device("cpu"))
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert card.gib == pytest.approx(int(total.split()[1]) / 2**20)
    assert not card.is_gpu
    assert card.tflops is None
