"""Every model's marks of a chain of thought are read as <think>...</think>, wherever they stand; other text is left."""

import pytest

from mot_lora.data.reasoning import calls_tool, chain_of, think, to_think

END, START, MESSAGE = "<|end|>", "<|start|>assistant", "<|message|>"
ANALYSIS = f"<|channel|>analysis{MESSAGE}so 5"
FINAL = f"<|channel|>final{MESSAGE}5"

# a chain `so 5` and the answer `5`, as each model writes them
WRITTEN = {
    "Qwen3, DeepSeek": "<think>\nso 5\n</think>\n\n5",
    "after a prompt that opens it": "so 5\n</think>\n\n5",
    "gpt-oss": f"{ANALYSIS}{END}{START}{FINAL}<|return|>",
    "gpt-oss, its turn's head first": f"{START}{ANALYSIS}{END}{START}{FINAL}<|return|>",
    "gpt-oss, head in the prompt": f"analysis{MESSAGE}so 5{END}{START}{FINAL}",
    "gpt-oss, constrained": f"{ANALYSIS}{END}{START}<|channel|>final <|constrain|>json{MESSAGE}5{END}",
    "gpt-oss without special tokens": "analysisso 5assistantfinal5",
    "Magistral": "[THINK]so 5[/THINK]5",
    "Kimi": "◁think▷so 5◁/think▷5",
    "Kimi, begun by the template": "so 5◁/think▷5",
    "Seed-OSS": "<seed:think>so 5</seed:think>5",
    "MiniMax-M3": "<mm:think>so 5</mm:think>5",
    "Hunyuan 3": "<think:opensource>so 5</think:opensource>5",
    "Hunyuan 3, opened by its prompt": "so 5</think:opensource>5",
    "Kimi K3": "<|open|>think<|sep|>so 5<|close|>think<|sep|><|open|>response<|sep|>5<|close|>response<|sep|>",
    "Command A": "<|START_THINKING|>so 5<|END_THINKING|><|START_RESPONSE|>5<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\nso 5<channel|>5",
    "MedGemma": "<unused94>thought\nso 5<unused95>5",
    "Apertus": "<|inner_prefix|>so 5<|inner_suffix|>5",
    "s1": "<|im_start|>think\nso 5\n<|im_start|>answer\n5",
    "OpenThoughts": "<|begin_of_thought|>\n\nso 5<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5<|end_of_solution|>",
    "Granite 3.2": "Here is my thought process: so 5\nHere is my response: 5",
    "working out": "<start_working_out>so 5<end_working_out><SOLUTION>5</SOLUTION>",
    "thinking": "<thinking>\nso 5\n</thinking>\n\n5",
    "thought and output": "<Thought>so 5</Thought>\n<Output>5</Output>",
    "reasoning and answer": "<reasoning>\nso 5\n</reasoning>\n<answer>\n5\n</answer>",
    "answer cut short": "<reasoning>so 5</reasoning><answer>5",
    "scratchpad": "<scratchpad>so 5</scratchpad>5",
    "shouted": "<THINK>so 5</THINK>5",
    "only ended": "so 5</thinking>5",
    "only ended, an answer around": "so 5</reasoning><answer>5</answer>",
}


@pytest.mark.parametrize("by", WRITTEN)
def test_a_chain_is_found_in_the_marks_of_every_model(by: str) -> None:
    """thinking-machines-lab/tinker-cookbook#51, simonw/llm-mlx#24, kekzl/imp#768."""
    completion = think("", WRITTEN[by])
    assert completion.count("<think>") == completion.count("</think>") == 1
    assert completion.startswith("<think>")
    assert chain_of(completion) == "so 5"
    assert completion.partition("</think>")[2].strip() == "5"
    assert to_think(completion) == completion


@pytest.mark.parametrize("by", [b for b in WRITTEN if "ended" not in b and "prompt" not in b and "begun" not in b])
def test_a_column_of_chains_may_have_its_own_marks(by: str) -> None:
    whole = to_think(WRITTEN[by])
    chain_alone = WRITTEN[by] if "so 5" in WRITTEN[by] else whole
    assert think(chain_alone, "6") == "<think>\nso 5\n</think>\n\n6"


@pytest.mark.parametrize(
    "text",
    [
        ANALYSIS,
        f"{ANALYSIS}{END}",
        "[THINK]so",
        "◁think▷so",
        "<thinking>so",
        "<|begin_of_thought|>so",
        "<reasoning>so",
        "<|START_THINKING|>so",
    ],
)
def test_a_chain_that_never_ends_is_told(text: str) -> None:
    assert chain_of(to_think(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "",
        "The tag <thinking> opens it and </thinking> closes it.",
        "Use <analysis> as an element: <analysis>x</analysis>.",
        '<b>x</b> <reason code="1">why</reason>',
        "analysis of the problem: 5",
        "<answer>5</answer>",  # no chain stands before it: the teacher's own form
        "<response>5</response>",
        "<think>a</think>b [THINK]c[/THINK]",
        "<think>the mark <thinking> is another's",
        "a <|message|> b",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert to_think(text) == text


def test_channels_that_are_several_are_one_chain_and_one_answer() -> None:
    text = f"{ANALYSIS}{END}{START}<|channel|>commentary{MESSAGE}I add.{END}{START}{FINAL}<|return|>"
    assert to_think(text) == "<think>\nso 5\n\nI add.\n</think>\n\n5"
    assert to_think(f"{START}{FINAL}<|return|>") == "5"
    assert to_think(f"Well. {ANALYSIS}{END}{START}{FINAL}").startswith("Well. <think>")


def test_a_call_in_channels_is_told() -> None:
    assert calls_tool(
        f"{ANALYSIS}{END}{START}<|channel|>commentary to=functions.add <|constrain|>json{MESSAGE}{{}}<|call|>"
    )
    assert not calls_tool(WRITTEN["gpt-oss"])
