"""What a task asks: lm-eval's tasks as questions and prompts, made once. With `evaluate`, all that imports lm_eval.

The documents of a task are kept as they are here, since lm-eval would process them again to score them. Every prompt is
rendered once, by us, with the model's chat template, and travels as token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from harness.engines import Sampling
from harness.errors import TaskError
from harness.evaluate import known_random_state, load_tasks, metric_names, runs_code
from harness.prepared import Ask, Prepared, Question, plain, question_digest
from harness.task_files import asks_about_pictures, is_ours
from harness.task_settings import ResolvedTask

DEFAULT_MAX_TOKENS = 256
"""What lm-eval takes where a task does not say."""
ROLLING_TOKENS = 2048
"""Window of texts that are scored whole."""
_CHUNK_CHARACTERS = 2_000_000
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "n": 1, "min_p": 0.0}
"""Options of generation that a task may name, with the one value that changes nothing."""


def prepare(asking: ResolvedTask, tokenizer: Any, model: Path) -> Prepared:
    """Read the task and render its prompts with the chat template of `tokenizer`, whose files are in the folder `model`.

    Raises:
        TaskError: no such task, one that needs images or runs code, data that cannot be read, options that no engine here has.
    """
    if asking.path is None and (refusal := asks_about_pictures(asking.name)) is not None:
        raise TaskError(f"task {asking.name}: {refusal}")  # before its data are read
    renderer = _Renderer(tokenizer, asking)
    metadata = {"pretrained": str(model), "tokenizer": str(model), **asking.metadata}
    questions: list[Question] = []
    asks: list[Ask] = []
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    is_partial = False
    is_stock = asking.path is None and not is_ours(asking.name)
    tasks = load_tasks(asking, metadata)
    for task in tasks.values():
        _require_askable(task)
        docs = _documents(task, notes)
        is_partial |= asking.limit is not None and asking.limit < len(docs)
        docs = docs[: asking.limit]
        chat = _is_chat(task, asking, tokenizer)
        start = len(questions)
        questions += [_question(task, start + i, doc, is_stock) for i, doc in enumerate(docs)]
        kept = [i for i in range(len(docs)) if questions[start + i].excluded is None]
        with _documents_given(task, docs):
            for instances in _in_chunks(_instances(task, kept, chat, renderer, asking)):
                renderer.encode(instances, chat)
                for instance in instances:
                    asks += renderer.asks(start + int(instance.doc_id or 0), instance)
        parts.append(_about(task, chat))
    if not asks:
        raise TaskError(f"task {asking.name}: it has no question to ask; look at its data and at limit")
    notes += renderer.notes
    about = _together(asking.name, parts) | {
        "n_questions": len(questions),
        "n_requests": sum(_draws(tasks, questions, ask) for ask in asks),
        "excluded": [{"doc": q.doc, "reason": q.excluded} for q in questions if q.excluded is not None],
        "draws": {name: int(task.config.repeats or 1) for name, task in tasks.items()},  # answers that one score needs
        "is_greedy": all(ask.sampling is None or ask.sampling.temperature == 0 for ask in asks),
        "is_partial": is_partial,
        "origin": {name: origin for name, task in tasks.items() if (origin := _origin(task))},
        "longest": _longest(asks),
        "notes": list(dict.fromkeys(notes)),
    }
    return Prepared(plain(about), questions, asks)


def _longest(asks: list[Ask]) -> dict[str, int]:
    """The request that needs the longest context."""
    ask = max(asks, key=lambda ask: len(ask.token_ids) + ask.room)
    return {"doc": ask.doc, "prompt_tokens": len(ask.token_ids), "answer_tokens": ask.room}


def _draws(tasks: dict[str, Task], questions: list[Question], ask: Ask) -> int:
    return int(tasks[questions[ask.doc].subtask].config.repeats or 1) if ask.sampling is not None else 1


def _require_askable(task: Task) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise runs_code(str(name))
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"task {name}: needs images or sound, which no model of this version is given")


def _documents(task: Task, notes: list[str]) -> list[dict[str, Any]]:
    """The documents of the task as plain data, made once; a note where making them again gives others."""
    name = task.config.task
    with known_random_state():
        docs = [dict(doc) for doc in task.eval_docs]
        if task.config.process_docs is not None and not is_ours(name) and [dict(doc) for doc in task.eval_docs] != docs:
            notes.append(
                f"{name} shuffles without a seed of its own: one draw is kept here and scored, plain lm-eval may score another"
            )
    try:
        return [plain(doc) for doc in docs]
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {name}: a document holds what is no plain data ({error})") from error


@contextmanager
def _documents_given(task: Task, docs: list[dict[str, Any]]) -> Iterator[None]:
    """Let the task's own documents be `docs` while its requests are built."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    process, data = task.config.process_docs, task.dataset
    task.config.process_docs, task.dataset = None, {**(data or {}), split: docs}
    try:
        yield
    finally:
        task.config.process_docs, task.dataset = process, data


def _instances(task: Task, kept: list[int], chat: bool, renderer: _Renderer, asking: ResolvedTask) -> list[Instance]:
    """lm-eval's requests for the kept documents."""
    if not kept:
        return []
    task.set_fewshot_seed(seed=1234)
    with known_random_state():
        try:
            task.build_all_requests(
                samples=None if len(kept) == len(task.eval_docs) else kept,
                system_instruction=asking.system_prompt,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=renderer.chat if chat else None,
                tokenizer_name="",
            )
        except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
            raise TaskError(f"task {task.config.task}: its prompts cannot be made ({type(error).__name__}: {error})") from error
    found = list(task.instances)
    if len(kept) != len(task.eval_docs):  # lm-eval numbers the chosen documents anew
        for instance in found:
            instance.doc_id = kept[int(instance.doc_id or 0)]
    return found


def _in_chunks(instances: list[Instance]) -> Iterator[list[Instance]]:
    """`instances` in runs whose prompts together are short enough to be tokenized at once."""
    chunk: list[Instance] = []
    size = 0
    for instance in instances:
        if chunk and size + len(instance.args[0]) > _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(instance)
        size += len(instance.args[0])
    if chunk:
        yield chunk


def _is_chat(task: Task, asking: ResolvedTask, tokenizer: Any) -> bool:
    """Whether prompts are chats: what the suite says, else the task's own file, else for generation where there is a template."""
    declared = (task.config.metadata or {}).get("chat")
    if asking.chat is not None and declared is not None and asking.chat != declared:
        raise TaskError(f"task {asking.name}: its file says chat = {str(declared).lower()}; remove chat from the suite")
    chosen = asking.chat if asking.chat is not None else declared
    if chosen is None:
        return task.OUTPUT_TYPE == "generate_until" and tokenizer.chat_template is not None
    if chosen and tokenizer.chat_template is None:
        raise TaskError(f"task {asking.name}: asks in chat, and the model has no chat template; use a task that does not")
    return bool(chosen)


def _question(task: Task, doc: int, fields: dict[str, Any], is_stock: bool) -> Question:
    """A document as a question. Of lm-eval's own tasks no field has a meaning to us, whatever a data set calls its columns."""
    said = {} if is_stock else fields
    source = said.get("source_question")
    if source is None:
        source = task.doc_to_decontamination_query(fields) if task.should_decontaminate() else task.doc_to_text(fields)
    return Question(
        doc=doc,
        subtask=str(task.config.task),
        question=question_digest(str(source)),
        cluster=str(said.get("cluster", doc)),
        target=str(task.doc_to_target(fields)),
        fields=fields,
        excluded=said.get("excluded") or None,
    )


def _origin(task: Task) -> str:
    """Where the rows are from and how they were checked, by the word of our own tasks."""
    return str(getattr(getattr(task.eval_docs, "info", None), "description", None) or "")


def _about(task: Task, chat: bool) -> dict[str, Any]:
    metadata = {k: v for k, v in (task.config.metadata or {}).items() if k not in ("pretrained", "tokenizer")}
    names = metric_names(task)
    primary = metadata.get("primary", names[0])
    if primary not in names:
        raise TaskError(f"task {task.config.task}: metadata.primary: found {primary!r}; allowed: {', '.join(names)}")
    if "stated" in metadata:
        try:
            re.compile(metadata["stated"])
        except (re.error, TypeError) as error:
            raise TaskError(
                f"task {task.config.task}: metadata.stated: {metadata['stated']!r} is no pattern ({error})"
            ) from error
    return {
        "name": str(task.config.task),
        "version": str(metadata.get("version", "unknown")),
        "output_type": task.OUTPUT_TYPE,
        "metrics": names,
        "primary": primary,
        "publishable": metadata.get("publishable") is True,
        "judge": metadata.get("judge") is True,
        "is_chat": chat,
        "metadata": metadata,
    }


def _together(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a group says of itself: a metric stands for it that all of its parts have, and it is published if all of them are."""
    primary = parts[0]["primary"]
    if any(primary not in part["metrics"] for part in parts):
        raise TaskError(f"task {name}: its parts have no metric {primary} in common; ask for them one by one")
    return {
        **parts[0],
        "name": name,
        "version": "+".join(sorted({part["version"] for part in parts})),
        "primary": primary,
        "publishable": all(part["publishable"] for part in parts),
        "parts": {part["name"]: part["version"] for part in parts},
    }


class _Renderer(TemplateLM):
    """Prompts as text and token ids, in the way of lm-eval's own models."""

    def __init__(self, tokenizer: Any, asking: ResolvedTask) -> None:
        super().__init__()
        self.tokenizer, self.asking = tokenizer, asking
        self.notes: list[str] = []
        self._special = True
        self._encoded: dict[str, list[int]] = {}
        self._pairs: list[tuple[list[int], list[int]]] = []

    def chat(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        given = self.asking.thinking.template_args if self.asking.thinking else {}
        return str(
            self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **given,
            )
        )

    def encode(self, instances: list[Instance], chat: bool) -> None:
        """Tokenize the prompts of `instances`, which `asks` is given next; together, so that a fast tokenizer uses all cores."""
        self._special = not chat  # the chat template brings its own special tokens
        prompts = [instance.args[0] for instance in instances if instance.request_type == "generate_until"]
        encoded = self.tokenizer(prompts, add_special_tokens=self._special)["input_ids"] if prompts else []
        self._encoded = dict(zip(prompts, encoded, strict=True))

    def asks(self, doc: int, instance: Instance) -> list[Ask]:
        """The requests of one of lm-eval's: one, or one a window where a text is scored whole."""
        kind = instance.request_type
        if kind == "generate_until":
            prompt, options = instance.args
            sampling, stops = self._sampling(str(instance.task_name), options)
            return [Ask(doc, instance.idx, 0, prompt, tuple(self._encoded[prompt]), None, sampling, stops)]
        if kind == "loglikelihood_rolling":
            text = instance.args[0]
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, ROLLING_TOKENS - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
        else:
            text = instance.args[0]
            self._pairs = []
            self.loglikelihood([instance], disable_tqdm=True)
            pairs = self._pairs
        option = instance.args[1] if len(instance.args) > 1 else None
        return [
            Ask(doc, instance.idx, i, text, tuple(context), tuple(rest), option=option)
            for i, (context, rest) in enumerate(pairs)
        ]

    def _sampling(self, task: str, options: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """Complete sampling parameters, and the strings that end an answer: the suite's word before the task's."""
        given = {**options}
        until = given.pop("until", [])
        stops = tuple([until] if isinstance(until, str) else until) if isinstance(until, str | list | tuple) else (until,)
        if not all(isinstance(stop, str) for stop in stops):
            raise TaskError(f"task {task}: generation_kwargs.until: found {until!r}; allowed: a string, or a list of them")
        is_sampled = given.pop("do_sample", None)
        own = {
            "temperature": given.pop("temperature", None),
            "top_p": given.pop("top_p", None),
            "top_k": given.pop("top_k", None),
        }
        if not (is_sampled if is_sampled is not None else own["temperature"]):
            own = {"temperature": 0.0, "top_p": None, "top_k": None}
        elif own["temperature"] is None:
            own["temperature"] = 1.0
        own["max_tokens"] = next((given.pop(k) for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in given), None)
        unknown = {k: v for k, v in given.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
        if unknown:
            raise TaskError(
                f"task {task}: generates with {', '.join(f'{k} = {v!r}' for k, v in unknown.items())}, which no engine here does; copy "
                "its file without it and give task.path"
            )
        chosen = {**own, **self.asking.sampling}
        if chosen["max_tokens"] is None:
            self.notes.append(
                f"{task} does not say how many tokens an answer may have: lm-eval's default of {DEFAULT_MAX_TOKENS} holds, which cuts "
                "reasoning; set max_tokens in [sampling]"
            )
            chosen["max_tokens"] = DEFAULT_MAX_TOKENS
        chosen = {"top_p": 1.0, "top_k": 0} | {k: v for k, v in chosen.items() if v is not None}
        if type(chosen["max_tokens"]) is not int or chosen["max_tokens"] < 1:
            raise TaskError(
                f"task {task}: generation_kwargs.max_gen_toks: found {chosen['max_tokens']!r}; allowed: a positive integer"
            )
        # with thinking, stop strings are for the answer alone: they are looked for after it
        return Sampling(**chosen, until=() if self.asking.thinking else stops), stops

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on: its beginning, where the tokenizer has a token for it."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = self._special if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        self._pairs += [(context, rest) for _, context, rest in requests]
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("prompts are rendered here, not answered")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("prompts are rendered here, not answered")
