"""How large the mini tasks are, without importing what generates them (a test holds both together)."""

from harness.tasks.world import facts

TEXT_TASKS = ("mini_choice", "mini_context", "mini_math", "mini_recall")
PICTURE_TASKS = ("mini_chart", "mini_diagram", "mini_document", "mini_ocr")
MINI_TASKS = (*TEXT_TASKS, *PICTURE_TASKS)
N_QUESTIONS = 200
REQUESTS_A_QUESTION = {"mini_choice": 4}


def n_questions(task: str) -> int:
    """Questions of a mini task."""
    return sum(fact.is_evaluated for fact in facts()) if task in ("mini_recall", "mini_choice") else N_QUESTIONS
