"""Prompts: the frozen table of what a generator is asked for, as a content-addressed artifact.

<artifacts>/prompts/<world>-<hash>/
    prompts.jsonl       one row per prompt, see `prompts.table`
    prism_ray.json      its digest, and how many rows each back end wrote
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prism_ray.artifacts import join, local_folder, publish_files, split
from prism_ray.generation import class_ids_of_generator
from prism_ray.generator_files import takes_class_ids
from prism_ray.options import BackEnd, PromptWorld
from prism_ray.prompts.chat_server import ChatServer, author_behind
from prism_ray.prompts.content import STYLES
from prism_ray.prompts.local_model import author_in
from prism_ray.prompts.names import class_glosses, class_phrases
from prism_ray.prompts.table import PHOTO, PromptRow, TableSettings, count_words, table_hash, to_jsonl, write_table
from prism_ray.prompts.write import Author
from prism_ray.staging import DESCRIPTION
from prism_ray.work import PROMPTS_FILE, PromptsItem


def make_prompts(item: PromptsItem) -> None:
    """Write a table; nothing to do if its folder is there."""
    if item.is_done:
        return
    started = time.perf_counter()
    is_by_class = takes_class_ids(local_folder(item.generator_dir, only=DESCRIPTION))
    rows = _class_rows(item) if is_by_class else _text_rows(item)
    facts = {
        "sha256": table_hash(rows),
        "rows": len(rows),
        "written_by": dict(sorted(Counter(row.source for row in rows).items())),
        "styles": dict(sorted(Counter(row.style for row in rows).items())),
        "seconds": time.perf_counter() - started,
    }
    publish_files(item.folder, {PROMPTS_FILE: to_jsonl(rows)}, facts=facts)


def _class_rows(item: PromptsItem) -> list[PromptRow]:
    """For a generator that is asked by class id: its id of each class."""
    ids = class_ids_of_generator(item.generator_dir, item.class_names)
    return [PromptRow(n, 0, str(ids[n]), name, PHOTO) for n, name in enumerate(item.class_names)]


def _text_rows(item: PromptsItem) -> list[PromptRow]:
    prompts = item.prompts
    settings = TableSettings(
        per_class=prompts.per_class,
        photo_share=prompts.photo_share,
        neutral_share=prompts.neutral_share,
        seed=item.seed,
        is_small=prompts.world is PromptWorld.small,
        name_only=prompts.name_only,
        styles=tuple(prompts.styles) or STYLES,
        max_tokens=prompts.max_tokens,
    )
    phrases = list(item.phrases) or [found[0] for found in class_phrases(item.class_names, prompts.phrases)]
    return write_table(
        phrases,
        settings,
        count_tokens=_counter(local_folder(item.generator_dir, only=["tokenizer/*"])),
        author=_author(item),
        glosses=class_glosses(item.class_names),
    )


def _author(item: PromptsItem) -> Author | None:
    """Who writes the scenes, None for templates."""
    prompts = item.prompts
    if prompts.back_end is BackEnd.template:
        return None
    assert prompts.model is not None, "refused by validation"
    if prompts.back_end is BackEnd.transformers:
        return author_in(Path(prompts.model))
    assert prompts.url is not None, "refused by validation"
    answers = join(split(item.folder)[0], "answers")
    return author_behind(
        ChatServer(
            prompts.url,
            prompts.model,
            answers,
            api_key_variable=prompts.api_key_variable,
            timeout_s=prompts.timeout_s,
        )
    )


def _counter(generator_dir: Path) -> Callable[[str], int]:
    """How a generator's tokenizer counts, both ends included."""
    folder = generator_dir / "tokenizer"
    if not folder.is_dir():
        return count_words  # it takes class ids
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return lambda text: len(tokenizer(text, verbose=False).input_ids)  # else it warns of those still to be cut
