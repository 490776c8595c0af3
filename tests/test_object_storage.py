"""Whole runs on object storage: the bytes of a local run, whatever the network and the processes do."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3_server
from commands import SMOKE, products
from s3_server import BUCKET, Server, environment, faulty, products_at

from prism_ray import cli
from prism_ray.artifacts import _copy_of, damaged_files, listing_of, local_folder
from prism_ray.errors import PrismError
from prism_ray.ledger import MANIFEST, Ledger
from prism_ray.storage import open_store
from prism_ray.work import SYNTHESIZE

pytestmark = pytest.mark.timeout(900)
"""Each of the two first runs trains its teachers; on a busy machine that takes minutes."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server.s3_server() as running, environment(running):
        yield running


@pytest.fixture(scope="module")
def expected(pristine_storage: Path) -> dict[str, str]:
    """What the same run made in a local folder."""
    (run_dir,) = (pristine_storage / "runs").iterdir()
    return products(run_dir)


@pytest.fixture(scope="module")
def finished(server: Server) -> str:
    """Address of a storage with one finished run. Not to be written to."""
    url = f"s3://{BUCKET}/finished"
    assert cli.main(["run", *SMOKE, f"storage={url}"]) == 0
    return url


@pytest.fixture
def taught(finished: str, tmp_path: Path) -> str:
    """Address of a storage with the artifacts of that run alone."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    _copy_artifacts(finished, url)
    return url


def _copy_artifacts(origin: str, url: str) -> None:
    source, target = open_store(origin), open_store(url)
    for key in source.keys("artifacts"):
        if not key.startswith("artifacts/same_images"):
            target.copy(key, source, key)


def ledger_at(url: str) -> Ledger:
    root = open_store(url)
    (run,) = {key.split("/")[1] for key in root.keys("runs")}
    return Ledger(open_store(root.url_of(f"runs/{run}")))


def image_ids(ledger: Ledger) -> list[str]:
    receipts = ledger.receipts(SYNTHESIZE).values()
    tables = [pq.read_table(io.BytesIO(ledger.store.read(r.key)), columns=["image_id"]) for r in receipts]
    return [image_id for table in tables for image_id in table["image_id"].to_pylist()]


def start(url: str, server: Server, *settings: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "prism_ray", "run", *SMOKE, f"storage={url}", *settings],
        env=os.environ | server.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_makes_the_bytes_of_a_local_one(finished: str, expected: dict[str, str]) -> None:
    assert products_at(finished) == expected
    assert ledger_at(finished).manifest() is not None


def test_every_verb_finds_a_run_there(finished: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb, answer in (
        ("status", ": done, in s3://"),
        ("verify", "every object matches its receipt"),
        ("plan", ": begun"),
        ("report", f"look at the report:  {finished}/runs/"),
        ("export", "hf"),
        ("doctor", f"{finished} is writable"),
    ):
        capsys.readouterr()
        more = [f"export.folder={tmp_path / 'export'}", "export.formats=[timm,hf]"] if verb == "export" else []
        assert cli.main([verb, *SMOKE, f"storage={finished}", *more]) == 0
        assert answer in capsys.readouterr().out
    assert len(list((tmp_path / "export" / "hf" / "data").glob("*.parquet"))) == 4
    page = ledger_at(finished).store.read("report/report.html").decode()
    assert page.count('class="gallery-image"') > 20


def test_with_a_tenth_of_all_calls_spoilt_the_bytes_are_the_same(
    server: Server, taught: str, expected: dict[str, str]
) -> None:
    with faulty(server, share=0.1, seed=7) as proxy, environment(proxy):
        assert cli.main(["run", *SMOKE, f"storage={taught}"]) == 0
    assert set(proxy.faults) >= {"500", "503", "reset", "lost"}
    with environment(server):
        assert products_at(taught) == expected
        ledger = ledger_at(taught)
        assert ledger.verify() == []
        ids = image_ids(ledger)
        assert len(ids) == len(set(ids)) == 20


def test_a_killed_run_continues_and_makes_the_same(server: Server, taught: str, expected: dict[str, str]) -> None:
    process = start(taught, server)
    root = open_store(taught)
    try:
        while not [key for key in root.keys("runs") if "/receipts/synthesize/" in key]:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert ledger_at(taught).store.size(MANIFEST) is None
    assert cli.main(["run", *SMOKE, f"storage={taught}"]) == 0
    assert products_at(taught) == expected
    ids = image_ids(ledger_at(taught))
    assert len(ids) == len(set(ids)) == 20
    assert ledger_at(taught).verify() == []


def test_damage_is_found_set_aside_and_made_again(finished: str, expected: dict[str, str], tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    source, target = open_store(finished), open_store(url)
    for folder in ("artifacts", "runs"):
        for key in source.keys(folder):
            target.copy(key, source, key)
    target.remove("artifacts/same_images")
    store = ledger_at(url).store
    key = "images/train-00001-of-00004.parquet"
    data = store.read(key)
    store.put(key, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    store.remove("labels/train-00002-of-00004.parquet")
    assert cli.main(["verify", *SMOKE, f"storage={url}"]) == 1
    assert cli.main(["run", *SMOKE, f"storage={url}"]) == 0
    assert products_at(url) == expected
    assert store.size(f"quarantine/damaged/{key}") == len(data)
    assert cli.main(["verify", *SMOKE, f"storage={url}"]) == 0


def test_a_run_takes_over_what_another_of_the_storage_made(
    finished: str, taught: str, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = open_store(finished), open_store(taught)
    for key in (*source.keys("runs"), *source.keys("artifacts/same_images")):
        target.copy(key, source, key)
    assert cli.main(["run", *SMOKE, f"storage={taught}", "student.seeds=[1]", "stages=[synthesize,relabel]"]) == 0
    assert "4 units taken over from runs that made the same ones" in capsys.readouterr().out


def test_memory_is_storage_for_one_process(finished: str, expected: dict[str, str], tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    _copy_artifacts(finished, url)
    assert cli.main(["run", *SMOKE, f"storage={url}"]) == 0
    assert products_at(url) == expected


@pytest.mark.slow
def test_a_cluster_makes_the_same_through_the_store_alone(
    server: Server, taught: str, expected: dict[str, str], tmp_path: Path
) -> None:
    process = start(taught, server, "compute=ray")
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, (output, errors)
    assert products_at(taught) == expected
    assert not [key for key in open_store(taught).keys("runs") if "/.train/" in key], "nothing is left of Ray Train"


# Artifacts


def test_a_node_copies_an_artifact_once_and_mends_its_copy(finished: str) -> None:
    root = open_store(finished)
    (listing,) = [k for k in root.keys("artifacts/teachers") if "/vgg-" in k and k.endswith("/files.json")]
    folder = root.url_of(listing.rsplit("/", 1)[0])
    copy = local_folder(folder)
    assert copy == _copy_of(folder)
    weights = copy / "model.safetensors"
    before = weights.read_bytes()
    assert local_folder(folder) == copy
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert local_folder(folder) == copy
    assert weights.read_bytes() == before
    assert damaged_files(folder) == []


def test_a_damaged_artifact_is_one_line_that_names_it(finished: str, taught: str) -> None:
    root = open_store(taught)
    (key,) = [k for k in root.keys("artifacts/teachers") if "/vgg-" in k and k.endswith("/model.safetensors")]
    root.put(key, b"x" * (root.size(key) or 0))
    folder = root.url_of(key.rsplit("/", 2)[0])
    assert damaged_files(folder) == ["model.safetensors"]
    with pytest.raises(PrismError, match=r"model\.safetensors: is missing or differs from what was published; delete"):
        local_folder(folder, only=["model*"])
    assert listing_of(folder).files.keys() >= {"config.json", "prism_ray.json"}


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["storage=memory://x", "compute=ray"], "is the memory of this process alone, which no worker reaches"),
        (["storage=s3://no-such-bucket/x"], "the bucket 'no-such-bucket' does not exist"),
        (["storage=az://container/x"], "scheme 'az' is not supported; known: a local path, file://, s3://, gs://"),
        (["storage=s3://"], "names no bucket"),
    ],
)
def test_a_bad_storage_is_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    kept = [s for s in SMOKE if s.partition("=")[0] not in {given.partition("=")[0] for given in settings}]
    assert cli.main(["run", *kept, *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_relative_storage_inside_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "session_x/runtime_resources/working_dir_files/_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert cli.main(["run", *SMOKE, "storage=outputs"]) == 2
    assert "lies in the working directory of a submitted job" in capsys.readouterr().err
    assert not (folder / "outputs").exists()
