"""Published ways to sample, by name. Data only; what a source does not say is left to the suite, and then to the task's file.

The paper is arXiv 2601.20088 (Nemotron models, quantization-aware distillation), the tasks of ours that it and the others evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Protocol:
    """None: the source is silent, and what the suite says holds, else the task's own file. repeats: answers a question, by task; 1 where the source is silent."""

    source: str
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    repeats: dict[str, int] = field(default_factory=dict)


PROTOCOLS: dict[str, Protocol] = {
    "qad-paper": Protocol(
        source="arXiv 2601.20088: Super V1 49B, Nano 9B V2, AceReason 7B; silent on the length of answers and on MATH-500's repeats",
        temperature=0.6,
        top_p=0.95,
        repeats={"aime24": 48, "aime25": 48, "gpqa_diamond": 20, "ifeval": 5},
    ),
    "qad-paper-nemotron-3-nano": Protocol(
        source="arXiv 2601.20088: Nemotron 3 Nano; silent on the length of answers",
        temperature=1.0,
        top_p=1.0,
        repeats={"aime25": 16, "gpqa_diamond": 8, "aa_lcr": 5},
    ),
    "deepseek-r1": Protocol(
        source="DeepSeek-R1's report: 64 answers a question of AIME; of 4 to 64 for GPQA-Diamond and MATH-500, the fewest",
        temperature=0.6,
        top_p=0.95,
        max_tokens=32_768,
        repeats={"aime24": 64, "aime25": 64, "gpqa_diamond": 4, "math500": 4},
    ),
    "open-r1": Protocol(
        source="open-r1 with lighteval",
        temperature=0.6,
        top_p=0.95,
        max_tokens=32_768,
        repeats={"aime24": 64, "aime25": 64, "gpqa_diamond": 8, "math500": 4},
    ),
}
