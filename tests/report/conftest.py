"""Fixtures of the report's tests."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from report_samples import CLASS_NAMES, SummaryMaker, summary_with_shards

from prism_ray.report.contents import RunSummary


@pytest.fixture
def make_summary(tmp_path: Path) -> SummaryMaker:
    """Makes runs in `runs/<label>` of the test's folder; keywords replace fields of the summary."""

    def make(label: str = "prism", *, class_names: Sequence[str] = CLASS_NAMES, **changes: object) -> RunSummary:
        return summary_with_shards(tmp_path / "runs" / label, label, class_names, changes)

    return make
