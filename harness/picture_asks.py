"""What a task that shows pictures asks: one question after another, so that the pictures of one alone are in memory. No lm_eval of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from harness.errors import DataError, TaskError
from harness.evaluate import known_random_state
from harness.picture_documents import Document, Shown, documents, is_same_again, shown_by
from harness.picture_prompts import PicturePrompts
from harness.prepared import Ask, Question
from harness.sampling import sampling_of
from harness.task_about import TRAPS, question_of, shuffles
from harness.task_files import is_ours
from harness.task_settings import ResolvedTask


class PictureTask:
    """A task of lm-eval's with `doc_to_image`. A question whose pictures cannot be had or taken is left out with the reason.

    pair: of a context and what follows, the token ids of each. folder: where its pictures are stored. is_stock: of lm-eval's own.
    """

    def __init__(
        self,
        task: Any,
        asking: ResolvedTask,
        prompts: PicturePrompts,
        pair: Callable[[str, str], tuple[list[int], list[int]]],
        folder: Path,
        *,
        is_chat: bool,
        is_stock: bool,
    ) -> None:
        self._task, self._asking, self._prompts, self._pair, self._folder = task, asking, prompts, pair, folder
        self._is_chat, self._is_stock = is_chat, is_stock
        self._show, task.config.doc_to_image = task.config.doc_to_image, None  # else lm-eval would open them once more

    def ask(
        self, start: int, notes: list[str], on_progress: Callable[[int, int], None]
    ) -> tuple[list[Question], list[Ask], bool]:
        """The questions from number `start` on, what they ask, and whether limit leaves out some; adds to `notes`.

        on_progress: called with (questions made, questions in all).
        """
        task, asking = self._task, self._asking
        questions: list[Question] = []
        asks: list[Ask] = []
        with known_random_state():
            if task.config.process_docs is not None and not is_ours(asking.own_name) and not is_same_again(task):
                notes.append(shuffles(task.config.task))
            n_docs = len(task.eval_docs)
            limit = min(n_docs, asking.limit or n_docs)
            for done, document in enumerate(islice(documents(task), limit)):
                question, mine = self._question(start + done, document, notes)
                questions.append(question)
                asks += mine
                on_progress(done + 1, limit)
        if asking.pictures == "grey":
            notes.append(
                f"{asking.name} shows a grey picture in place of each: what is known without looking, no score of the task"
            )
        notes += [trap for name, trap in TRAPS.items() if self._is_stock and str(task.config.task).startswith(name)]
        return questions, asks, limit < n_docs

    def _question(self, number: int, document: Document, notes: list[str]) -> tuple[Question, list[Ask]]:
        shown: list[Shown] = []
        asks: list[Ask] = []
        lacking = None
        if self._is_stock or not document.fields.get("excluded"):
            try:
                shown = shown_by(self._task, self._show, document, self._folder, is_grey=self._asking.pictures == "grey")
                asks = [self._ask(number, instance, shown, notes) for instance in self._instances(document.given)]
            except DataError as error:
                asks, lacking = [], str(error)
        originals = [each.original for each in shown]
        given, fields = document.given, document.fields
        return question_of(self._task, number, given, fields, self._is_stock, pictures=originals, lacking=lacking), asks

    def _instances(self, given: dict[str, Any]) -> list[Any]:
        """lm-eval's requests for one document."""
        task = self._task
        try:
            context = task.fewshot_context(
                given,
                num_fewshot=0,
                system_instruction=self._asking.system_prompt,
                apply_chat_template=self._is_chat,
                fewshot_as_multiturn=self._is_chat,
                chat_template=self._prompts.chat if self._is_chat else None,
                gen_prefix=task.doc_to_prefix(given),
            )
            about = (task.config.task, 0, 1)
            found = task.construct_requests(doc=given, ctx=context, metadata=about, apply_chat_template=self._is_chat)
        except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
            raise TaskError(f"task {task.config.task}: its prompts cannot be made ({type(error).__name__}: {error})") from error
        return found if isinstance(found, list) else [found]

    def _ask(self, doc: int, instance: Any, shown: list[Shown], notes: list[str]) -> Ask:
        """The request of one of lm-eval's; DataError, with the reason alone, if it cannot be made."""
        prompt, behind = instance.args[:2]
        text, messages = self._prompts.render(prompt, len(shown), is_chat=self._is_chat)
        answer: dict[str, Any]
        if instance.request_type == "generate_until":
            sampling, stops = sampling_of(str(instance.task_name), behind, self._asking, notes)
            answer = {"sampling": sampling, "stops": stops}
        else:
            answer = {"continuation": tuple(self._pair(text, behind)[1]), "option": behind}
            text = text.rstrip()  # white space at its end belongs to the continuation
        images = [each.image for each in shown]
        encoded = self._prompts.encode(text, images)
        return Ask(
            doc,
            instance.idx,
            0,
            text,
            encoded.token_ids,
            **answer,
            images=tuple(image.digest for image in images),
            unexpanded_ids=encoded.unexpanded_ids,
            messages=messages,
            template_args=self._prompts.template_args if messages else {},
            image_sizes=tuple(each.size for each in shown),
        )
