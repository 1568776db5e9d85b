"""AA-LCR: 100 questions over 30 sets of long documents. Its rows, its prompt frame, the checks of its texts, its exact match.

Source: the data set ArtificialAnalysis/AA-LCR (Apache-2.0): a CSV of questions, a zip of texts `lcr/<category>/<set>/<file>`, and the
frame of the prompt as its card gives it. Documents stand in the order of `data_source_filenames`. Departures:

- Questions are ordered by document set, each set where its first question stands: those of a set share the whole prompt up to
  the question, so an engine that caches prefixes reads a set once.
- A question that names a text which the zip lacks keeps its row, with the reason in `excluded`: never asked, never scored.
- A zip whose file names were read in another encoding is read anyway, where one file alone has the wanted letters and digits.
- The size of every prompt is held against `input_tokens` of its row: by cl100k_base where its file is at hand (TIKTOKEN_CACHE_DIR;
  nothing is downloaded), else by characters a token, within the range that the whole set has. `checks` of a row says which, and so
  does the description of the data set, with the digests of the files.

The judge that the benchmark asks for is no part of a task file: `harness/judge.py`. `score` is the exact match beside it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from harness.errors import DataError
from harness.models import mirror_folder
from harness.stats import INVALID
from harness.tasks.short_answers import is_short_answer

DATASET = "ArtificialAnalysis/AA-LCR"
QUESTIONS_FILE = "AA-LCR_Dataset.csv"
TEXTS_FILE = "extracted_text/AA-LCR_extracted-text.zip"
CHARACTERS_PER_TOKEN = (3.2, 5.3)
"""Characters of a prompt a cl100k token: the whole set has 3.24 to 5.22 (98 questions)."""
TOKENS_TOLERANCE = 0.02
"""Share by which a count by cl100k_base may differ from `input_tokens`."""
MOST_EXCLUDED = 0.25
"""Share of questions that may lack a text; above it the copy is broken."""

_COLUMNS = (
    "document_category",
    "document_set_id",
    "question_id",
    "question",
    "answer",
    "data_source_filenames",
    "input_tokens",
)
_CL100K = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
_CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_FEATURES = datasets.Features(
    {
        **{
            key: datasets.Value("string")
            for key in ("question_id", "source_question", "answer", "category", "cluster", "prompt")
        },
        "excluded": datasets.Value("string"),
        "checks": {
            "counted_by": datasets.Value("string"),
            "counted": datasets.Value("int64"),
            "input_tokens": datasets.Value("int64"),
        },
    }
)


def dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    """One row a question: `source_question`, `answer`, `prompt`, `cluster` (its document set), `excluded` (a reason or None), `checks`.

    Raises:
        DataError: a file, column or number that is not there; a text that is not UTF-8 or of another size than its row says; two
            texts that may be the wanted one; more than a quarter of the questions without a text.
    """
    questions = _file(QUESTIONS_FILE)
    commit = questions.parent.name if mirror_folder(DATASET) is None else None  # of the hub's cache: snapshots/<commit>/<file>
    texts = _file(TEXTS_FILE, commit)
    by_set: dict[str, list[dict[str, str]]] = {}
    for row in _read_questions(questions):
        by_set.setdefault(row["document_set_id"], []).append(row)
    with _Texts(texts) as corpus:
        parts = [datasets.Dataset.from_list(list(_rows_of(rows, corpus)), features=_FEATURES) for rows in by_set.values()]
    _require_few_excluded(parts, texts)
    made = datasets.concatenate_datasets(parts)
    counted_by = {checks["counted_by"] for checks in made["checks"] if checks is not None}
    made.info.description = (
        f"{_origin(commit)}, {questions.name} sha256 {_digest(questions)}, {texts.name} sha256 {_digest(texts)}; sizes of prompts checked by "
        f"{' and '.join(sorted(counted_by))}"
    )
    return {"test": made}


def frame(documents: list[str], question: str) -> str:
    """The prompt of a question, in the frame of the benchmark."""
    return f"{_documents_part(documents)}{_question_part(question)}"


def extract(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The answer is the whole response without the white space around it; "[invalid]" where there is none."""
    return [[response.strip() or INVALID for response in responses] for responses in resps]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`exact_match` by `short_answers`; no metric at all for an excluded question, which an average then leaves out."""
    if doc["excluded"]:
        return {}
    answer = results[0]
    return {"exact_match": float(answer != INVALID and is_short_answer(doc["answer"], answer))}


class _Texts:
    """The texts of the zip, by name, with the repair of names that were read in another encoding.

    No dataclass: lm-eval runs this file before it is a known module, and a dataclass looks for its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Texts:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path}: not a readable zip file ({error}); copy {DATASET} again") from error
        self._folders: dict[str, list[str]] = {}
        for name in self._zip.namelist():
            folder, _, file = name.rpartition("/")
            if file:
                self._folders.setdefault(folder, []).append(file)
        return self

    def __exit__(self, *about: object) -> None:
        self._zip.close()

    def read(self, folder: str, file: str) -> str | None:
        """The text `file` of `folder`, or None if the zip lacks it."""
        name = self._find(folder, file)
        if name is None:
            return None
        try:
            return self._zip.read(f"{folder}/{name}").decode("utf-8")
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path}: {folder}/{name}: damaged ({error}); copy {DATASET} again") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {folder}/{name}: not UTF-8 ({error.reason}); copy {DATASET} again") from error

    def _find(self, folder: str, file: str) -> str | None:
        names = self._folders.get(folder, [])
        if file in names:
            return file
        alike = [name for name in names if _spelling(name) == _spelling(file)]
        if len(alike) > 1:
            raise DataError(
                f"{self.path}: {folder}: {len(alike)} texts may be {file!r}: {', '.join(map(repr, alike))}; name it as the CSV does"
            )
        return alike[0] if alike else None


def _spelling(name: str) -> str:
    """ASCII letters and digits of a file name, after UTF-8 that was read as another encoding is read as UTF-8."""
    for encoding in ("cp437", "cp1252", "latin-1"):
        try:
            name = name.encode(encoding).decode("utf-8")
            break
        except UnicodeError:
            continue
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFC", name).lower())


def _rows_of(rows: list[dict[str, str]], corpus: _Texts) -> Iterator[dict[str, Any]]:
    """Rows of one document set; a text is read once."""

    @functools.cache
    def text(name: str) -> str | None:
        return corpus.read(f"lcr/{rows[0]['document_category']}/{rows[0]['document_set_id']}", name)

    @functools.cache
    def documents(names: str) -> str:
        return _documents_part([text(name) or "" for name in _names(names)])

    for row in rows:
        missing = [name for name in _names(row["data_source_filenames"]) if text(name) is None]
        about = {
            "question_id": row["question_id"],
            "source_question": row["question"],
            "answer": row["answer"],
            "category": row["document_category"],
            "cluster": row["document_set_id"],
        }
        if missing:
            reason = f"this copy of {DATASET} has no text {', '.join(map(repr, missing))} in {row['document_set_id']}"
            yield about | {"excluded": reason, "prompt": f"(Excluded: {reason}.)", "checks": None}
            continue
        part = documents(row["data_source_filenames"])
        prompt = part + _question_part(row["question"])
        checks = _checked_size(
            row, part, prompt, {name: len(text(name) or "") for name in _names(row["data_source_filenames"])}
        )
        yield about | {"excluded": None, "prompt": prompt, "checks": checks}


def _names(filenames: str) -> list[str]:
    return [name.strip() for name in filenames.split(";") if name.strip()]


def _documents_part(documents: list[str]) -> str:
    texts = "\n\n".join(f"BEGIN DOCUMENT {i}:\n{text}\nEND DOCUMENT {i}" for i, text in enumerate(documents, start=1))
    return f"BEGIN INPUT DOCUMENTS\n\n{texts}\n\nEND INPUT DOCUMENTS\n\n"


def _question_part(question: str) -> str:
    asked = f"START QUESTION\n\n{question}\n\nEND QUESTION\n"
    return f"Answer the following question using the input documents provided above.\n\n{asked}"


def _checked_size(row: dict[str, str], part: str, prompt: str, lengths: dict[str, int]) -> dict[str, Any]:
    """What was counted, beside what the row says; DataError if they do not fit."""
    count = _cl100k_counter()
    declared = int(row["input_tokens"])
    if count is not None:
        counted = _counted(count, part) + count(prompt[len(part) :])
        fits = abs(counted - declared) <= TOKENS_TOLERANCE * declared
        found, allowed = f"{counted:,} cl100k tokens", f"within {TOKENS_TOLERANCE:.0%}"
    else:
        low, high = CHARACTERS_PER_TOKEN
        counted = len(prompt)
        fits = low <= counted / declared <= high
        found, allowed = f"{counted:,} characters", f"{low} to {high} characters a token (cl100k_base is not at hand)"
    if not fits:
        sizes = ", ".join(f"{name} {n:,}" for name, n in lengths.items())
        raise DataError(
            f"{TEXTS_FILE}: question {row['question_id']}: the prompt has {found}, its row says {declared:,} tokens; allowed: {allowed}. "
            f"Characters of the texts of {row['document_set_id']}: {sizes}. One of them is cut or of another version; copy {DATASET} again"
        )
    return {"counted_by": "characters" if count is None else "cl100k_base", "counted": counted, "input_tokens": declared}


@functools.lru_cache(maxsize=1)
def _counted(count: Callable[[str], int], part: str) -> int:
    """Tokens of the documents of a set, counted once for its questions."""
    return count(part)


@functools.cache
def _cl100k_counter() -> Callable[[str], int] | None:
    """Counts tokens of cl100k_base, or None where tiktoken or the file of the encoding is not at hand; never downloads."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    file = Path(folder) / hashlib.sha1(_CL100K.encode()).hexdigest() if folder else None
    if file is None or not file.is_file():
        return None
    if _digest(file) != _CL100K_SHA256:
        raise DataError(f"{file}: not the file of cl100k_base (sha256 differs); replace it, or unset TIKTOKEN_CACHE_DIR")
    try:
        import tiktoken
    except ImportError:
        return None
    encoding = tiktoken.get_encoding("cl100k_base")
    return lambda text: len(encoding.encode_ordinary(text))


def _read_questions(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV, checked: columns, ids that are there once, counts that are numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error}); copy {DATASET} again") from error
    for column in _COLUMNS:
        if column not in columns:
            raise DataError(f'{path}: no column "{column}"; it has: {", ".join(columns) or "none"}')
    if not rows:
        raise DataError(f"{path}: no rows; copy {DATASET} again")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        empty = [column for column in _COLUMNS if not (row[column] or "").strip()]
        if empty:
            raise DataError(f"{path}: row {number}: {', '.join(empty)} is empty; copy {DATASET} again")
        if not row["input_tokens"].strip().isdigit() or int(row["input_tokens"]) == 0:
            raise DataError(f"{path}: row {number}: input_tokens {row['input_tokens']!r} is no number of tokens")
        if row["question_id"] in seen:
            raise DataError(f"{path}: row {number}: question_id {row['question_id']} is there twice")
        seen.add(row["question_id"])
    return rows


def _require_few_excluded(parts: list[datasets.Dataset], texts: Path) -> None:
    reasons = [reason for part in parts for reason in part["excluded"] if reason is not None]
    total = sum(map(len, parts))
    if len(reasons) > MOST_EXCLUDED * total:
        raise DataError(
            f"{texts}: {len(reasons)} of {total} questions lack a text, more than {MOST_EXCLUDED:.0%}; the first: {reasons[0]}. "
            f"Copy {DATASET} again"
        )


def _origin(commit: str | None) -> str:
    mirror = mirror_folder(DATASET)
    if mirror is None:
        return f"hub {DATASET} at {commit}, its newest when it was fetched"
    declared = mirror / "revision.txt"
    return f"mirror {DATASET}, {f'at {declared.read_text().strip()}' if declared.is_file() else 'revision unknown'}"


def _file(name: str, commit: str | None = None) -> Path:
    """A file of the data set: in the mirror where that has the data set, else from the hub or its cache, the newest or at a commit."""
    mirror = mirror_folder(DATASET)
    if mirror is not None:
        if not (mirror / name).is_file():
            raise DataError(f"{mirror}: the mirror of {DATASET} has no file {name}; copy it there")
        return mirror / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(DATASET, name, repo_type="dataset", revision=commit))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{DATASET}: {name} is neither in the mirror nor to be had from the hub ({reason}); put the data set under HARNESS_MIRROR"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
