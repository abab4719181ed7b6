"""What the columns of people's data are called, by what they hold."""

import re

# What columns are called. Of two that mean the same, a row may fill one; which one is said in `columns` otherwise.
QUESTION = ("question", "problem", "prompt", "instruction", "query")
# These are the question only where none of the above is filled, the first of them that is there.
ELSE_QUESTION = ("task", "question_stem", "input", "inputs", "user", "user_prompt", "ctx", "goal", "sentence")
REASONING = (
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "think",
    "cot",
    "chain_of_thought",
    "complex_cot",
    "reasoning_content",
    "reasoning_trace",
    "rationale",
    "trajectory",
    "thinking_trajectory",
    "thinking_trajectories",
    "deepseek_thinking_trajectory",
    "gemini_thinking_trajectory",
    "deepseek_reasoning",
    "think_content",
    "reasoning_details",
)
RESPONSE = (
    "completion",
    "response",
    "output",
    "attempt",
    "generation",
    "generated_solution",
    "deepseek_attempt",
    "gemini_attempt",
    "deepseek_solution",
    "assistant",
    "answer_content",
    "llm_response",
    "model_response",
    "model_output",
    "generated_text",
    "completions",
    "responses",
    "outputs",
    "attempts",
    "generations",
    "generated_solutions",
)
GOLD = ("gold", "gold_answer", "ground_truth", "expected_answer", "reference_answer", "reference", "target")
# These are the teacher's words where nothing in RESPONSE is, the first of them that is there; else the right answer.
WRITTEN = ("solution", "answer", "final_answer")
RIGHT = ("answer", "final_answer", "solution", "answers", "answers_spans", "ground_truth_solution", "solutions")
# where verl and SYNTHETIC-1 have it; AM has it in a message's info
NESTED = ("reward_model.ground_truth", "verification_info.ground_truth", "extra_info.answer")
MESSAGES = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog", "chat")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
# what a question is about: it stands before it
CONTEXT = ("context", "passage", "article", "paragraph", "document", "documents", "story", "premise", "support")
ABOUT = ("text", "content", "contents", "contexts", "paragraphs", "sentences", "documents", "passages", "summary")
NUMBERED = re.compile(r"r1_solution_\d+")  # DeepMath's generations
# the dataset's own verdicts on each of several generations, as open-r1 has them, and whether a generation ends
CORRECT = ("correctness_math_verify", "correctness_llama", "correctness", "is_correct", "correct")
COMPLETE = ("is_reasoning_complete",)
MEDIA = re.compile(r"(images?|img|pictures?|audios?|speech|videos?)([ _]?\d+|_(path|url|file|bytes)s?)?")
PREFERRED = ("chosen",)  # the better answer of a pair
DESIRED = ("label", "kto_tag")  # whether an answer is a good one: TRL and ms-swift, LlamaFactory
CALLED = ("tool_calls", "function_call")
NO_CHAIN = ("on", "off", "yes", "no", "true", "false", "high", "medium", "low")  # settings of how much to think
NO_ANSWER = ("proof", "notfound", "not found")  # NuminaMath-1.5's words for a problem without one
