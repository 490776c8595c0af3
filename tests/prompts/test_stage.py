"""Prompts as a run makes them: by templates, by a server, by a local model; and by class id where nothing is read."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pipelines import save_twin
from transformers import CLIPTokenizer

from prism_ray.artifacts import MARKER
from prism_ray.config import PromptsConfig
from prism_ray.data.imagenet_names import class_names
from prism_ray.errors import InputError
from prism_ray.generation import class_ids_of_generator
from prism_ray.generator_files import takes_class_ids
from prism_ray.models.small_world import build_tokenizer
from prism_ray.options import BackEnd
from prism_ray.prompts.content import PHOTO_AXES, STYLES
from prism_ray.prompts.table import PromptRow, from_jsonl
from prism_ray.stages.prompts import make_prompts
from prism_ray.work import PROMPTS_FILE, PromptsItem

PLACES = ["river", "meadow", "harbour", "street", "kitchen", "forest", "beach", "garden"]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """A chat server that writes scenes, and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            scenes = json.dumps([f"beside a {place} at noon, seen from afar" for place in PLACES])
            body = json.dumps({"choices": [{"message": {"content": scenes}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join(timeout=10)


def made(item: PromptsItem) -> list[PromptRow]:
    make_prompts(item)
    return from_jsonl((Path(item.folder) / PROMPTS_FILE).read_bytes())


def item(
    folder: Path, prompts: PromptsConfig, *, names: tuple[str, ...] = ("cat", "dog"), kind: str = "sd"
) -> PromptsItem:
    generator = folder / kind
    if not generator.exists():
        save_twin(kind, generator)
    return PromptsItem(prompts, names, 0, str(generator), str(folder / "prompts" / "table"))


def test_a_server_writes_the_scenes_of_a_table(tmp_path: Path, server: tuple[str, list[dict]]) -> None:
    url, asked = server
    prompts = PromptsConfig(per_class=3, max_tokens=500, back_end=BackEnd.http, model="writer", url=url)
    rows = made(item(tmp_path, prompts))
    assert len(rows) == 6
    assert {row.source for row in rows} == {"http"}
    assert all(any(place in row.prompt for place in PLACES) for row in rows)
    assert {question["model"] for question in asked} == {"writer"}
    facts = json.loads((tmp_path / "prompts/table" / MARKER).read_text())
    assert facts["written_by"] == {"http": 6}


def test_a_table_that_is_lost_is_written_again_without_asking_again(
    tmp_path: Path, server: tuple[str, list[dict]]
) -> None:
    url, asked = server
    wanted = item(tmp_path, PromptsConfig(per_class=3, max_tokens=500, back_end=BackEnd.http, model="w", url=url))
    first, questions = made(wanted), len(asked)
    for path in sorted(Path(wanted.folder).iterdir()):
        path.unlink()
    Path(wanted.folder).rmdir()
    assert made(wanted) == first
    assert len(asked) == questions


def test_prompts_of_all_of_imagenet_fit_a_clip_tokenizer_and_nothing_is_cut_off(tmp_path: Path) -> None:
    """One that knows the words of contents and styles and spells others, so that it counts more than CLIP's would."""
    folder = save_twin("sd", tmp_path / "sd")
    texts = [*STYLES, "a photo of an", *(value for values in PHOTO_AXES.values() for value in values)]
    build_tokenizer(texts, max_length=77).save_pretrained(folder / "tokenizer")
    rows = made(item(tmp_path, PromptsConfig(per_class=2), names=tuple(class_names())))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    assert len(tokenizer("coucal").input_ids) > 2 + 3, "spelled"
    whole, cut = (
        tokenizer([row.prompt for row in rows], truncation=truncation, max_length=77).input_ids
        for truncation in (False, True)
    )
    assert len(rows) == 2000
    assert cut == whole
    assert 55 < max(map(len, whole)) <= PromptsConfig().max_tokens
    assert all(row.phrase in row.prompt for row in rows)


def test_a_local_model_that_is_none_is_refused(tmp_path: Path) -> None:
    prompts = PromptsConfig(back_end=BackEnd.transformers, model=str(tmp_path))
    with pytest.raises(InputError, match=r"prompts\.model=.*no config\.json"):
        made(item(tmp_path, prompts))


def test_phrases_that_teachers_chose_are_used(tmp_path: Path) -> None:
    wanted = item(tmp_path, PromptsConfig(per_class=2, max_tokens=500))
    chosen = PromptsItem(wanted.prompts, ("cat", "dog"), 0, wanted.generator_dir, wanted.folder, ("tabby", "poodle"))
    assert {row.phrase for row in made(chosen)} == {"tabby", "poodle"}


def test_a_generator_asked_by_class_gets_its_own_ids(tmp_path: Path) -> None:
    rows = made(item(tmp_path, PromptsConfig(), names=("zebra", "n01440764"), kind="dit"))
    assert [(row.prompt, row.phrase) for row in rows] == [("340", "zebra"), ("0", "n01440764")]
    assert takes_class_ids(tmp_path / "dit")


def test_classes_that_a_generator_does_not_know_are_refused(tmp_path: Path) -> None:
    folder = save_twin("dit", tmp_path / "dit")
    with pytest.raises(InputError, match="knows 1000 classes, the data set has 2; 'sneaker' is none of ImageNet's"):
        class_ids_of_generator(folder, ["zebra", "sneaker"])
    assert class_ids_of_generator(folder, [str(n) for n in range(1000)]) == list(range(1000))
