"""The chain of thought in a text: <think>...</think>, as Qwen3 and its like write it."""

THINK_END = "</think>"
# as OpenThoughts and its like set off the same
MARKS = {
    "<|begin_of_thought|>": "<think>",
    "<|end_of_thought|>": "</think>",
    "<|begin_of_solution|>": "",
    "<|end_of_solution|>": "",
}


def think(reasoning: str, answer: str) -> str:
    r"""A chain of thought and the answer, as the student is to write them; what is already wrapped is not again.

    >>> think("<think>so 2</think>", "2"), think("", "so 2</think>2")
    ('<think>\nso 2\n</think>\n\n2', '<think>\nso 2</think>2')
    """
    for mark, ours in MARKS.items():
        answer = answer.replace(mark, ours)
    if "</think>" in answer:
        # where the template opens the chain, a generated text begins inside it
        return answer if "<think>" in answer else f"<think>\n{answer}"
    reasoning = reasoning.strip().removeprefix("<think>").removesuffix("</think>").strip()
    return f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning else answer


def chain_of(completion: str) -> str | None:
    """The chain of thought of a completion: empty when it has none, None when it never ends.

    >>> chain_of("<think>so 2</think>2"), chain_of("2"), chain_of("<think>so")
    ('so 2', '', None)
    """
    if "<think>" not in completion:
        return ""
    inside, closed, _ = completion.partition("<think>")[2].partition("</think>")
    return inside.strip() if closed else None


def opens_chain(prompt: str) -> bool:
    """Whether a prompt already opens the chain of thought, as templates of models that always think do."""
    return prompt.rstrip().endswith("<think>")
