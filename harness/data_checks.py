"""What can be wrong with the `[data]` sections of a suite beyond their keys: names, keys that contradict each other, cycles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.schema_data import SOURCES, Bos, Builtin, Data, Drawings, Generated, Hub, Jsonl, Mix, Rows, Teacher, Tunnel
from harness.task_files import gives_answers

if TYPE_CHECKING:
    from harness.schema import Diagnostics, File
    from harness.suite import ResolvedVariant

Mistake = tuple[str, str, tuple[str, list[str]] | None]
"""Key, message, and (what was written, what is known) where the nearest spelling helps."""
_FORMATS = "messages, prompt with response, or text"


def data_mistakes(data: Mapping[str, Data], uses: list[tuple[str, str]]) -> Iterator[Mistake]:
    """Every mistake of the data sections, given the keys of the suite that name one and the names."""
    inner = [use for name in data for use in inner_uses(name, data)]
    for key, name in uses + inner:
        if name not in data:
            yield key, f'unknown data set "{name}"', (name, list(data))
    for name in sorted(set(data) - _reached({name for _, name in uses}, data)):
        yield f"data.{name}", "nothing uses it; remove it", None
    lengths = {section.seq_len for section in data.values() if isinstance(section, Builtin)}
    if len(lengths) > 1:
        yield "data", "builtin sections differ in seq_len, so their splits would overlap; give all of them one seq_len", None
    for name, section in data.items():
        if isinstance(section, Rows):
            yield from _row_mistakes(f"data.{name}", section)
        elif isinstance(section, Mix):
            yield from _mix_mistakes(name, section, data)
        elif isinstance(section, Generated):
            yield from _generation_mistakes(f"data.{name}", section, data)
        elif isinstance(section, Tunnel):
            for domain, times in Counter(section.domains).items():
                if times > 1:
                    yield f"data.{name}.domains", f'"{domain}" is repeated; name it once', None


def source_mistake(problem: Any) -> Mistake | None:
    """What pydantic found wrong with the source of a section, or with a key that only other sources have; else None."""
    name, *rest = problem["loc"][1:]
    known = sorted(SOURCES)
    if problem["type"] == "union_tag_not_found":
        return f"data.{name}.source", "missing; it is required", ("", known)
    if problem["type"] == "union_tag_invalid":
        found = str(problem["ctx"]["tag"])
        return f"data.{name}.source", f"found {found!r}", (found, known)
    if not rest:
        return f"data.{name}", f"found {problem['input']!r}; a data section is a table with a source", ("", known)
    key = rest[-1]
    is_elsewhere = len(rest) == 2 and any(key in section.model_fields for section in SOURCES.values())
    if problem["type"] == "extra_forbidden" and is_elsewhere:
        return (
            f"data.{name}.{key}",
            f'has no effect with source = "{rest[0]}"; remove it',
            ("", sorted(SOURCES[rest[0]].model_fields)),
        )
    return None


def diagnostics_mistakes(file: File) -> Iterator[tuple[str, str]]:
    """What contradicts in [diagnostics]: text needs data, answers need a task that generates some. Key and message."""
    given = file.diagnostics
    if given is None:
        return
    if given.on == "text" and given.data is None:
        yield "diagnostics.data", f'missing; on = "text" measures on the held-out split of a data set: {", ".join(file.data)}'
    if given.on == "answers" and given.data is not None:
        yield "diagnostics.data", 'has no effect with on = "answers", which measures on answers to the tasks; remove it'
    if given.on == "answers" and all(
        task.pictures == "grey" or gives_answers(task.name, task.path) is False for task in file.task
    ):
        whys = {"shown": "scored by likelihood", "grey": "a control with grey pictures"}
        why = ", ".join(f"{task.name}: {whys[task.pictures]}" for task in file.task) or "there is none"
        yield "diagnostics.on", f'"answers" needs a [[task]] whose answers are generated ({why}); add one, or set on = "text"'


def data_uses(variants: Iterable[ResolvedVariant], diagnostics: Diagnostics | None) -> list[tuple[str, str]]:
    """The keys outside [data] that name a data section, and the names."""
    used = [("diagnostics.data", diagnostics.data)] if diagnostics and diagnostics.data is not None else []
    for variant in variants:
        if variant.data:
            used.append((f'variant "{variant.name}": data', variant.data))
        if variant.quantization:
            used.append((f'variant "{variant.name}": quantization.calibration.data', variant.quantization.calibration.data))
    return used


def with_stages(data: Mapping[str, Data], uses: list[tuple[str, str]]) -> list[str]:
    """The sections of `uses` and of their mixes, in the order of the suite: they become token batches, others only give prompts."""
    mixes = {name: section for name, section in data.items() if isinstance(section, Mix)}
    named = {name for _, name in uses} | _reached({name for _, name in uses}, mixes)
    named |= {part.data for name in named & mixes.keys() for part in mixes[name].parts}
    return [name for name in data if name in named]


def inner_uses(name: str, data: Mapping[str, Data]) -> list[tuple[str, str]]:
    """The keys of a data section that name another one, and the names."""
    section = data[name]
    if isinstance(section, Mix):
        return [(f"data.{name}.parts[{i}].data", part.data) for i, part in enumerate(section.parts)]
    return [(f"data.{name}.prompts", section.prompts)] if isinstance(section, Teacher) else []


def _reached(names: set[str], data: Mapping[str, Data]) -> set[str]:
    """The data sections that `names` are made of, themselves included."""
    reached: set[str] = set()
    pending = [name for name in names if name in data]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [inner for _, inner in inner_uses(name, data) if inner in data]
    return reached


def _row_mistakes(where: str, section: Rows) -> Iterator[Mistake]:
    given = section.model_fields_set
    formats = [key for key in ("messages", "prompt", "text") if getattr(section, key) is not None]
    if len(formats) != 1:
        found = " and ".join(formats) or "none of them"
        yield where, f"found {found}; say which fields hold the text by exactly one of: {_FORMATS}", None
        return
    if formats == ["prompt"] and section.response is None:
        yield f"{where}.response", "missing; a prompt needs the field of its response", None
    yield from _image_key_mistakes(where, section)
    of_prompts = {"response", "chat"}
    without_effect = {"messages": of_prompts, "text": of_prompts | {"too_long"}, "prompt": set[str]()}[formats[0]]
    for key in sorted(without_effect & given):
        why = "a text is cut in pieces of seq_len" if key == "too_long" else "it is about prompt and response"
        yield f"{where}.{key}", f"has no effect with {formats[0]}: {why}; remove it", None
    if section.shortest > section.seq_len:
        yield f"{where}.min_tokens", f"found {section.shortest}; allowed: at most seq_len = {section.seq_len}", None


def _image_key_mistakes(where: str, section: Rows) -> Iterator[Mistake]:
    if section.images is None:
        return
    if section.text is not None:
        yield f"{where}.images", "has no effect with text: images belong to a chat; use messages, or prompt with response", None
    if not section.chat:
        yield f"{where}.chat", "found false, with images; their places are written by the chat template: remove it", None
    if section.images in (section.messages, section.prompt, section.response):
        yield f"{where}.images", f'"{section.images}" is the field of the text; name the field that holds the images', None


def _mix_mistakes(name: str, section: Mix, data: Mapping[str, Data]) -> Iterator[Mistake]:
    parts = [part.data for part in section.parts]
    if len(parts) == 1:
        yield f"data.{name}.parts", "found one part; a mix has two or more, each with data and weight", None
    for twice in sorted({part for part in parts if parts.count(part) > 1}):
        yield f"data.{name}.parts", f'"{twice}" is repeated; give it one weight', None
    inner = {part for part in parts if part in data}
    if name in _reached(inner, data):
        yield f"data.{name}.parts", "the mix is a part of itself; parts are other data sections", None


def _generation_mistakes(where: str, section: Generated, data: Mapping[str, Data]) -> Iterator[Mistake]:
    if section.max_tokens >= section.seq_len:
        yield (
            f"{where}.max_tokens",
            f"found {section.max_tokens}; allowed: less than seq_len = {section.seq_len}, which holds the prompt too",
            None,
        )
    if section.temperature == 0:
        for key in sorted({"top_p", "top_k"} & section.model_fields_set):
            yield f"{where}.{key}", "has no effect with temperature = 0; remove it", None
        if isinstance(section, Bos):
            yield f"{where}.temperature", "found 0: every text would be the same; allowed: above 0", None
        elif isinstance(section, Teacher) and section.samples_per_prompt > 1:
            yield f"{where}.samples_per_prompt", "has no effect with temperature = 0: all samples would be the same", None
    if not isinstance(section, Teacher):
        return
    if section.keep != "all" and section.scorer is None:
        yield f"{where}.scorer", f'missing; keep = "{section.keep}" needs it. Allowed: gsm8k, mini_math, boxed', None
    if section.keep == "all" and section.scorer is not None:
        yield f"{where}.scorer", 'has no effect with keep = "all"; remove it', None
    prompts = data.get(section.prompts)
    if prompts is not None and not (
        isinstance(prompts, Builtin | Drawings | Tunnel) or (isinstance(prompts, Hub | Jsonl) and prompts.text is None)
    ):
        yield (
            f"{where}.prompts",
            f'"{section.prompts}" has no prompts; allowed: a section with source = "builtin", "drawings" or "tunnel", or rows with messages or prompt',
            None,
        )
