import io
import json
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save
from timm.models import _hub

from prism_ray import weights
from prism_ray.errors import InputError
from prism_ray.models import families
from prism_ray.weights import architectures, check_architecture, check_weights_file, find_weights

SAFETENSORS = save({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, metadata={"format": "pt"})


def pickled(*, zipped=True):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


def refusal(path, *, allow_pickle=False):
    with pytest.raises(InputError) as caught:
        check_weights_file(path, allow_pickle=allow_pickle)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


def test_a_whole_safetensors_file_is_accepted(write):
    check_weights_file(write(SAFETENSORS), allow_pickle=False)
    check_weights_file(write(save({})), allow_pickle=False)


def test_every_shortened_safetensors_file_is_refused(write):
    for size in (1, 7, 8, 9, 60, len(SAFETENSORS) - 1):
        assert "download or copy it again" in refusal(write(SAFETENSORS[:size]))


def test_bytes_after_the_last_tensor_are_refused(write):
    assert f"its header says {len(SAFETENSORS)}" in refusal(write(SAFETENSORS + b"\0"))


@pytest.mark.parametrize("header", [b"[1, 2]", b"{bad", b'{"a": {}}', b'{"a": 3}', b'{"a": {"data_offsets": "xy"}}'])
def test_a_header_that_is_none_is_refused(write, header):
    assert "safetensors file" in refusal(write(len(header).to_bytes(8, "little") + header))


def test_a_header_length_that_looks_like_a_pickle_is_read_as_a_length(write):
    content = save({}, metadata={"note": "x" * (640 - 30)})
    padding = 640 - int.from_bytes(content[:8], "little")
    content = save({}, metadata={"note": "x" * (640 - 30 + padding)})
    assert content.startswith(b"\x80\x02")
    check_weights_file(write(content), allow_pickle=False)


def test_a_header_length_of_terabytes_is_refused_without_reading_it(write):
    assert "unreadable" in refusal(write((1 << 60).to_bytes(8, "little") + b"{}"))


def test_files_that_are_not_weights_are_named_for_what_they_are(write, tmp_path):
    assert "git-lfs pointer" in refusal(write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"))
    assert "web page" in refusal(write(b"\n<!DOCTYPE html><html>Sign in</html>"))
    assert "web page" in refusal(write(b"<html><body>404", "model.bin"), allow_pickle=True)
    assert "empty" in refusal(write(b""))
    assert "neither safetensors nor a PyTorch pickle" in refusal(write(b"hello", "model.bin"))
    assert "does not exist" in refusal(tmp_path / "absent.safetensors")
    assert "no file" in refusal(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_needs_permission(write, zipped):
    path = write(pickled(zipped=zipped), "pytorch_model.bin")
    assert "allow_pickle=true" in refusal(path)
    check_weights_file(path, allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_a_safetensors_name_is_refused_even_with_permission(write, zipped):
    assert "pickle under a safetensors name" in refusal(write(pickled(zipped=zipped)), allow_pickle=True)


def test_a_shortened_zip_is_refused(write):
    assert "cut short" in refusal(write(pickled()[:-30], "model.pth"), allow_pickle=True)


def test_a_plain_zip_is_a_pickle_as_far_as_permission_goes(write):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    assert "allow_pickle" in refusal(write(buffer.getvalue(), "model.pth"))


def test_the_file_checked_is_the_file_timm_loads(tmp_path):
    assert _hub._PREFERRED_FILES == weights.PREFERRED_FILES
    assert _hub._EXT_PRIORITY == weights.EXTENSIONS
    (tmp_path / "config.json").write_text("{}")
    for name in ("z.bin", "b.safetensors", "a.safetensors", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(SAFETENSORS)
    assert find_weights(tmp_path).name == "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "pytorch_model.bin").unlink()
    assert find_weights(tmp_path).name == "a.safetensors"


def test_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        find_weights(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no config\.json"):
        find_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no weights"):
        find_weights(tmp_path)


def test_the_known_architectures_are_those_timm_has_registered():
    assert architectures() == set(timm.list_models())
    assert weights.OWN_ARCHITECTURES == families.NAMES


def test_a_misspelt_architecture_is_refused_with_the_nearest_names():
    with pytest.raises(InputError, match=r"^teachers.models.a.arch: 'resnet81' is .*resnet18"):
        check_architecture("resnet81", key="teachers.models.a.arch")
    with pytest.raises(InputError, match=r"prism_vgg"):
        check_architecture("prism_vg")
    with pytest.raises(InputError, match="list_models"):
        check_architecture("")
    check_architecture("prism_convnet")
    check_architecture("resnet18.tv_in1k")


def test_names_and_files_are_checked_without_loading_torch_and_at_once(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    program = """
import json, sys, time
from pathlib import Path
start = time.perf_counter()
from prism_ray.weights import check_weights_file, known_architecture
known = [known_architecture("resnet18"), known_architecture("resnet81")]
check_weights_file(Path(sys.argv[1]), allow_pickle=False)
heavy = [name for name in ("torch", "timm", "numpy") if name in sys.modules]
print(json.dumps([known, heavy, time.perf_counter() - start]))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "model.safetensors")]
    known, heavy, wall_s = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert known == [True, False]
    assert heavy == []
    assert wall_s < 2  # measured 0.06 s on 2 cores; the rest is for a loaded machine
