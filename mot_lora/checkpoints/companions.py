"""What travels with a model's weights: code, tokenizer, templates, licences; not other weights, nor training state."""

from fnmatch import fnmatch
from pathlib import Path

from mot_lora.errors import UserError

WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx*", "*.ot"),
    *("*.tflite", "*.pkl", "*.distcp", "*.nemo", "*.llamafile", "*.mlmodel", "weights*.npz", "consolidated*"),
)
OF_WEIGHTS = ("*.index.json", "params.json", "adapter_config.json", "*.incomplete")  # files about weights
QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ and ModelOpt
TRAINING = (
    *("trainer_state.json", "training_args.*", "trainer_log.jsonl", "*_results.json", "events.out.tfevents*"),
    *("zero_to_fp32.py", "latest", "checkpoint-*", "global_step*", "runs", "wandb", "logs", "mlruns", "__pycache__"),
)
OTHERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf", "mlx")  # folders: the model as others store it
CARD = ("README*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4")  # the base's, and its pictures
NOT_WANTED = (".*", *WEIGHTS, *TRAINING, *OTHERS, *CARD)
STAY = (*NOT_WANTED, *OF_WEIGHTS, *QUANTIZED)
NOT_DOWNLOADED = [p for name in NOT_WANTED for p in (name, f"{name}/*", f"*/{name}", f"*/{name}/*")]


def companions(folder: Path) -> list[Path]:
    """The files that travel with the weights of a model folder, relative to it.

    All but weights, training state, and files about these or about the base alone (its README). A folder inside that
    holds weights is another model, or the same one in another format.

    Errors: UserError for a link to nothing, as in a cache that was cleared by hand.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if _is(path.name, STAY):
            continue
        if path.is_dir():
            if not _holds_weights(path):
                found += [path.name / inner for inner in companions(path)]
        elif not path.exists():
            raise UserError(f"{path}: a broken link; download the model again")
        elif path.is_file():
            found.append(Path(path.name))
    return found


def _holds_weights(folder: Path) -> bool:
    return any(_is(p.name, WEIGHTS) or (p.is_dir() and _holds_weights(p)) for p in folder.iterdir())


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
