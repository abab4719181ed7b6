"""A merge added to a live PEFT model on a false GPU."""

from pathlib import Path

import falsecuda
import pytest
import torch
from false_gpu import false_gpu
from test_live import deltas_by_hand, layers_of, with_adapters

from mot_lora import add_merged_adapter
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.training.student import load_model

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@false_gpu()
def test_a_merge_is_added_where_the_adapters_are(qwen3: Path, quantization: str) -> None:
    model = with_adapters(load_model(Checkpoint.open(str(qwen3)), quantization, CUDA))
    ids = torch.arange(4, 24, device=CUDA)[None]
    state = torch.cuda.get_rng_state()
    assert add_merged_adapter(model, list("abc"), "mean", weights=(1, 2, 1)).lost == 0
    assert 0 < add_merged_adapter(model, list("abc"), "ties", method="ties", density=0.5, rank=4).lost < 1
    assert torch.equal(torch.cuda.get_rng_state(), state)
    deltas = deltas_by_hand(model)
    for module, layer in layers_of(model).items():
        a, b, c = (delta.cpu() for delta in deltas[module])
        factors = layer.lora_A["mean"].weight, layer.lora_B["mean"].weight
        assert all(f.device == CUDA for f in (*factors, layer.lora_A["ties"].weight))
        got = (layer.scaling["mean"] * (factors[1].double() @ factors[0].double())).cpu()
        torch.testing.assert_close(got, (a + 2 * b + c) / 4, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.set_adapter("mean")
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert falsecuda.reports() == ""
