"""Consensus: a run's base, branches and students measured on held-out traces, token by token (arXiv 2509.08814)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mot_lora.adapters.load import WEIGHTS_FILE
from mot_lora.analysis.confidence import (
    CONSENSUS,
    KINDS,
    ConsensusRecord,
    ConsensusRound,
    ExampleRecord,
    LandscapeRecord,
    StudentConfidence,
    TokenRecord,
    classes_of,
    consensus_of,
    read_consensus,
)
from mot_lora.analysis.landscape import landscape, points
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config
from mot_lora.data.dataset import load_data
from mot_lora.data.encoding import collate
from mot_lora.data.tokenizer import fingerprint, load_tokenizer, pieces
from mot_lora.data.traces import IGNORE, Example
from mot_lora.durable import sha256, write_record
from mot_lora.errors import UserError, enough_memory
from mot_lora.merging.merged import Merged
from mot_lora.progress import Progress, silent
from mot_lora.records import EvaluationRecord
from mot_lora.runs.ledger import open_student, read_ledger, read_run, settings
from mot_lora.runs.rundir import RunDir
from mot_lora.training.adapter import ADAPTER, add_adapter
from mot_lora.training.evaluation import LOSS_CHUNK, AtOnce, held_out_losses, loss_tokens
from mot_lora.training.loss import token_log_probs
from mot_lora.training.memory import loaded
from mot_lora.training.student import device_of, fold, load_model

SHOWN = 500  # tokens shown of an example trace

LogProbs = dict[str, list[Tensor]]  # by teacher, one tensor a trace: [trained tokens] fp32


def consensus(
    run: str | Path, *, traces: int = 8, student: str | None = None, progress: Progress = silent
) -> ConsensusRecord:
    """Measure a run's students on at most `traces` held-out traces a teacher, in the run's quantization.

    The record has the confidence of W_0, every branch and every merged student; what the branches of the first and the
    last round agree on, and how much of it their merge keeps; and the loss around the last round. It is saved in the
    run as consensus.json, and read from there unless rounds were added or `traces` differs. `student` is the path of
    W_0, as in `export`.

    Errors: UserError for fewer than two rounds or teachers, no held-out traces, a run in progress, a damaged run, or a
    base or data that have changed.

    >>> consensus("runs/quickstart").rounds[-1].outcome  # doctest: +SKIP
    'in part'
    """
    rundir = RunDir(Path(run))
    config, record = settings(rundir, student), read_run(rundir)
    rounds = len(record.rounds) if record else 0
    if rounds < 2:
        raise UserError(f"{run}: consensus needs two finished rounds; the run has {rounds}")
    if len(config.teachers) < 2:
        raise UserError(f"{run}: consensus needs at least two teachers; the run has one")
    if config.eval.holdout == 0:
        raise UserError(f"{run}: consensus needs held-out traces; eval.holdout is 0")
    if traces < 1:
        raise UserError(f"traces must be at least 1, not {traces}")
    basis = tuple(sha256(rundir.round(n) / "round.json") for n in range(1, rounds + 1))
    saved = read_consensus(rundir)
    if saved and (saved.basis, saved.traces) == (basis, traces):
        return saved
    if process := rundir.at_work():
        raise UserError(f"{run}: the run is in progress ({process}); measure consensus after it has stopped")
    rundir.check(config)
    device = device_of(config)
    checkpoint, tokenizer, held_out = _open(rundir, config, traces, progress)
    with (
        enough_memory(f"measuring the consensus of {run}", f"stop other programs that use {device}"),
        loaded(lambda: _student(config, checkpoint, device, progress)) as model,
    ):
        states = RunStates(rundir, config, checkpoint, tokenizer, model, held_out, progress)
        confidence, parts, examples = states.students(rounds)
        landscape = states.landscape(rounds)
    measured = ConsensusRecord(
        basis=basis,
        traces=traces,
        questions=len(set(states.questions)),
        branches=states.branches,
        confidence=confidence,
        rounds=parts,
        examples=examples,
        landscape=landscape,
    )
    write_record(rundir.path / CONSENSUS, measured)
    return measured


def _open(
    rundir: RunDir, config: Config, traces: int, progress: Progress
) -> tuple[Checkpoint, PreTrainedTokenizerBase, dict[str, tuple[Example, ...]]]:
    """The run's base, its tokenizer, and at most `traces` held-out traces of each teacher."""
    checkpoint = open_student(rundir, config)
    tokenizer = load_tokenizer(checkpoint.path, config.trust_remote_code)
    data = load_data(config, tokenizer, progress)
    rundir.check_same(config, {**checkpoint.fingerprints(), "tokenizer": fingerprint(tokenizer), **data.fingerprints})
    held_out = {name: tuple(examples[:traces]) for name, examples in data.held_out.items() if examples}
    if not held_out:
        raise UserError(f"{rundir.path}: consensus needs held-out traces; eval.holdout is too small for any")
    return checkpoint, tokenizer, held_out


def _student(config: Config, checkpoint: Checkpoint, device: torch.device, progress: Progress) -> PeftModel:
    progress("load the student", 0, 1)
    model = load_model(checkpoint, config.quantization, device, config.trust_remote_code)
    peft_model = add_adapter(model, config.lora)
    peft_model.eval()
    progress("load the student", 1, 1)
    return peft_model


@dataclass(frozen=True)
class RunStates:
    """A run's student in memory, set to one state of the run after another, and the traces it is measured on."""

    rundir: RunDir
    config: Config
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    held_out: Mapping[str, Sequence[Example]]
    progress: Progress

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.config.teachers)

    @property
    def questions(self) -> list[int]:
        """The number of every trained token's question, in the order of `_flat`; the same in all teachers' traces."""
        numbers: dict[tuple[int, ...], int] = {}
        out: list[int] = []
        for e in (e for examples in self.held_out.values() for e in examples):
            number = numbers.setdefault(e.input_ids[: e.prompt_length], len(numbers))
            out += [number] * len(_predicted(e))
        return out

    def students(
        self, rounds: int
    ) -> tuple[tuple[StudentConfidence, ...], tuple[ConsensusRound, ...], tuple[ExampleRecord, ...]]:
        """The confidence of every student of the run, the consensus of the first and last round, and example traces."""
        one_more = self.counted("confidence", 1 + rounds * (1 + len(self.branches)))
        questions = torch.tensor(self.questions)
        base = self.log_probs(adapter=False)
        one_more()
        confidence = [_confidence(0, None, base)]
        parts: list[ConsensusRound] = []
        start, branches, merged = base, dict[str, LogProbs](), base
        for number in range(1, rounds + 1):
            start = merged
            for name in self.branches:
                self.load(self.rundir.branch(number, name))
                branches[name] = self.log_probs(adapter=True)
                confidence.append(_confidence(number, name, branches[name]))
                one_more()
            self.fold(read_ledger(self.rundir, number, self.model.device))
            merged = self.log_probs(adapter=False)
            confidence.append(_confidence(number, None, merged))
            one_more()
            if number in (1, rounds):
                each = torch.stack([_flat(b) for b in branches.values()])
                parts.append(consensus_of(number, _flat(start), each, _flat(merged), _flat(base), questions))
        examples = tuple(
            self.example(name, examples[0], start[name][0], [b[name][0] for b in branches.values()], merged[name][0])
            for name, examples in self.held_out.items()
        )
        return tuple(confidence), tuple(parts), examples

    def landscape(self, rounds: int) -> LandscapeRecord:
        """The held-out loss around a round's students, each folded and rounded as the merged one is."""
        start, end = (read_ledger(self.rundir, n, self.model.device) for n in (rounds - 1, rounds))
        one_more = self.counted("landscape", points(len(self.branches)))
        tokens = loss_tokens(self.config.branch, max(len(e) for es in self.held_out.values() for e in es))
        at_once = AtOnce(self.config.eval.batch_size)

        def loss(ledger: Sequence[Merged]) -> float:
            self.fold(ledger)
            with self.model.disable_adapter():
                losses = held_out_losses(self.model, self.tokenizer, self.held_out, at_once, tokens)
            one_more()
            return cast("float", EvaluationRecord(losses=losses).loss)

        return landscape(start, end, loss, rank=self.config.lora.r, seed=self.config.seed, device=self.model.device)

    def load(self, folder: Path) -> None:
        """Load a branch's weights into the model's adapter."""
        result = set_peft_model_state_dict(self.model, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER)
        if result.unexpected_keys:
            raise UserError(f"{folder / WEIGHTS_FILE}: has {result.unexpected_keys[0]}, which the student lacks")

    def fold(self, ledger: Sequence[Merged]) -> None:
        """Set the student to round(W_0 + ledger)."""
        for _ in fold(self.model, self.checkpoint, ledger):
            pass

    def log_probs(self, *, adapter: bool) -> LogProbs:
        """Log p of every trained token, of one trace at a time, by the student with or without its adapter."""
        with nullcontext() if adapter else self.model.disable_adapter():
            return {name: [self._log_probs(e) for e in examples] for name, examples in self.held_out.items()}

    def _log_probs(self, example: Example) -> Tensor:
        batch = {k: v.to(self.model.device) for k, v in collate([example], 0).items()}
        return token_log_probs(self.model.get_base_model(), batch, LOSS_CHUNK).cpu()

    def example(
        self, teacher: str, trace: Example, start: Tensor, branches: Sequence[Tensor], merged: Tensor
    ) -> ExampleRecord:
        """A trace with the changes of each of its tokens in the last round."""
        gains = torch.stack(list(branches)) - start
        kinds, order = classes_of(gains), {position: n for n, position in enumerate(_predicted(trace))}
        begin = trace.prompt_length
        shown = range(begin, min(len(trace), begin + SHOWN))
        tokens: list[TokenRecord] = []
        for position, text in zip(shown, pieces(self.tokenizer, trace.input_ids[begin : begin + SHOWN]), strict=True):
            n = order.get(position)
            if n is None:
                tokens.append(TokenRecord(text=text))
                continue
            tokens.append(
                TokenRecord(
                    text=text,
                    kind=KINDS[int(kinds[n])],
                    start=_rounded(start[n]),
                    branches=tuple(map(_rounded, gains[:, n])),
                    merged=_rounded(merged[n] - start[n]),
                )
            )
        prompt = cast("str", self.tokenizer.decode(list(trace.input_ids[:begin]), skip_special_tokens=False))
        return ExampleRecord(
            teacher=teacher, prompt=prompt, tokens=tuple(tokens), more=len(trace) - begin - len(tokens)
        )

    def counted(self, stage: str, total: int) -> Callable[[], None]:
        """Start a stage; each call of the result reports one more item as done."""
        counts = iter(range(1, total + 1))
        self.progress(stage, 0, total)
        return lambda: self.progress(stage, next(counts), total)


def _confidence(number: int, branch: str | None, log_probs: LogProbs) -> StudentConfidence:
    each = {teacher: torch.cat(traces).double() for teacher, traces in log_probs.items()}
    return StudentConfidence(
        round=number,
        branch=branch,
        p={teacher: float(x.exp().mean()) for teacher, x in each.items()},
        log_p={teacher: float(x.mean()) for teacher, x in each.items()},
    )


def _predicted(example: Example) -> list[int]:
    """The positions of the trained tokens; nothing predicts the first token."""
    return [i for i, label in enumerate(example.labels) if i and label != IGNORE]


def _flat(log_probs: LogProbs) -> Tensor:
    return torch.cat([trace for traces in log_probs.values() for trace in traces])


def _rounded(value: Tensor) -> float:
    return round(float(value), 3)
