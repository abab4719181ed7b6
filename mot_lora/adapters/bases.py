"""Whether two adapters' bases are one model: by their folders where these exist, else by their names."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.errors import UserError

Verdict = Literal["one", "by name", "unknown", "two"]

# copies of a model in fewer bits, by the suffixes that the Hub's names of them have
COPY = re.compile(
    r"(-unsloth)?(-bnb)?-[48]-?bits?|-(bnb|unsloth|awq|fp8|nf4|bf16|fp16|dynamic)|-(gptq|awq|w\dg?\d*)(-int[48])?|-int[48]"
)
# who puts others' models on the Hubs as they are, or in fewer bits
MIRROR = re.compile(
    "ai-modelscope|huggyllama|llm-research|mlx-community|modelscope|nousresearch|thebloke|unsloth",
)
# words of a folder's name that say nothing about the model in it
GENERIC = re.compile(
    r"[a-z]|actor|adapters?|artifacts?|base|best|bf|bits?|bnb|chat|checkpoints?|ckpts?|content|cpt|current|data|default|dir|"
    r"distill(ed)?|dpo|epochs?|exp|experiments?|export(ed)?|final|fine|finetuned?|fold(er|ed)?|fp|full|global|grpo|hash|hf|"
    r"home|huggingface|input|instruct|it|iter|iterations?|kto|last|latest|llm|lm|local|lora|main|master|merged?|models?|my|"
    r"new|nf|old|orpo|out|outputs?|policy|ppo|pretrain(ed)?|project|pt|pytorch|quantized|ref|repo|results?|rl|rlhf|round|"
    r"runs?|safetensors|saved?|saves|sft|snapshots?|stage|steps?|student|teacher|temp|test|tmp|train(ed|ing)?|transformers|"
    r"tuned?|version|weights|with|work|workspace"
)


class _Name(NamedTuple):
    owner: str  # of a name on the Hub, else empty
    model: str


def compare(one: str, other: str) -> Verdict:
    """What is known of two bases: they are one model, seem so by name only, may or may not be, or are two.

    Folders that are there are compared by their contents. The Hub's name is known as such, in the caches of the Hub and
    of ModelScope, as the last part of a path, and of copies in fewer bits.

    >>> compare("Qwen/Qwen3-0.6B", "/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de2"), compare("/a/model", "/b/model")
    ('one', 'unknown')
    """
    if _plain(one) == _plain(other):
        return "one"
    prints = [_fingerprint(Path(x)) for x in (one, other) if Path(x).is_dir()]
    if len(prints) == 2 and all(prints):
        return "one" if prints[0] == prints[1] else "two"
    x, y = _name(one), _name(other)
    if x == y and x.owner:
        return "one"
    if x.model != y.model:
        return "one" if _joined(x) & {y.model} or _joined(y) & {x.model} else "two"
    if _is_generic(x.model):
        return "unknown"
    if x.owner and y.owner:
        return "one" if any(map(MIRROR.fullmatch, (x.owner, y.owner))) else "by name"
    return "one" if (x.owner or y.owner) and re.search(r"\d", x.model) else "by name"


def _plain(base: str) -> str:
    """A path or name in one spelling: slashes, no last one, no scheme, no revision."""
    text = re.sub(r"^(https?://(huggingface\.co|hf\.co|modelscope\.cn/models)/|hf://|file://)", "", base.strip())
    return re.sub(r"(?<=[^/])@[\w.-]+$", "", text.replace("\\", "/").rstrip("/"))


def _name(base: str) -> _Name:
    text = _plain(base).lower().replace("___", ".")
    parts = [p for p in text.split("/") if p]
    owner, model = "", parts[-1] if parts else ""
    if cached := next((p for p in parts if p.startswith("models--")), None):
        *owners, model = cached.split("--", 2)[1:]
        owner = "".join(owners) or "huggingface"
    elif (len(parts) == 2 and not re.match(r"[/.~]|\w:", text)) or (len(parts) > 2 and "modelscope" in parts):
        owner = parts[-2]
    while (shorter := re.sub(rf"({COPY.pattern})$", "", model)) != model:
        model = shorter
    return _Name(owner, model.removeprefix("meta-"))


def _joined(name: _Name) -> set[str]:
    """The folders into which downloaders put a model of the Hub."""
    return {f"{name.owner}{sign}{name.model}" for sign in ("_", "--", "__")} if name.owner else set()


def _is_generic(model: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{7,64}", model)) or all(map(GENERIC.fullmatch, re.findall(r"[a-z]+", model)))


def _fingerprint(folder: Path) -> str:
    """The fingerprint of a model's folder; empty where it cannot be read as one, as a quantized copy."""
    try:
        return Checkpoint.open(folder).fingerprint()
    except (UserError, OSError):
        return ""
