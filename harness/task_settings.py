"""How each task of a suite will be asked: its own keys over the suite's over a protocol's. No lm_eval, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.protocols import PROTOCOLS, Protocol
from harness.schema_evaluation import SamplingSettings, Task, Thinking
from harness.task_files import asks_about_pictures, config_of, gives_answers, is_ours, known_tasks, metadata_of

if TYPE_CHECKING:
    from harness.mistakes import Mistakes
    from harness.schema import File

_PARAMETERS = ("temperature", "top_p", "top_k", "max_tokens")
GREY = "-grey"
"""What the name of a task ends with whose pictures are grey: its own name stands for its scores."""
N_REHEARSED, REHEARSED_TOKENS = 2, 16
"""Of a task in a rehearsal: its first questions, and the length of their answers."""
_ALMOST = 0.85
"""How alike two names are of which one is taken for the other, mistyped."""


@dataclass(frozen=True)
class ResolvedTask:
    """A task with everything that decides how it is asked.

    sampling: the parameters that override those of its file; the seed of the suite is `seed`. default: what a protocol set, with its source.
    pictures: "shown", or "grey": a control under a name of its own, in which every picture is a grey one.
    """

    name: str
    path: Path | None
    limit: int | None
    repeats: int
    sampling: dict[str, Any]
    seed: int
    chat: bool | None
    metadata: dict[str, Any]
    thinking: Thinking | None
    system_prompt: str | None
    default: str | None
    pictures: str = "shown"

    @property
    def own_name(self) -> str:
        """What the task is called where its questions come from."""
        return self.name.removesuffix(GREY) if self.pictures == "grey" else self.name

    @property
    def asked(self) -> dict[str, Any]:
        """What its requests depend on, beside its files and the model."""
        return {
            "name": self.name,
            "limit": self.limit,
            "sampling": self.sampling,
            "chat": self.chat,
            "metadata": self.metadata,
            "thinking": None if self.thinking is None else self.thinking.model_dump(),
            "system_prompt": self.system_prompt,
            **({} if self.pictures == "shown" else {"pictures": self.pictures}),
        }

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain data; `task_of` reads it back."""
        return {
            **self.asked,
            "path": None if self.path is None else str(self.path),
            "repeats": self.repeats,
            "seed": self.seed,
            "default": self.default,
        }


def task_of(record: dict[str, Any]) -> ResolvedTask:
    """The task whose `record` this is."""
    thinking = None if record["thinking"] is None else Thinking(**record["thinking"])
    return ResolvedTask(**{**record, "path": Path(record["path"]) if record["path"] else None, "thinking": thinking})


def resolve_tasks(file: File, suite: Path, mistakes: Mistakes) -> tuple[ResolvedTask, ...]:
    """The tasks of the suite; what is wrong with them is added to `mistakes`."""
    found = []
    for index, task in enumerate(file.task):
        where = f"task[{index}]"
        path = None if task.path is None else Path(task.path).expanduser()
        if path is not None and not path.exists():
            mistakes.add(
                f"{where}.path",
                f"{path}: there is no such file or folder; looked for {path.absolute()} (a relative path is relative to the current "
                "directory); give a YAML file of lm-eval's, or its folder",
            )
        if path is None and looks_mistyped(task.name):
            mistakes.add(f"{where}.name", f'unknown task "{task.name}"', near=(task.name, known_tasks()))
        refusal = asks_about_pictures(task.name) if path is None and file.model.kind == "text" else None
        if refusal is not None:
            mistakes.add(f"{where}.name", f"{task.name} {refusal}")
        if task.pictures == "grey" and path is None and is_ours(task.name) and not metadata_of(task.name).get("images"):
            mistakes.add(f"{where}.pictures", f"has no effect on {task.name}, which shows none; remove it")
        if is_ours(task.name) and path is None:
            for key in ("chat", "metadata"):
                if getattr(task, key) not in (None, {}):
                    mistakes.add(f"{where}.{key}", f"has no effect on {task.name}, whose file says it; remove it")
        shared = _checked(file.sampling, "sampling", mistakes)
        own = _checked(task.sampling, f"{where}.sampling", mistakes)
        if gives_answers(task.name, task.path) is False:
            if own:
                mistakes.add(f"{where}.sampling", f"has no effect on {task.name}, which compares likelihoods; remove it")
            shared, own = {}, {}
        name = own.get("protocol", shared.get("protocol"))
        protocol = PROTOCOLS.get(name) if name else None
        sampling: dict[str, Any] = {}
        if protocol is not None:
            sampling = {key: value for key in _PARAMETERS if (value := getattr(protocol, key)) is not None}
        sampling |= {key: given[key] for given in (shared, own) for key in _PARAMETERS if key in given}
        repeats = task.repeats or (protocol.repeats.get(task.name) if protocol else None) or 1
        pointless = _why_repeats_are_alike(task.name, path, sampling) if repeats > 1 else None
        if pointless is not None:
            mistakes.add(f"{where}.repeats", pointless)
        found.append(
            ResolvedTask(
                name=_name(task),
                path=path,
                limit=task.limit,
                repeats=repeats,
                sampling=sampling,
                seed=own.get("seed", shared.get("seed", 0)),
                chat=task.chat,
                metadata=task.metadata,
                thinking=file.model.thinking,
                system_prompt=file.model.system_prompt,
                default=None if protocol is None else _said_by(protocol, str(name), task, sampling),
                pictures=task.pictures,
            )
        )
    names = [task.name for task in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        mistakes.add("task", f'the name "{name}" is repeated; a task is asked once')
    if not file.task and file.diagnostics is None:
        mistakes.add("task", "neither a task nor diagnostics: there is nothing to measure; add one")
    if not file.task and file.sampling is not None:
        mistakes.add("sampling", "has no effect: no task is asked; remove it")
    return tuple(found)


def _name(task: Task) -> str:
    return f"{task.name}{GREY}" if task.pictures == "grey" else task.name


def _said_by(protocol: Protocol, name: str, task: Task, sampling: dict[str, Any]) -> str:
    """What `plan` says of a task that a protocol is asked by: also whose word holds where the protocol has none."""
    said = f"{task.name}: protocol {name} ({protocol.source})"
    if "max_tokens" in sampling:
        return said
    own = config_of(task.name)["generation_kwargs"]["max_gen_toks"] if task.path is None and is_ours(task.name) else None
    return f"{said}; length of answers: {'what' if own is None else f'{own:,} tokens, as'} the task's own file says"


def same_files(variants: list[str], tasks: tuple[ResolvedTask, ...]) -> list[str]:
    """What is wrong where two pairs of variant and task would write the same samples, `<variant>.<task>`: names may hold dots."""
    found: dict[str, list[str]] = {}
    for variant in variants:
        for task in tasks:
            found.setdefault(f"{variant}.{task.name}", []).append(f"task {task.name} of {variant}")
    return [
        f"{' and '.join(pairs)} would both write samples/{name}.jsonl.zst; give a variant another name"
        for name, pairs in found.items()
        if len(set(pairs)) > 1
    ]


def plain_task(name: str, thinking: Thinking | None, system_prompt: str | None, *, is_rehearsal: bool = False) -> ResolvedTask:
    """A task as its file has it, once: what a training selects its checkpoint by. is_rehearsal: a few questions, answered in short."""
    limit, sampling = None, {}
    if is_rehearsal:
        limit = N_REHEARSED
        sampling = {} if gives_answers(name) is False else {"max_tokens": REHEARSED_TOKENS}
    return ResolvedTask(name, None, limit, 1, sampling, 0, None, {}, thinking, system_prompt, None)


def looks_mistyped(name: str) -> bool:
    """Whether a name is neither ours nor lm-eval's, and almost one of ours. Others are looked up when tasks are prepared."""
    if is_ours(name) or not get_close_matches(name, known_tasks(), n=1, cutoff=_ALMOST):
        return False
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        return True
    names = {f"task: {name}", f"group: {name}", f"task: '{name}'", f'task: "{name}"'}
    files = (Path(found.origin).parent / "tasks").rglob("*.yaml")
    return not any(names & set(file.read_text(encoding="utf-8").splitlines()) for file in files)


def _why_repeats_are_alike(name: str, path: Path | None, sampling: dict[str, Any]) -> str | None:
    """Why all repeats of a task would be the same answer, and what to do; None where they differ, or that is not known yet."""
    config = config_of(name) if path is None and is_ours(name) else {}
    if config.get("output_type", "generate_until") != "generate_until":
        return f"has no effect on {name}, which compares likelihoods and draws nothing; remove it"
    if sampling.get("temperature") == 0:
        return "has no effect with temperature 0, which draws nothing; remove it, or set a temperature"
    own = config.get("generation_kwargs") or {}
    is_greedy = own.get("do_sample") is False or own.get("temperature") == 0
    if is_greedy and "temperature" not in sampling:
        return f"has no effect on {name}, whose file is greedy and draws nothing; set a temperature in [sampling], or remove it"
    return None


def _checked(section: SamplingSettings | None, where: str, mistakes: Mistakes) -> dict[str, Any]:
    """The keys that were given."""
    if section is None:
        return {}
    given = section.model_dump(exclude_none=True)
    if section.protocol is not None and section.protocol not in PROTOCOLS:
        mistakes.add(f"{where}.protocol", f'unknown protocol "{section.protocol}"', near=(section.protocol, PROTOCOLS))
    if section.temperature == 0:
        for key in ("top_p", "top_k"):
            if key in given:
                mistakes.add(f"{where}.{key}", "has no effect with temperature 0, which draws nothing; remove it")
    return given
