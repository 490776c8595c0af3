"""Models from URLs: copied once, whole or not at all, and never asked for again."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from pipelines import save_twin

from prism_ray.artifacts import MARKER, is_complete, local_folder
from prism_ray.errors import InputError
from prism_ray.models.generators import Placement, load_generator
from prism_ray.staging import check_elsewhere, found_here, is_elsewhere, staged, staged_classifier


@pytest.fixture
def shared(tmp_path: Path) -> str:
    """A pipeline in an object store, with files beside it that no pipeline is loaded from."""
    folder = save_twin("sd", tmp_path / "twin")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    (folder / "run.py").write_text("print('no')")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.put(f"{folder}/", "/models/sd/", recursive=True)
    return "memory://models/sd"


def test_a_model_is_copied_once_and_loads(shared: str, tmp_path: Path) -> None:
    import torch

    assert found_here(shared, tmp_path) is None
    folder = staged(shared, tmp_path)
    fsspec.filesystem("memory").store.clear()
    assert staged(shared, tmp_path) == folder == found_here(shared, tmp_path)
    assert load_generator(Path(folder), placement=Placement(torch.device("cpu"))).takes_text


def test_nothing_that_could_run_code_is_copied(shared: str, tmp_path: Path) -> None:
    folder = Path(staged(shared, tmp_path))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not {"run.py", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"} & names
    listed = json.loads((folder / MARKER).read_text())
    assert listed["source"] == shared
    assert {Path(name).name for name in listed["files"]} == names - {MARKER}
    assert "unet/diffusion_pytorch_model.safetensors" in listed["files"]


def test_a_copy_that_was_cut_off_is_no_copy(shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    get = type(memory).get_file

    def cut(self: object, path: str, target: str, **more: object) -> None:
        get(memory, path, target, **more)
        if path.endswith("safetensors"):
            os.truncate(target, 10)

    monkeypatch.setattr(type(memory), "get_file", cut)
    with pytest.raises(Exception, match="was cut off on its way"):
        staged(shared, tmp_path)
    assert found_here(shared, tmp_path) is None
    monkeypatch.undo()
    assert Path(staged(shared, tmp_path), MARKER).is_file()


def test_an_empty_address_is_refused(tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    with pytest.raises(InputError, match=r"generator\.source='memory://nothing'"):
        staged("memory://nothing", tmp_path)
    assert not list(tmp_path.glob("generators/*"))


def test_the_hub_is_not_asked_in_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        check_elsewhere("hub:owner/name", tmp_path)
    with pytest.raises(InputError, match="no name on the hub"):
        check_elsewhere("hub:name", tmp_path)
    assert not is_elsewhere("/a/folder")


def test_a_hub_model_that_was_copied_before_needs_no_hub(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from prism_ray.staging import staged_path

    shutil.copytree(staged(shared, tmp_path), staged_path("hub:owner/name", tmp_path))
    check_elsewhere("hub:owner/name", tmp_path)
    assert found_here("hub:owner/name", tmp_path) is not None


def test_folders_of_this_machine_reach_every_worker_through_an_object_store(tmp_path: Path) -> None:
    """In local storage they are used where they lie; a changed one is another copy."""
    generator = save_twin("sd", tmp_path / "twin")
    (generator / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (teacher / name).write_bytes(name.encode())
    artifacts = f"memory://{tmp_path.name}/artifacts"
    for stage, folder, names in (
        (staged, generator, {"model_index.json", "unet/diffusion_pytorch_model.safetensors"}),
        (staged_classifier, teacher, {"config.json", "model.safetensors"}),
    ):
        assert stage(str(folder), tmp_path / "artifacts") == str(folder)
        address = stage(str(folder), artifacts)
        assert address.startswith(artifacts)
        assert is_complete(address)
        copy = local_folder(address)
        found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        assert names <= found
        assert not {"notes.txt", "unet/diffusion_pytorch_model.bin"} & found
        assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in names)
        assert stage(str(folder), artifacts) == address
    (teacher / "config.json").write_bytes(b"changed")
    assert staged_classifier(str(teacher), artifacts) != address
