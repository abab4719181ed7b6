"""A run's student on the tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

import difflib
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import torch

from mot_lora import durable
from mot_lora.analysis.quiet import Watch, hushed
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.durable import read_record, write_record
from mot_lora.errors import UserError, enough_memory, writing
from mot_lora.progress import Progress, silent
from mot_lora.records import Record
from mot_lora.runs.export import Chosen, choose, export
from mot_lora.runs.ledger import open_student
from mot_lora.training.memory import loaded

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

EXPORTED = torch.bfloat16  # the dtype of the export, and of the measurement if the device supports it


class Score(Record):
    """A metric's value and its standard error, from lm-eval."""

    value: float
    stderr: float | None = None

    @property
    def text(self) -> str:
        """`0.420 ± 0.014`."""
        return f"{self.value:.3f}" if self.stderr is None else f"{self.value:.3f} ± {self.stderr:.3f}"


class TaskRecord(Record):
    """The student's scores on one task or group of tasks, by metric, and W_0's if it was measured too.

    Metrics have lm-eval's names, with their filter if there is one: `acc`, `exact_match,strict-match`. `weights` is the
    dtype or quantization; `version` is the task's, `lm_eval` the harness's.
    """

    task: str
    weights: str
    chat_template: bool
    shots: int | None
    limit: int | None
    max_new_tokens: int | None
    questions: int
    scores: dict[str, Score]
    base: dict[str, Score] | None = None
    version: float | str | None = None
    lm_eval: str

    @property
    def settings(self) -> str:
        """The settings of the measurement: `bfloat16, 5-shot`."""
        parts = [self.weights]
        parts += [f"{self.shots}-shot"] if self.shots is not None else []
        parts += [f"{self.max_new_tokens} new tokens"] if self.max_new_tokens else []
        return ", ".join([*parts, *(["no chat template"] if not self.chat_template else [])])


class HarnessRecord(Record):
    """All results of lm-eval for the student after a round; `student` is a hash of the records of its rounds."""

    round: int
    student: str
    results: tuple[TaskRecord, ...] = ()

    def including(self, new: Sequence[TaskRecord]) -> "HarnessRecord":
        """With new results, each replacing an older one of the same task and settings; W_0's scores are kept."""
        results = {(r.task, r.settings, r.limit): r for r in self.results}
        for r in new:
            key = r.task, r.settings, r.limit
            old = results.get(key, r)
            results[key] = r if r.base else r.model_copy(update={"base": old.base})
        return self.model_copy(update={"results": tuple(results.values())})


def evaluate_run(
    run: str | Path,
    tasks: Sequence[str],
    *,
    round: int | None = None,
    student: str | None = None,
    quantized: bool = False,
    base: bool = False,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    chat_template: bool = True,
    include_path: str | Path | None = None,
    progress: Progress = silent,
) -> HarnessRecord:
    """Measure a run's student after `round` (default: the best one) on tasks of lm-eval, and W_0 too with `base`.

    The student is exported in bf16 to a temporary folder beside the run; a GPU without bf16 measures it in fp16. With
    `quantized` it is measured as the loop has it in memory. `student` is the path of its base, as in `export`. `limit`
    takes only the first questions of each task; `include_path` is a folder of your own tasks. The answer is the text
    after `</think>`, if there is one. All results of a round are kept in RUN/eval/round-NNN.json, by task and settings,
    and returned.

    Errors: UserError as in `export`; if lm-eval is not installed, a task is unknown or its data cannot be loaded.

    >>> evaluate_run("runs/quickstart", ["gsm8k"], limit=100).results[0].scores  # doctest: +SKIP
    {'exact_match,strict-match': Score(value=0.31, stderr=0.0465), ...}
    """
    chosen = choose(run, round, student)
    open_student(chosen.rundir, chosen.config)  # to report what is wrong with it before the tasks are read
    device, dtype = _device(chosen)
    asked = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": chat_template,
        "gen_kwargs": None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
    }

    def measured(who: str) -> dict[str, Any]:
        loaded = _load(manager, tasks)
        with _model(chosen, who, device, None if quantized else dtype, batch_size, shown) as lm:
            Watch(lm, who, shown)
            return _simple_evaluate(lm, tasks=loaded, task_manager=manager, log_samples=False, **asked)

    with hushed(progress) as shown:
        manager = _task_manager(tasks, include_path)
        results = _results(
            measured("student"),
            weights=chosen.config.quantization if quantized else str(dtype).removeprefix("torch."),
            chat_template=chat_template,
            limit=limit,
            max_new_tokens=max_new_tokens,
        )
        record = _keep(chosen, results)
        if base:
            rows = measured("base")["results"]
            record = _keep(chosen, [r.model_copy(update={"base": _scores(rows[r.task])}) for r in results])
    return record


def _device(chosen: Chosen) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of the measurement: a student trained with `cuda` may be measured on a CPU."""
    from mot_lora.training.student import device_of, dtype_of

    setting = "cpu" if chosen.config.device == "cpu" else "auto"
    device = device_of(chosen.config.model_copy(update={"device": setting}))
    return device, EXPORTED if device.type == "cpu" else dtype_of(device)


def _results(said: dict[str, Any], **asked: Any) -> list[TaskRecord]:
    """lm-eval's results, a record for each task or group; `asked` are the settings shared by all."""
    return [
        TaskRecord(
            task=name,
            shots=said["n-shot"].get(name),
            questions=row["sample_len"],
            scores=_scores(row),
            version=said["versions"].get(name),
            lm_eval=metadata.version("lm-eval"),
            **asked,
        )
        for name, row in said["results"].items()
    ]


def _keep(chosen: Chosen, results: Sequence[TaskRecord]) -> HarnessRecord:
    """Add results to the round's file; if the round was run again since, the old file is renamed."""
    file = chosen.rundir.path / "eval" / f"round-{chosen.round:03d}.json"
    made = [durable.sha256(chosen.rundir.round(n) / "round.json") for n in range(1, chosen.round + 1)]
    new = HarnessRecord(round=chosen.round, student=sha256("".join(made).encode()).hexdigest()[:16])
    old = read_record(file, HarnessRecord)
    if old and old.student != new.student:
        durable.move(file, durable.beside(file))
        old = None
    record = (old or new).including(results)
    write_record(file, record)
    return record


# --- tasks -----------------------------------------------------------------------------------------------


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> "TaskManager":
    """lm-eval's index of tasks. Errors: UserError for an unknown task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError(f"lm-eval cannot be imported ({e}): pip install 'mot-lora[eval]'") from e
    if not tasks:
        raise UserError("no task is given; lm-eval has gsm8k, mmlu, arc_challenge, ...")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"{include_path}: no such folder of tasks")
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # reading all of lm-eval's takes ten seconds
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            what = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise UserError(f"`{name}` is not a task of lm-eval; {what}")
    return manager


def _load(manager: "TaskManager", tasks: Sequence[str]) -> "list[Any]":
    """The tasks with their data. Errors: UserError if one cannot be loaded or would run the student's code."""
    loaded: list[Any] = []
    for name in dict.fromkeys(tasks):
        try:
            found = manager.load([name])
        except Exception as e:  # whatever a task's own code, datasets and the Hub raise
            reason = " ".join(str(e).split())[:200] or repr(e)
            raise UserError(f"task `{name}`: its data cannot be loaded ({type(e).__name__}: {reason})") from e
        leaves: list[Task] = list(found["tasks"].values())
        if unsafe := next((t for t in leaves if getattr(t, "UNSAFE_CODE", False)), None):
            raise UserError(
                f"task `{unsafe.task_name}`: runs code that the student writes; export the student, and run lm-eval on "
                "it yourself where that is safe"
            )
        group = found.get("groups", {}).get(name)
        loaded += [group] if group else leaves
    return loaded


def _scores(row: dict[str, Any]) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = row.get(f"{metric}_stderr,{kind}")
            error = float(stderr) if isinstance(stderr, int | float) else None
            scores[metric if kind == "none" else key] = Score(value=float(value), stderr=error)
    return scores


# --- models ----------------------------------------------------------------------------------------------


@contextmanager
def _model(
    chosen: Chosen, who: str, device: torch.device, dtype: torch.dtype | None, batch_size: int, progress: Progress
) -> Generator[Any]:
    """The student or W_0 as lm-eval's model, in a dtype or, without one, quantized; the temporary export is deleted at
    the end of the block.
    """
    from lm_eval.models.huggingface import HFLM

    from mot_lora.training.student import from_pretrained

    config, stack = chosen.config, ExitStack()

    def load() -> "PreTrainedModel":
        if dtype is None:
            return _in_memory(chosen, who, device)
        if who == "base":
            return from_pretrained(chosen.checkpoint, device, dtype, config.trust_remote_code)
        run = chosen.rundir.path.resolve()
        with writing(run.parent):
            folder = tempfile.TemporaryDirectory(prefix=f".{run.name}.eval-", dir=run.parent)
        out = Path(stack.enter_context(folder)) / "student"
        export(chosen.rundir.path, out, round=chosen.round, student=config.student, dtype=EXPORTED, progress=progress)
        return from_pretrained(Checkpoint.open(out), device, dtype, config.trust_remote_code)

    less = f"lower --batch-size {batch_size}, or measure --quantized"
    with enough_memory("", less), stack, loaded(load) as model:
        yield cast("Any", HFLM)(
            pretrained=model,
            tokenizer=str(chosen.checkpoint.path),
            batch_size=batch_size,
            think_end_token="</think>",
            trust_remote_code=config.trust_remote_code,
        )


def _in_memory(chosen: Chosen, who: str, device: torch.device) -> "PreTrainedModel":
    """The student as the loop evaluates it, the quantized base with the ledger folded in; or only that base."""
    from mot_lora.runs.ledger import read_ledger
    from mot_lora.training.adapter import add_adapter
    from mot_lora.training.student import fold, load_model

    config = chosen.config
    model = load_model(chosen.checkpoint, config.quantization, device, config.trust_remote_code)
    data = chosen.rundir.data_record()
    if data and data.turn:
        cast("Any", model.generation_config).eos_token_id = list(data.turn.stop_ids)
    if who == "base":
        return model
    peft_model = add_adapter(model, config.lora)
    for _ in fold(peft_model, chosen.checkpoint, read_ledger(chosen.rundir, chosen.round, device)):
        pass
    return peft_model.unload()


def _simple_evaluate(lm: Any, **settings: Any) -> dict[str, Any]:
    from lm_eval import evaluator

    # lm-eval would query git and the system for its log, which takes seconds and prints git's errors
    skipped = dict.fromkeys(("get_git_commit_hash", "add_env_info"), silent)
    try:
        with patch.multiple(evaluator, create=True, **skipped):
            return cast("dict[str, Any]", evaluator.simple_evaluate(lm, **settings))
    except (AssertionError, ValueError) as e:  # lm-eval's errors for settings that do not fit a task or the model
        raise UserError(f"lm-eval: {' '.join(str(e).split())[:300] or repr(e)}") from e
