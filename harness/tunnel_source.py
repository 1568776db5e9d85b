"""The source of the wind tunnel: the corpus that its models were trained on, one problem with its solution a chat of two turns.

Most solutions are terse and some of the worked ones wrong, as supervised training saw them (`harness.tasks.tunnel`); no question of a task
is among them. Questions recur in a long corpus, and are taken once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from harness.data import split_of
from harness.dialogues import Turn, render_dialogue, require_template
from harness.errors import DataError
from harness.generation import Ask, turn_ask
from harness.schema_data import Tunnel
from harness.tasks.tunnel import Solved, corpus

if TYPE_CHECKING:
    from harness.token_store import TokenWriter

MOST_REPEATED = 1_000
"""So many questions in a row that were there already, and the corpus is taken to have no others."""


def write_tunnel(name: str, section: Tunnel, writer: TokenWriter, *, tokenizer: Any, eos_ids: set[int]) -> dict[str, int]:
    """Append a sequence for each problem; counts of domains, of styles of solutions, and of problems that are too long.

    Raises:
        DataError: the tokenizer has no chat template or not all words, no problem fits `seq_len`, or there are not so many problems.
    """
    counts = Counter[str]()
    for solved in _problems(name, section):
        problem = solved.problem
        sequence = render_dialogue(tokenizer, [Turn(problem.question, solved.solution)], eos_ids)
        _require_known(name, tokenizer, sequence.token_ids)
        if len(sequence) > section.seq_len:
            counts["too_long"] += 1
            continue
        writer.append(split_of(problem.question), sequence)
        counts.update((problem.domain, solved.style))
    if counts.total() == counts["too_long"]:
        raise DataError(f"data.{name}.seq_len: no problem fits {section.seq_len} tokens; raise it")
    return dict(sorted(counts.items()))


def tunnel_asks(name: str, section: Tunnel, tokenizer: Any) -> Iterator[Ask]:
    """Each question as a prompt, with the right answer in its box as reference. DataError as `write_tunnel`."""
    require_template(tokenizer)
    for number, solved in enumerate(_problems(name, section), start=1):
        ask = turn_ask(number, Turn(solved.problem.question, solved.problem.terse), tokenizer)
        _require_known(name, tokenizer, ask.token_ids)
        yield ask


def _problems(name: str, section: Tunnel) -> Iterator[Solved]:
    seen: set[str] = set()
    repeated = 0
    for solved in corpus(section.seed, section.domains):
        if solved.problem.question in seen:
            repeated += 1
            if repeated == MOST_REPEATED:
                raise DataError(
                    f"data.{name}.problems: found {section.problems}; there are some {len(seen)} of {', '.join(section.domains)}: ask for fewer"
                )
            continue
        repeated = 0
        seen.add(solved.problem.question)
        yield solved
        if len(seen) == section.problems:
            return


def _require_known(name: str, tokenizer: Any, token_ids: tuple[int, ...]) -> None:
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in token_ids:
        raise DataError(
            f"data.{name}: the tokenizer does not know every word of the wind tunnel's problems; it is another than that of the models under "
            "suites/windtunnel/models, or was changed: restore it, or use another source"
        )
