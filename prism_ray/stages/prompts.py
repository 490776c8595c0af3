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

from prism_ray.data.publish import publish_files
from prism_ray.options import PromptWorld
from prism_ray.prompts.content import STYLES
from prism_ray.prompts.names import class_phrases
from prism_ray.prompts.table import TableSettings, count_words, table_hash, to_jsonl, write_table
from prism_ray.storage import to_json
from prism_ray.work import MARKER, PROMPTS_FILE, PromptsItem


def make_prompts(item: PromptsItem) -> None:
    """Write a table; nothing to do if its folder is there."""
    if item.is_done:
        return
    started, prompts = time.perf_counter(), item.prompts
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
    phrases = [found[0] for found in class_phrases(item.class_names, prompts.phrases)]
    rows = write_table(phrases, settings, count_tokens=_counter(Path(item.generator_dir)))
    facts = {
        "sha256": table_hash(rows),
        "rows": len(rows),
        "styles": dict(sorted(Counter(row.style for row in rows).items())),
        "seconds": time.perf_counter() - started,
    }
    publish_files(Path(item.folder), {PROMPTS_FILE: to_jsonl(rows), MARKER: to_json(facts)}, marker=MARKER)


def _counter(generator_dir: Path) -> Callable[[str], int]:
    """How a generator's tokenizer counts, both ends included."""
    folder = generator_dir / "tokenizer"
    if not folder.is_dir():
        return count_words  # it takes class ids
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return lambda text: len(tokenizer(text).input_ids)
