"""What a task asks: lm-eval's tasks as questions and prompts, made once. With `evaluate`, all that imports lm_eval.

The documents of a task are kept as they are here, since lm-eval would process them again to score them. Every prompt is
rendered once, by us, with the model's chat template, and travels as token ids; its images are named by digest and stored beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from harness.errors import TaskError
from harness.evaluate import known_random_state, load_tasks, runs_code
from harness.images import FOLDER
from harness.picture_asks import PictureTask
from harness.picture_prompts import PicturePrompts, context_length
from harness.prepared import Ask, Prepared, Question, plain
from harness.processor import Processor
from harness.sampling import sampling_of
from harness.task_about import about_part, about_task, origin_of, question_of, shuffles
from harness.task_files import asks_about_pictures, is_ours
from harness.task_settings import ResolvedTask

ROLLING_TOKENS = 2048
"""Window of texts that are scored whole."""
_CHUNK_CHARACTERS = 2_000_000


def prepare(
    asking: ResolvedTask,
    tokenizer: Any,
    model: Path,
    *,
    images: Path = Path(FOLDER),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Read the task and render its prompts with the chat template of `tokenizer`, whose files are in the folder `model`.

    Args:
        tokenizer: of a model that sees a Processor, which renders text alone too.
        images: the folder in which the pictures that are shown are stored.
        on_progress: called with (questions rendered, questions in all) where they show pictures.
    Raises:
        TaskError: no such task, one that shows pictures to a model of text or runs code, data that cannot be read, options that no
            engine here has.
    """
    renderer = _Renderer(tokenizer, asking, model)
    if renderer.processor is None and asking.path is None and (refusal := asks_about_pictures(asking.own_name)) is not None:
        raise TaskError(f"task {asking.name}: {refusal}")  # before its data are read
    metadata = {"pretrained": str(model), "tokenizer": str(model), **asking.metadata}
    questions: list[Question] = []
    asks: list[Ask] = []
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    is_partial = False
    is_stock = asking.path is None and not is_ours(asking.own_name)
    tasks = load_tasks(asking, metadata)
    for task in tasks.values():
        _require_askable(task, asking, renderer)
        chat = _is_chat(task, asking, renderer)
        start = len(questions)
        if renderer.pictures is not None and task.config.doc_to_image is not None:
            shows = PictureTask(task, asking, renderer.pictures, renderer.pair_in_chat, images, is_chat=chat, is_stock=is_stock)
            found, asked, is_cut = shows.ask(start, notes, on_progress)
        else:
            found, asked, is_cut = _ask_text(task, asking, renderer, chat, start, is_stock, notes)
        questions += found
        asks += asked
        is_partial |= is_cut
        parts.append(about_part(task, chat))
    if not asks:
        reasons = "; ".join(list(dict.fromkeys(q.excluded for q in questions if q.excluded is not None))[:3])
        why = f" (left out: {reasons})" if reasons else ""
        raise TaskError(f"task {asking.name}: it has no question to ask{why}; look at its data and at limit")
    notes += renderer.notes
    about = about_task(asking.name, parts) | {
        "n_questions": len(questions),
        "n_requests": sum(_draws(tasks, questions, ask) for ask in asks),
        "excluded": [{"doc": q.doc, "reason": q.excluded} for q in questions if q.excluded is not None],
        "draws": {name: int(task.config.repeats or 1) for name, task in tasks.items()},  # answers that one score needs
        "is_greedy": all(ask.sampling is None or ask.sampling.temperature == 0 for ask in asks),
        "is_partial": is_partial,
        "origin": {name: origin for name, task in tasks.items() if (origin := origin_of(task))},
        "longest": _longest(asks),
        "notes": list(dict.fromkeys(notes)),
        **({"pictures": asking.pictures} if any(ask.images for ask in asks) else {}),
    }
    return Prepared(plain(about), questions, asks)


def _longest(asks: list[Ask]) -> dict[str, int]:
    """The request that needs the longest context."""
    ask = max(asks, key=lambda ask: len(ask.token_ids) + ask.room)
    return {"doc": ask.doc, "prompt_tokens": len(ask.token_ids), "answer_tokens": ask.room}


def _draws(tasks: dict[str, Task], questions: list[Question], ask: Ask) -> int:
    return int(tasks[questions[ask.doc].subtask].config.repeats or 1) if ask.sampling is not None else 1


def _ask_text(
    task: Task, asking: ResolvedTask, renderer: _Renderer, chat: bool, start: int, is_stock: bool, notes: list[str]
) -> tuple[list[Question], list[Ask], bool]:
    """The questions of a task without pictures, what it asks, and whether limit leaves out some."""
    docs = _documents(task, notes)
    is_cut = asking.limit is not None and asking.limit < len(docs)
    docs = docs[: asking.limit]
    questions = [question_of(task, start + i, doc, doc, is_stock) for i, doc in enumerate(docs)]
    kept = [i for i in range(len(docs)) if questions[i].excluded is None]
    asks: list[Ask] = []
    with _documents_given(task, docs):
        for instances in _in_chunks(_instances(task, kept, chat, renderer, asking)):
            renderer.encode(instances, chat)
            for instance in instances:
                number = int(instance.doc_id or 0)
                if renderer.holds_placeholder(instance):
                    why = "its text holds what stands for an image in this model's prompts"
                    questions[number] = replace(questions[number], excluded=why)
                else:
                    asks += renderer.asks(start + number, instance)
    left_out = {question.doc for question in questions if question.excluded is not None}
    return questions, [ask for ask in asks if ask.doc not in left_out], is_cut


def _require_askable(task: Task, asking: ResolvedTask, renderer: _Renderer) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise runs_code(str(name))
    if task.config.doc_to_audio:
        raise TaskError(f"task {name}: needs sound, which no model of this version is given")
    if task.config.doc_to_image is None:
        if asking.pictures == "grey":
            raise TaskError(f'task {name}: shows no pictures, so pictures = "grey" has no effect; remove it')
    elif renderer.processor is None:
        raise TaskError(
            f'task {name}: asks about pictures, and a model of kind "text" is given none; remove it, or set kind = "image-text" in '
            "[model] if the model sees"
        )
    elif task.config.num_fewshot:
        raise TaskError(
            f"task {name}: num_fewshot = {task.config.num_fewshot}: lm-eval gives no pictures of its examples; copy its file with 0"
        )
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise TaskError(f"task {name}: scores whole texts with pictures, which no engine here does; remove it")


def _documents(task: Task, notes: list[str]) -> list[dict[str, Any]]:
    """The documents of the task as plain data, made once; a note where making them again gives others."""
    name = task.config.task
    with known_random_state():
        docs = [dict(doc) for doc in task.eval_docs]
        if task.config.process_docs is not None and not is_ours(name) and [dict(doc) for doc in task.eval_docs] != docs:
            notes.append(shuffles(name))
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


def _is_chat(task: Task, asking: ResolvedTask, renderer: _Renderer) -> bool:
    """Whether prompts are chats: what the suite says, else the task's own file, else for generation where there is a template."""
    declared = (task.config.metadata or {}).get("chat")
    if asking.chat is not None and declared is not None and asking.chat != declared:
        raise TaskError(f"task {asking.name}: its file says chat = {str(declared).lower()}; remove chat from the suite")
    chosen = asking.chat if asking.chat is not None else declared
    if chosen is None:
        return task.OUTPUT_TYPE == "generate_until" and renderer.has_chat_template
    if chosen and not renderer.has_chat_template:
        raise TaskError(f"task {asking.name}: asks in chat, and the model has no chat template; use a task that does not")
    return bool(chosen)


class _Renderer(TemplateLM):
    """Prompts as text and token ids, in the way of lm-eval's own models."""

    def __init__(self, tokenizer: Any, asking: ResolvedTask, model: Path) -> None:
        super().__init__()
        self.processor = tokenizer if isinstance(tokenizer, Processor) else None
        self.tokenizer, self.asking = (tokenizer if self.processor is None else self.processor.tokenizer), asking
        self.template_args = asking.thinking.template_args if asking.thinking else {}
        self.pictures = None
        if self.processor is not None:
            self.pictures = PicturePrompts(self.processor, context_length(model), self.template_args)
        self.notes: list[str] = []
        self._special = True
        self._encoded: dict[str, list[int]] = {}
        self._pairs: list[tuple[list[int], list[int]]] = []

    def chat(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = self.template_args | {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        if self.processor is not None:
            return self.processor.render(history, **options)
        return str(self.tokenizer.apply_chat_template(history, tokenize=False, **options))

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None if self.processor is None else self.processor.has_template

    def pair_in_chat(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context whose special tokens stand in it, and of what follows, parted as everywhere in lm-eval."""
        self._special = False
        return self._encode_pair(context, continuation)

    def holds_placeholder(self, instance: Instance) -> bool:
        """Whether a text holds what the model takes for an image, of which there is none."""
        return self.processor is not None and self.processor.image_token in "".join(
            text for text in instance.args if isinstance(text, str)
        )

    def encode(self, instances: list[Instance], chat: bool) -> None:
        """Tokenize the prompts of `instances`, which `asks` is given next; together, so that a fast tokenizer uses all cores."""
        self._special = not chat  # the chat template brings its own special tokens
        prompts = [instance.args[0] for instance in instances if instance.request_type == "generate_until"]
        encoded = self._tokens(prompts, self._special) if prompts else []
        self._encoded = dict(zip(prompts, encoded, strict=True))

    def asks(self, doc: int, instance: Instance) -> list[Ask]:
        """The requests of one of lm-eval's: one, or one a window where a text is scored whole."""
        kind = instance.request_type
        if kind == "generate_until":
            prompt, options = instance.args
            sampling, stops = sampling_of(str(instance.task_name), options, self.asking, self.notes)
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
        return list(self._tokens(string, special))

    def _tokens(self, text: str | list[str], add_special_tokens: bool) -> Any:
        """TaskError where a tokenizer of a closed vocabulary, without an unknown token, cannot write a prompt."""
        try:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:
            if type(error) is not Exception:  # what the library of tokenizers raises has no class of its own
                raise
            raise TaskError(
                f"task {self.asking.name}: the tokenizer cannot write a prompt ({error}): its vocabulary is closed, and lacks some of it; "
                "ask tasks in the words of the model"
            ) from None

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        self._pairs += [(context, rest) for _, context, rest in requests]
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("prompts are rendered here, not answered")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("prompts are rendered here, not answered")
