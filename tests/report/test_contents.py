"""Run summaries: what was written is what is read, and nothing else."""

import json

import pytest
from report_samples import SummaryMaker

from prism_ray.errors import InputError
from prism_ray.report.contents import Cosine, Quarantined, RunSummary


def test_a_summary_survives_json(make_summary: SummaryMaker) -> None:
    summary = make_summary(quarantined=[Quarantined(unit_id="00001", reason="out of memory")], images_per_class=None)
    assert RunSummary.from_dict(json.loads(json.dumps(summary.to_dict(), allow_nan=False))) == summary


def test_nan_becomes_null(make_summary: SummaryMaker) -> None:
    content = make_summary(cosine=Cosine(mean=float("nan"), real_mean=0.5)).to_dict()
    assert content["cosine"]["mean"] is None
    assert content["cosine"]["real_mean"] == 0.5


def test_whole_numbers_are_accepted_where_numbers_are_meant(make_summary: SummaryMaker) -> None:
    summary = RunSummary.from_dict(make_summary().to_dict() | {"synthesis_s": 3})
    assert summary.synthesis_s == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 3}, r"summary: unknown key 'speed'"),
        ({"num_images": "six"}, r"summary\.num_images='six': expected int"),
        ({"num_images": True}, r"summary\.num_images=True: expected int"),
        ({"cosine": [1]}, r"summary\.cosine=\[1\]: expected an object"),
        ({"students": [{"seed": 0}]}, r"summary\.students\[0\]: the key 'labels' is missing"),
    ],
)
def test_a_wrong_summary_is_refused_by_key(
    make_summary: SummaryMaker, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        RunSummary.from_dict(make_summary().to_dict() | changes)


def test_a_student_of_an_unknown_label_kind_is_refused(make_summary: SummaryMaker) -> None:
    content = make_summary().to_dict()
    content["students"][0]["labels"] = "firm"
    with pytest.raises(InputError, match=r"summary\.students\[0\]\.labels='firm'"):
        RunSummary.from_dict(content)


def test_a_missing_key_is_named(make_summary: SummaryMaker) -> None:
    content = make_summary().to_dict()
    del content["dataset"]["num_test"]
    with pytest.raises(InputError, match=r"summary\.dataset: the key 'num_test' is missing"):
        RunSummary.from_dict(content)
