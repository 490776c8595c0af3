"""One contract for every store; and of object stores: faults, parts, other processes, bad addresses."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from s3_server import BUCKET, SECRET_KEY, Server, environment, faulty

from prism_ray import stores
from prism_ray.errors import Fenced, InputError, PrismError
from prism_ray.ledger import Ledger, Receipt
from prism_ray.lock import RunLock, check_epoch, newest_epoch
from prism_ray.storage import LocalStore, Store, open_store, read_json, sha256_of


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server.s3_server() as running, environment(running):
        yield running


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    name = tmp_path.name
    if request.param == "s3":
        request.getfixturevalue("server")
        return open_store(f"s3://{BUCKET}/{name}/run")
    return open_store(str(tmp_path / "run") if request.param == "local" else f"memory://{name}/run")


@pytest.fixture
def s3(server: Server, tmp_path: Path) -> Store:
    return open_store(f"s3://{BUCKET}/{tmp_path.name}/run")


# The contract


def test_what_was_put_is_read_and_replaced_whole(store: Store) -> None:
    for data in (b"a long first version", b"short", b""):
        store.put("a/b", data)
        assert store.read("a/b") == data
        assert store.size("a/b") == len(data)
        assert store.sha256("a/b") == sha256_of(data)


def test_create_leaves_what_is_there_alone(store: Store) -> None:
    assert store.create("a/b", b"old")
    assert not store.create("a/b", b"new")
    assert store.read("a/b") == b"old"
    store.remove("a/b")
    assert store.create("a/b", b"new"), "once it is gone"


def test_of_several_creators_of_one_name_exactly_one_wins(store: Store) -> None:
    for race in range(5):
        barrier, won = threading.Barrier(4), []

        def create(number: int, race: int = race, barrier: threading.Barrier = barrier, won: list = won) -> None:
            barrier.wait()
            if store.create(f"race/{race}", b"%d" % number * 1000):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"race/{race}") == b"%d" % won[0] * 1000


def test_a_refused_object_is_not_published(store: Store) -> None:
    def refuse(written: object) -> None:
        raise PrismError("bad")

    with pytest.raises(PrismError, match="bad"):
        store.create("a", b"data", check=refuse)
    assert store.size("a") is None


def test_what_is_not_there_has_no_size_and_no_content(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"1")
    for key in ("none", "a", "a/c", "a/b2"):
        assert store.size(key) is None
        assert read_json(store, "none") is None
        for action in (store.read, store.sha256, lambda key: store.fetch(key, tmp_path / "copy")):
            with pytest.raises((FileNotFoundError, IsADirectoryError)):
                action(key)
    assert not (tmp_path / "copy").exists()
    assert store.keys("none") == store.keys("a/b") == []
    assert store.sizes("none") == store.read_all("none") == {}


def test_a_folder_is_listed_below_its_name_alone(store: Store) -> None:
    for n, key in enumerate(("b/2", "b/10", "a/1", "b/c/3", "b2/1", "b")[:5]):
        store.put(key, b"x" * n)
    assert store.keys("b") == ["b/10", "b/2", "b/c/3"]
    assert store.sizes("b") == {"b/10": 1, "b/2": 0, "b/c/3": 3}
    assert store.read_all("b") == {"b/10": b"x", "b/2": b"", "b/c/3": b"xxx"}


def test_read_all_sees_what_changed(store: Store) -> None:
    for n in range(30):
        store.put(f"r/{n:02d}", b"%d" % n)
    assert store.read_all("r") == {f"r/{n:02d}": b"%d" % n for n in range(30)}
    store.put("r/07", b"x")  # of the same size
    store.remove("r/08")
    store.put("r/30", b"30")
    found = store.read_all("r")
    assert (found["r/07"], found["r/30"], len(found)) == (b"x", b"30", 30)
    assert "r/08" not in found


def test_threads_read_a_folder_that_changes(store: Store) -> None:
    for n in range(10):
        store.put(f"r/{n}", b"%d" % n)
    failures = []

    def look() -> None:
        try:
            for _ in range(5):
                assert all(key == f"r/{data.decode()}" for key, data in store.read_all("r").items())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(10):
        store.remove(f"r/{n}")
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.read_all("r") == {}


def test_removing_what_is_not_there_is_fine_and_a_folder_goes_whole(store: Store) -> None:
    for key in ("a/b/c", "a/b/d", "ab/c"):
        store.put(key, b"1")
    store.remove("none")
    store.remove("a")
    assert (store.keys("a"), store.keys("ab")) == ([], ["ab/c"])


def test_an_object_moves_and_replaces_what_is_there(store: Store) -> None:
    store.put("a/b", b"new")
    store.put("c/d/e", b"old")
    store.move("a/b", "c/d/e")
    assert (store.size("a/b"), store.read("c/d/e")) == (None, b"new")


def test_an_object_of_a_sibling_is_copied(store: Store) -> None:
    sibling = open_store(store.url.rpartition("/")[0] + "/other")
    sibling.put("images/a", b"theirs")
    store.put("images/a", b"ours")
    store.copy("images/a", sibling, "images/a")
    sibling.put("images/a", b"changed")
    assert store.read("images/a") == b"theirs"


def test_files_and_folders_go_in_and_come_out(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store.put_file("a/file", tmp_path / "file")
    store.fetch("a/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    store.put("student/one/old", b"old")
    with store.built_folder() as built:
        (built / "sub").mkdir()
        (built / "sub" / "x").write_bytes(b"1")
        (built / "y").write_bytes(b"2")
        store.publish_folder(built, "student/one")
    assert not built.exists()
    assert store.read_all("student") == {"student/one/sub/x": b"1", "student/one/y": b"2"}


def test_parts_of_an_object_are_read(store: Store) -> None:
    data = os.urandom(200_000)
    store.put("a", data)
    with store.open("a") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == data[-1000:]
        file.seek(100)
        assert file.read(70_000) == data[100:70_100]
    with pytest.raises(FileNotFoundError):
        store.open("none")


@pytest.mark.parametrize("key", ["", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", ".", "a/./b"])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str) -> None:
    for action in (store.read, store.size, store.keys, store.remove, store.url_of, lambda k: store.put(k, b"")):
        with pytest.raises(InputError, match="storage key"):
            action(key)


def test_names_with_odd_characters_stay_what_they_are(store: Store) -> None:
    for name in ("with space", "ünïcödé", "percent%20#", "a+b&c=d", "x" * 200):
        store.put(f"odd/{name}", name.encode())
        assert store.read(f"odd/{name}") == name.encode()
        assert store.size(f"odd/{name}") == len(name.encode())
    assert len(store.keys("odd")) == 5


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    above = open_store(store.url.rpartition("/")[0])
    assert above.keys("run") == []


def test_a_log_keeps_its_lines_in_order(store: Store) -> None:
    for line in ("one", "zwei ü"):
        store.append("events.jsonl", line)
    if isinstance(store, LocalStore):
        assert store.read("events.jsonl").decode() == "one\nzwei ü\n"
    else:
        assert [data.decode() for data in store.read_all("events").values()] == ["one\n", "zwei ü\n"]


# Lock and ledger


def test_one_driver_at_a_time_and_the_old_one_is_fenced(store: Store) -> None:
    first = RunLock(store, name="r", lease_s=0.4).acquire()
    with pytest.raises(InputError, match="already being driven by process"):
        RunLock(store, name="r", lease_s=30).acquire()
    first._stop.set()  # as if it were killed elsewhere: the heart stops, nothing is released
    assert first._thread is not None
    first._thread.join()
    store.put("lock/000001.epoch", b'{"host": "elsewhere", "pid": 1}')
    second = RunLock(store, name="r", lease_s=0.4).acquire()
    assert newest_epoch(store) == second.epoch == 2
    with pytest.raises(Fenced, match="another driver took this run over"):
        check_epoch(store, first.epoch)
    second.release()
    third = RunLock(store, name="r", lease_s=30).acquire(sleep=lambda seconds: pytest.fail("the second had let go"))
    third.release()


def test_units_are_counted_given_up_taken_over_and_set_aside(store: Store) -> None:
    ledger = Ledger(store)
    for epoch in (1, 1, 2):
        ledger.start_attempt("synthesize", "u", epoch=epoch, node="n")
    key = ledger.start_attempt("synthesize", "u", epoch=2, node="n")
    ledger.fail_attempt(key, ValueError("no"))
    assert ledger.failed_attempts("synthesize", "u", epoch=2, live_nodes={"n"}) == [
        "its process died",
        "ValueError: no",
    ]
    ledger.quarantine("synthesize", "u", "id", ["no"])
    assert [entry["name"] for entry in ledger.quarantined()] == ["u"]
    assert ledger.retry() == 1
    assert ledger.quarantined() == ledger.failed_attempts("synthesize", "u", epoch=2, live_nodes={"n"}) == []

    other = Ledger(open_store(store.url.rpartition("/")[0] + "/other"))
    other.store.put("images/u.parquet", b"data")
    receipt = Receipt(
        stage="synthesize", name="u", unit_id="id", key="images/u.parquet", bytes=4, sha256=sha256_of(b"data")
    )
    assert ledger.adopt(receipt, other.store, epoch=1)
    assert ledger.receipts("synthesize") == {"u": receipt}
    assert ledger.verify() == []
    store.put("images/u.parquet", b"dat4")
    ledger.record_damage(ledger.verify())
    assert ledger.set_damaged_aside() == ["images/u.parquet"]
    assert store.read("quarantine/damaged/images/u.parquet") == b"dat4"
    assert ledger.receipts("synthesize") == {}
    assert not ledger.adopt(receipt, store, epoch=1) if store.size(receipt.key) else True


# Object stores alone


def test_large_objects_go_up_in_parts_and_are_created_once(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    data = os.urandom(11 << 20)
    assert s3.create("large", data)
    assert not s3.create("large", b"x" * len(data))
    assert s3.create("large", data), "its own bytes: an answer may have been lost"
    assert s3.read("large") == data


@pytest.mark.parametrize("seed", range(2))
def test_faults_of_a_third_of_all_calls_are_survived(server: Server, s3: Store, seed: int) -> None:
    quick = tuple(fault for fault in s3_server.FAULTS if fault != "timeout")
    with faulty(server, share=0.3, seed=seed, kinds=quick) as proxy, environment(proxy):
        store = open_store(s3.url)
        for n in range(8):
            assert store.create(f"k/{n:02d}", b"%d" % n)
            assert not store.create(f"k/{n:02d}", b"other")
            assert store.read(f"k/{n:02d}") == b"%d" % n
        assert store.read_all("k") == {f"k/{n:02d}": b"%d" % n for n in range(8)}
        store.move("k/00", "moved")
        store.remove("k")
        assert (store.read("moved"), store.keys("k")) == (b"0", [])
    assert sum(proxy.faults.values()) > 5


def test_silence_is_cut_off_and_asked_again(server: Server, s3: Store) -> None:
    with faulty(server, share=0.3, seed=3, kinds=("timeout",)) as proxy, environment(proxy):
        store = open_store(s3.url)
        assert all(store.create(f"k/{n}", b"1") for n in range(6))
    assert proxy.faults["timeout"] > 0


def test_large_objects_survive_faults(server: Server, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    data = os.urandom(11 << 20)
    with faulty(server, share=0.2, seed=1, kinds=("500", "503", "reset", "lost")) as proxy, environment(proxy):
        store = open_store(s3.url)
        assert store.create("large", data)
        assert store.read("large") == data


def test_a_store_that_never_answers_well_ends_in_one_line(
    server: Server, s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "LONGEST_PAUSE_S", 0.01)
    with faulty(server, share=1.0, kinds=("503",)) as proxy, environment(proxy):
        with pytest.raises(PrismError, match=r"failed 8 times \(SlowDown\); run the same command again"):
            open_store(s3.url).put("a", b"1")
        began = time.monotonic()
        with pytest.raises(InputError, match=r"gives no answer \(SlowDown\)"):
            open_store(s3.url).check_writable()
        assert time.monotonic() - began < 10


def test_another_process_is_seen_at_once(server: Server, s3: Store) -> None:
    s3.put("shared/a", b"1")
    assert s3.keys("shared") == ["shared/a"]
    code = (
        f"from prism_ray.storage import open_store; s = open_store({s3.url!r}); s.put('shared/b', b'2');"
        "print(s.read('shared/a').decode(), s.create('shared/a', b'x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | server.environment, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("1 False\n", "")
    assert s3.keys("shared") == ["shared/a", "shared/b"]
    assert s3.read_all("shared")["shared/b"] == b"2"


def test_a_thousand_units_cost_a_few_listings(server: Server, s3: Store) -> None:
    ledger = Ledger(s3)
    for n in range(60):
        ledger.write_receipt(Receipt(stage="synthesize", name=f"u{n}", unit_id="i", key=f"images/u{n}.parquet"))
        s3.put(f"images/u{n}.parquet", b"")
    assert len(ledger.receipts("synthesize")) == 60
    with faulty(server, share=0.0) as proxy, environment(proxy):
        fresh = Ledger(open_store(s3.url))
        assert len(fresh.receipts("synthesize")) == 60
        first = sum(proxy.requests.values())
        receipts, sizes = fresh.receipts("synthesize"), fresh.store.sizes("images")
        assert all(fresh.is_done(receipt, {}, sizes) for receipt in receipts.values())
        assert (first, sum(proxy.requests.values()) - first) == (61, 2), "a listing of each folder, no receipt again"


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("s3://no-such-bucket/x", {}, r"the bucket 'no-such-bucket' does not exist; create it"),
        ("s3://UPPER_case bucket/x", {}, r"is no valid bucket name"),
        (
            f"s3://{BUCKET}/x",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_CONFIG_FILE": "/none", "HOME": "/none"},
            r"no usable credentials \(NoCredentialsError\); set AWS_ACCESS_KEY_ID",
        ),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"gives no answer \(.*\); check network and"),
    ],
)
def test_a_bad_address_is_one_line_and_tells_no_key(
    server: Server, monkeypatch: pytest.MonkeyPatch, url: str, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    stores._filesystem.cache_clear()
    try:
        with pytest.raises(InputError, match=message) as refused:
            open_store(url).check_writable()
    finally:
        stores._filesystem.cache_clear()
    assert "\n" not in str(refused.value)
    assert SECRET_KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("code", "status"), [("AccessDenied", 403), ("InvalidAccessKeyId", 403), ("SignatureDoesNotMatch", 403)]
)
def test_wrong_keys_are_refused_at_once(s3: Store, monkeypatch: pytest.MonkeyPatch, code: str, status: int) -> None:
    """moto checks no signature, so the answer of a real store is put in its place."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    calls = []

    def refuse(*_: object, **__: object) -> None:
        calls.append(1)
        error = ClientError(
            {
                "Error": {"Code": code, "Message": f"{SECRET_KEY} is wrong"},
                "ResponseMetadata": {"HTTPStatusCode": status},
            },
            "PutObject",
        )
        raise translate_boto_error(error)

    fs = stores._filesystem("s3", stores.Purpose.probe)
    monkeypatch.setattr(fs, "pipe_file", refuse)
    with pytest.raises(InputError, match=rf"access refused \({code}\)") as refused:
        s3.check_writable()
    assert len(calls) == 1
    assert SECRET_KEY not in str(refused.value)


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    stores._filesystem.cache_clear()
    for url, extra in (("s3://b/x", "s3"), ("gs://b/x", "gcs")):
        with pytest.raises(InputError, match=rf"needs the package \w+; run `pip install 'prism-ray\[{extra}\]'`"):
            open_store(url).check_writable()


@pytest.mark.parametrize("url", ["s3://", "s3:///", "memory://", "gs:///"])
def test_an_address_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"names no bucket; expected \w+://BUCKET/FOLDER"):
        open_store(url)
