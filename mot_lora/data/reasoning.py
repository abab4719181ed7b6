"""The chain of thought in a text: <think>...</think>, as Qwen3 and its like write it, and the marks of other models."""

import re

THINK, THINK_END = "<think>", "</think>"

# begin and end of a chain, and the marks around the answer after it; none of them occurs in ordinary text
MARKS = (
    ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),  # OpenThoughts
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>", "<|open|>response<|sep|>", "<|close|>response<|sep|>"),  # Kimi K3
    ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<unused94>thought", "<unused95>"),  # MedGemma
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|im_start|>think", "<|im_start|>answer"),  # s1
    ("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>"),  # Unsloth's recipes
)
# these can occur in any text: a chain is where a text begins with one, or only closes one
_WORD = "think|thinking|thoughts?|reasoning|reason|analysis|scratchpad|reflection|cot|chain_of_thought"
ELEMENT = re.compile(rf"\s*<({_WORD})>(.*?)(?:</\1>(.*)|\Z)", re.DOTALL | re.IGNORECASE)
ENDED = re.compile(rf"</({_WORD})>", re.IGNORECASE)
ANSWER = re.compile(r"\s*<(answer|final_answer|output|solution|response)>(.*?)(?:</\1>)?\s*", re.DOTALL | re.IGNORECASE)
# Granite 3.2; gpt-oss without its special tokens
PHRASES = (("Here is my thought process:", "Here is my response:"), ("analysis", "assistantfinal"))
# gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
CHANNEL = re.compile(
    r"(?:<\|start\|>[^<]*)?(?:<\|channel\|>|\A)\s*(analysis|commentary|final)\b[^<]*(?:<\|constrain\|>[^<]*)?"
    r"<\|message\|>(.*?)(?:<\|(?:end|return|call)\|>|(?=<\|start\|>|<\|channel\|>)|\Z)",
    re.DOTALL,
)
CALLED = re.compile(r"<\|call\|>|<\|channel\|>[^<]*\bto=")


def to_think(text: str) -> str:
    r"""A text with its chain of thought in <think> and </think>, whatever marks it has; one without a chain as it is.

    >>> to_think("[THINK]so 2[/THINK]2"), to_think("<reasoning>so 2</reasoning><answer>2</answer>")
    ('<think>so 2</think>2', '<think>so 2</think>2')
    >>> to_think("<|channel|>analysis<|message|>so 2<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>")
    '<think>\nso 2\n</think>\n\n2'
    """
    if THINK_END in text or text.lstrip().startswith(THINK):
        return text
    if "<|message|>" in text and CHANNEL.search(text):
        return text if calls_tool(text) else _from_channels(text)
    for begins, ends, *around in MARKS:
        if begins in text or ends in text:
            for mark, ours in ((begins, THINK), (ends, THINK_END), *((mark, "") for mark in around)):
                text = text.replace(mark, ours)
            return text
    for begins, ends in PHRASES:
        if text.lstrip().startswith(begins) and ends in text:
            chain, _, answer = text.lstrip().removeprefix(begins).partition(ends)
            return f"{THINK}{chain}{THINK_END}{answer}"
    if found := ELEMENT.match(text):
        chain, answer = found[2], found[3]
        return f"{THINK}{chain}" + ("" if answer is None else f"{THINK_END}{_bare(answer)}")
    ended = ENDED.search(text)
    if ended and not re.search(rf"<{ended[1]}\b", text, re.IGNORECASE):
        return f"{text[: ended.start()]}{THINK_END}{_bare(text[ended.end() :])}"
    return text


def _bare(answer: str) -> str:
    """An answer without the element that is around all of it."""
    around = ANSWER.fullmatch(answer)
    return around[2] if around else answer


def _from_channels(text: str) -> str:
    found = [*CHANNEL.finditer(text)]
    chain = "\n\n".join(m[2].strip() for m in found if m[1] != "final")
    answer = [m[2].strip() for m in found if m[1] == "final"]
    before = text[: found[0].start()].removesuffix("<|start|>assistant")
    thought = f"{THINK}\n{chain}\n" + (f"{THINK_END}\n\n" if answer else "") if chain else ""
    return before + thought + "\n\n".join(answer)


def think(reasoning: str, answer: str) -> str:
    r"""A chain of thought and the answer, as the student is to write them; wrapped only once.

    >>> think("<think>so 2</think>", "2"), think("", "so 2</think>2")
    ('<think>\nso 2\n</think>\n\n2', '<think>\nso 2</think>2')
    """
    answer = to_think(answer)
    if THINK_END in answer:
        # where the template opens the chain, a generated text begins inside it
        return answer if THINK in answer else f"{THINK}\n{answer}"
    reasoning = to_think(reasoning.strip()).removeprefix(THINK).partition(THINK_END)[0].strip()
    return f"{THINK}\n{reasoning}\n{THINK_END}\n\n{answer}" if reasoning else answer


def chain_of(completion: str) -> str | None:
    """The chain of thought of a completion: empty when it has none, None when it never ends.

    >>> chain_of("<think>so 2</think>2"), chain_of("2"), chain_of("<think>so")
    ('so 2', '', None)
    """
    if THINK not in completion:
        return ""
    inside, closed, _ = completion.partition(THINK)[2].partition(THINK_END)
    return inside.strip() if closed else None


def opens_chain(prompt: str) -> bool:
    """Whether a prompt already opens the chain of thought, as templates of models that always think do."""
    return prompt.rstrip().endswith(THINK)


def calls_tool(text: str) -> bool:
    """Whether a text holds a call of a tool in gpt-oss's own marks, with what the tool then said.

    >>> calls_tool("<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>")
    True
    """
    return bool(CALLED.search(text))
