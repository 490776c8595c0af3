"""Readers under files that nobody would write: the short form of `benchmarks/fuzz.py`."""

import os
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Reader, fuzz, make_case, readers, try_case

SLOW = {"config.yaml of a run": 60, "recipe": 60, "suite": 60}
CASES = 250
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
NAMES = [
    "manifest",
    "receipt",
    "attempt and quarantine",
    "pins",
    "lock",
    "config.yaml of a run",
    "recipe",
    "suite",
    "image and label shards",
    "prepared data set: dataset.json",
    "prepared data set: rows",
    "IDX files",
    "parquet from elsewhere",
    "encoded images",
    "safetensors header",
    "training checkpoint",
    "generator's indexes",
    "teacher's config.json",
    "label codecs",
    "attributes of a prompt",
    "prompt table",
    "answers of a language model",
]
OF_ANY_BYTES = [
    name for name in NAMES if name not in ("IDX files", "generator's indexes", "label codecs", "attributes of a prompt")
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_named_here(known: dict[str, Reader]) -> None:
    assert sorted(known) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_accepted_or_refused(known: dict[str, Reader], name: str) -> None:
    outcome = fuzz(name, known[name], cases=SLOW.get(name, CASES), seed=1)
    assert outcome.findings == []
    assert outcome.accepted + outcome.refused == outcome.cases
    assert outcome.refused > outcome.cases / 10, "most changes reach a check"


@pytest.mark.parametrize("name", OF_ANY_BYTES)
def test_any_bytes_are_accepted_or_refused(known: dict[str, Reader], name: str) -> None:
    @QUICK
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        _, error = try_case(known[name], data)
        assert error is None, f"{error!r}"

    check()


def test_a_case_depends_on_its_number_alone(known: dict[str, Reader]) -> None:
    reader = known["receipt"]
    cases = [make_case("receipt", reader, seed=0, number=number) for number in range(50)]
    assert cases == [make_case("receipt", reader, seed=0, number=number) for number in range(50)]
    assert len(set(cases)) > 40


def test_what_takes_its_process_down_is_a_finding_and_the_rest_goes_on() -> None:
    def read(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("refused") if number % 2 else KeyError("not ours")

    counted = Reader(lambda draw: draw.randrange(4), read, (ValueError,))
    outcome = fuzz("aborts", counted, cases=30, seed=0)
    assert outcome.cases == 30
    assert outcome.refused == sum(make_case("aborts", counted, seed=0, number=n) == 1 for n in range(30))
    aborted = [each for each in outcome.findings if "ended with status" in each["error"]]
    assert len(aborted) == sum(make_case("aborts", counted, seed=0, number=n) == 3 for n in range(30))
