"""Small synthetic models, tokenizers, adapters and data, made as other people's tools make them."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    folder: Path | None,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    pad: str | None = "<|pad|>",
    extra: Sequence[str] = (),
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: 256 bytes and the special tokens."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>", "<|bos|>", *extra])
    named = {"eos_token": eos} | ({"pad_token": pad} if pad else {}) | ({"bos_token": bos} if bos else {})
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **named)
    if template:
        made.chat_template = template
    if folder:
        made.save_pretrained(folder)
    return made


def llama(
    folder: Path | None = None, *, tie: bool = False, seed: int = 0, dtype: torch.dtype | None = None, **shape: Any
) -> LlamaForCausalLM:
    """A tiny random Llama, in fp32 unless told."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **shape}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    model = LlamaForCausalLM(LlamaConfig(**{**heads, **shape}, tie_word_embeddings=tie))
    if dtype:
        model = model.to(dtype)
    if folder:
        model.save_pretrained(folder)
    return model


def student(folder: Path, *, shape: dict[str, Any] | None = None, **named: Any) -> PreTrainedTokenizerFast:
    """A tiny chat model's folder, and its tokenizer; keyword arguments are the tokenizer's."""
    made = tokenizer(folder, **named)
    llama(folder, **{"vocab_size": len(made), **(shape or {})})
    return made


def lora(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: Path | None = None,
    seed: int = 1,
    scale: float = 0.3,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> PeftModel:
    """A LoRA with random A and B, saved by PEFT; returns the PEFT model."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    if base:
        model.config._name_or_path = model.name_or_path = str(base)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights and Conv1D
        live = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * scale)
    live.save_pretrained(str(folder), **(save or {}))
    return live.eval()


def rename(folder: Path, how: Callable[[str], str]) -> None:
    """Give the tensors of an adapter other names."""
    file = folder / "adapter_model.safetensors"
    save_file({how(k): t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})


def far(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors of the same names, in fp64."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    return max(float((got[k].double() - want[k].double()).abs().max()) for k in got)


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def rows(n: int = 20, **more: Any) -> list[dict[str, Any]]:
    """A teacher's rows: a question, a chain and an answer each."""
    return [
        {
            "question": f"How much is {i} + {i}?",
            "reasoning": f"{i} and {i} make {2 * i}.",
            "answer": str(2 * i),
            **more,
        }
        for i in range(n)
    ]


def recipe(folder: Path, student: Path, *data: Path, **settings: Any) -> Path:
    """A config of one short round on a CPU, a teacher for each file of data; writes folder/recipe.yaml."""
    tree: dict[str, Any] = {
        "student": str(student),
        "teachers": [{"name": f.name.split(".")[0], "data": str(f)} for f in data],
        "rounds": 1,
        "device": "cpu",
        "quantization": "none",
        "output": str(folder / "run"),
        "branch": {"steps": 4, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-3, "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "eval": {"holdout": 0.2},
    }
    for key, value in settings.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
