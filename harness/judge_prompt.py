"""The prompt of a judge: the equality check that AA-LCR publishes with its first release."""

from __future__ import annotations

import hashlib

PROMPT = """Assess whether the following CANDIDATE ANSWER is CORRECT or INCORRECT.
For the CANDIDATE ANSWER to be correct, it must be consistent with the OFFICIAL ANSWER.

The question, for reference only: {question}
The OFFICIAL ANSWER: {official_answer}
CANDIDATE ANSWER TO ASSESS: {candidate_answer}

Reply only with CORRECT or INCORRECT.
"""


def prompt_hash() -> str:
    """Identity of the judge's prompt."""
    return hashlib.sha256(PROMPT.encode()).hexdigest()[:16]
