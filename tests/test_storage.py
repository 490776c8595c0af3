"""Storage: an object is there whole or not at all, whoever else writes and whatever the disk says."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from prism_ray import storage
from prism_ray.errors import InputError, PrismError
from prism_ray.storage import (
    TEMPORARY,
    LocalStore,
    StorageError,
    open_store,
    publish_folder,
    read_json,
    sha256_of,
    sha256_of_file,
    to_json,
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def everything_in(store: LocalStore) -> list[str]:
    """Files below the root, temporary ones included."""
    return sorted(p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file())


def test_of_two_creators_of_one_name_exactly_one_wins(store: LocalStore) -> None:
    for race in range(50):
        barrier = threading.Barrier(2)
        won: list[bytes] = []

        def create(data: bytes, key: str = f"race/{race}", barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if store.create(key, data):
                won.append(data)  # noqa: B023 - joined before the next round

        threads = [threading.Thread(target=create, args=(data,)) for data in (b"first" * 1000, b"second" * 1000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"race/{race}") == won[0]
    assert not list((store.root / TEMPORARY).iterdir())


def test_create_leaves_what_is_there_alone(store: LocalStore) -> None:
    assert store.create("a/b", b"old")
    assert not store.create("a/b", b"new")
    assert store.read("a/b") == b"old"
    assert everything_in(store) == ["a/b"]


def test_without_hard_links_create_is_still_exclusive(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert store.create("a", b"old")
    assert not store.create("a", b"new")
    assert store.read("a") == b"old"
    assert everything_in(store) == ["a"]


def test_put_replaces_the_whole_object(store: LocalStore) -> None:
    store.put("a", b"a long first version")
    store.put("a", b"short")
    assert store.read("a") == b"short"
    assert everything_in(store) == ["a"]


def test_a_reader_never_sees_half_an_object(store: LocalStore) -> None:
    versions = [bytes([n]) * 200_000 for n in range(2)]
    store.put("a", versions[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for version in versions:
                store.put("a", version)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(store.read("a") in versions for _ in range(200))
    finally:
        stop.set()
        writer.join()


def test_a_refused_object_is_not_published(store: LocalStore) -> None:
    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"data", "the check sees the written file"
        raise PrismError("bad")

    with pytest.raises(PrismError, match="bad"):
        store.create("a", b"data", check=refuse)
    assert everything_in(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_with_path_and_free_bytes_and_leaves_the_old_object(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    store.put("images/a", b"old")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"no space left \(\d+ bytes free\); make room") as refused:
        store.put("images/a", b"new")
    assert str(store.root / "images/a") in str(refused.value)
    assert refused.value.exit_code == 1
    monkeypatch.undo()
    assert store.read("images/a") == b"old"
    assert everything_in(store) == ["images/a"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_failing_disk_is_one_line_and_leaves_the_old_object(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store.put("images/a", b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="check the disk and run the same command again"):
        store.put("images/a", b"new")
    monkeypatch.undo()
    assert store.read("images/a") == b"old"
    assert everything_in(store) == ["images/a"]


def test_a_full_disk_publishes_nothing_new(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        store.create("a", b"data")
    monkeypatch.undo()
    assert everything_in(store) == []
    assert store.create("a", b"data"), "once there is room"


@pytest.mark.parametrize("key", ["", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", ".", "a/./b"])
def test_a_key_that_leaves_the_store_is_refused(store: LocalStore, key: str) -> None:
    for action in (store.read, store.size, store.keys, store.remove, lambda k: store.put(k, b"")):
        with pytest.raises(InputError, match="storage key"):
            action(key)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["with space", "ünïcödé 数字", "a" * 200, "quote'\"", "percent%20#?"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path / name))
    store.check_writable()
    assert store.create("a/b", b"data")
    assert open_store(f"file://{tmp_path / name}").read("a/b") == b"data"
    assert store.keys("a") == ["a/b"]


def test_keys_are_sorted_and_know_no_temporary_files(store: LocalStore) -> None:
    for key in ("b/2", "b/10", "a/1", "b/c/3"):
        store.put(key, b"")
    assert store.keys("b") == ["b/10", "b/2", "b/c/3"]
    assert store.keys("none") == []


def test_a_missing_object_has_no_size_even_below_a_file(store: LocalStore) -> None:
    store.put("a", b"123")
    assert (store.size("a"), store.size("b"), store.size("a/b")) == (3, None, None)


def test_removing_what_is_not_there_is_fine_and_a_folder_goes_whole(store: LocalStore) -> None:
    store.put("a/b/c", b"")
    store.remove("none")
    store.remove("a")
    assert everything_in(store) == []


@pytest.mark.parametrize("url", ["az://bucket/x", "ftp://host/x", "http://host/x"])
def test_a_scheme_it_cannot_write_exactly_once_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"storage='.*': scheme .* is not supported; known: a local path"):
        open_store(url)


def test_storage_that_cannot_be_written_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file/below", tmp_path / ("a" * 300), Path("/proc/none")):
        with pytest.raises(InputError, match=r"choose another storage") as refused:
            LocalStore(root).check_writable()
        assert str(root) in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="not writable"):
            LocalStore(tmp_path).check_writable()
    finally:
        tmp_path.chmod(0o700)


def test_probing_leaves_nothing_behind(store: LocalStore) -> None:
    store.check_writable()
    assert list(store.root.iterdir()) == []


def test_json_is_canonical_and_damage_is_one_line(store: LocalStore) -> None:
    assert to_json({"b": 1, "a": "ü"}) == to_json({"a": "ü", "b": 1})
    assert "ü".encode() in to_json("ü")
    store.put("a.json", to_json({"a": 1}))
    assert read_json(store, "a.json") == {"a": 1}
    assert read_json(store, "b.json") is None
    store.put("a.json", b'{"a": ')
    with pytest.raises(PrismError, match=r"a\.json: damaged"):
        read_json(store, "a.json")


def test_a_folder_is_published_once_and_the_first_stays(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert publish_folder(tmp_path / "one", tmp_path / "final")
    assert not publish_folder(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_both_digests_agree(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data" * 100_000)
    assert sha256_of_file(tmp_path / "file") == sha256_of(b"data" * 100_000)


def test_a_log_grows_line_by_line(store: LocalStore) -> None:
    store.append("events.jsonl", "one")
    store.append("events.jsonl", "zwei ü")
    assert store.read("events.jsonl").decode() == "one\nzwei ü\n"


def test_what_is_read_together_is_read_again_when_it_changed_and_only_then(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for n in range(3):
        store.put(f"receipts/{n}.json", b"%d" % n)
    os.utime(tmp_path / "receipts", (1, 1))  # a folder that has not changed for long
    first = store.read_all("receipts")
    assert first == {"receipts/0.json": b"0", "receipts/1.json": b"1", "receipts/2.json": b"2"}
    assert store.read_all("receipts") is first

    store.put("receipts/1.json", b"x")
    again = store.read_all("receipts")
    assert again == dict(first) | {"receipts/1.json": b"x"}
    assert again["receipts/0.json"] is first["receipts/0.json"]
    store.remove("receipts/2.json")
    assert set(store.read_all("receipts")) == set(store.sizes("receipts")) == {"receipts/0.json", "receipts/1.json"}


def test_what_changes_in_place_shows_once_the_listing_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("images/a", b"whole")
    os.utime(tmp_path / "images", (1, 1))
    assert store.sizes("images") == {"images/a": 5}
    (tmp_path / "images/a").write_bytes(b"cut")
    now = time.time()
    monkeypatch.setattr(storage.time, "time", lambda: now + 5.1)
    assert store.sizes("images") == {"images/a": 3}
    assert store.read_all("images") == {"images/a": b"cut"}


def test_a_folder_in_a_folder_is_always_looked_into(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("attempts/unit/1.json", b"1")
    os.utime(tmp_path / "attempts", (1, 1))
    assert store.keys("attempts") == ["attempts/unit/1.json"]
    (tmp_path / "attempts/unit/2.json").write_bytes(b"2")
    assert store.keys("attempts") == ["attempts/unit/1.json", "attempts/unit/2.json"]
