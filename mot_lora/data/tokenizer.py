"""The student's tokenizer: loaded, checked against its model, and used from texts to tokens and back."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mot_lora.errors import UserError


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The student's tokenizer, padding on the left for generation, with the end tokens and embeddings of its model.

    Errors: UserError when there is none, or it has no chat template or no end token.
    """
    try:
        known = cast("Any", AutoTokenizer).from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # what the libraries raise for a damaged one is of a dozen kinds
        raise UserError(f"{path}: its tokenizer cannot be loaded: {[*str(e).splitlines(), repr(e)][0]}") from e
    if not known.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; use the chat or instruct form of the model")
    known.listed_ends, known.embedded = _listed_ends(path), _embeddings(path, trust_remote_code)
    if known.eos_token_id is None and known.listed_ends:
        known.eos_token = known.convert_ids_to_tokens(known.listed_ends[0])
    if known.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token")
    # what is padded is never looked at, but it is embedded
    pads: list[int] = [p for p in (known.pad_token_id, *end_ids(known)) if isinstance(p, int)]
    pad = next((p for p in pads if p < (known.embedded or p + 1)), pads[0])
    if pad != known.pad_token_id:
        known.pad_token = known.convert_ids_to_tokens(pad)
    known.padding_side = "left"
    return known


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokens of a trace depend on: the vocabulary and the chat template."""
    depends_on = [sorted(tokenizer.get_vocab().items()), cast("Any", tokenizer).chat_template]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _listed_ends(path: Path) -> tuple[int, ...]:
    """The tokens at which a checkpoint says that generation stops."""
    for name in ("generation_config.json", "config.json"):
        try:
            said: Any = json.loads((path / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # loading the model says what is wrong with them
        ends = cast("list[Any]", said) if isinstance(said, list) else [said]
        return tuple(i for i in ends if isinstance(i, int))
    return ()


def _embeddings(path: Path, trust_remote_code: bool) -> int | None:
    """How many tokens the model beside a tokenizer embeds; None where that is unknown."""
    try:
        config = cast("Any", AutoConfig).from_pretrained(path, trust_remote_code=trust_remote_code)
        return getattr(config.get_text_config(), "vocab_size", None)
    except Exception:  # there is no model, or loading it says what is wrong with it
        return None


def check_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Errors: NotEmbeddedError for a token that the model beside the tokenizer does not embed."""
    embedded: int | None = getattr(tokenizer, "embedded", None)
    if embedded is not None and (token := max(ids, default=0)) >= embedded:
        raise NotEmbeddedError(
            f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is beyond the student's {embedded} "
            "embeddings; resize the model (resize_token_embeddings), use its own tokenizer, or leave such rows out"
        )


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which the tokenizer and the checkpoint say that generation stops, the tokenizer's own first."""
    return list(dict.fromkeys([cast("int", tokenizer.eos_token_id), *getattr(tokenizer, "listed_ends", ())]))


class NotEmbeddedError(UserError):
    """A token that the tokenizer has and the model does not embed."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a rendered text, which has its special ones in it."""
    # verbose would warn of more tokens than the tokenizer's file says, which branch.max_length is for
    return cast("Any", tokenizer).encode(text, add_special_tokens=False, verbose=False)


def text_of_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], special: bool = True) -> str:
    """The text of tokens, with its special ones unless `special` is False."""
    return cast("Any", tokenizer).decode(list(ids), skip_special_tokens=not special)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token's own text; a character made of several tokens is given to the last of them.

    >>> pieces(tokenizer, tokenizer.encode("18 apples"))  # doctest: +SKIP
    ['18', ' apples']
    """
    texts: list[str] = []
    before = begin = 0  # a token is read with what stands before it, on which its spaces can depend
    for end in range(1, len(ids) + 1):
        said, whole = (text_of_ids(tokenizer, ids[before:e]) for e in (begin, end))
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and end - begin < 8 and end < len(ids):
            texts.append("")
        else:
            texts.append(whole[len(said) :])
            before, begin = begin, end
    return texts
