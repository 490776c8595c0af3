"""`prism-ray report FOLDER FOLDER`: finished runs side by side, or one line that says why not."""

import shutil
from pathlib import Path

import pytest
from commands import Command, Result


@pytest.fixture
def folders(prism: Command, storage: Path) -> list[Path]:
    """Two finished runs on one data set."""
    assert prism("run", "method=random_real", "student.labels=[hard]").code == 0
    return sorted((storage / "runs").iterdir())


def refused(result: Result, *facts: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    for fact in facts:
        assert fact in result.err


def test_runs_are_compared_with_differences_to_the_first(
    prism: Command, folders: list[Path], storage: Path, tmp_path: Path
) -> None:
    own = {folder: (folder / "report/report.html").read_bytes() for folder in folders}
    compared = prism.bare("report", *map(str, folders))
    assert (compared.code, compared.err) == (0, "")
    (page,) = (storage / "benches").glob("runs-*/report.html")
    assert page.as_uri() in compared.out
    assert "soft vs prism" not in compared.out, "they have no kind of labels in common but hard ones"
    text = page.read_text()
    assert "2 runs on digits" in text
    assert "difference to prism, points" in text
    assert f"prism-ray report {folders[0]} {folders[1]}" in text
    assert (page.parent / "results.csv").exists()
    assert {folder: (folder / "report/report.html").read_bytes() for folder in folders} == own

    # Storage that was moved is read where it is now, and the comparison is written where it is wanted.
    moved = Path(shutil.move(storage, tmp_path / "moved"))
    again = prism.bare("report", *(f"{moved}/runs/{folder.name}/" for folder in folders), f"storage={tmp_path}/there")
    assert again.code == 0
    assert list((tmp_path / "there/benches").glob("runs-*/report.html"))


def test_one_folder_has_its_own_report_written_again(prism: Command, run_dir: Path) -> None:
    (run_dir / "report/report.html").unlink()
    written = prism.bare("report", str(run_dir))
    assert written.code == 0
    assert (run_dir / "report/report.html").as_uri() in written.out


def test_runs_of_one_method_are_told_apart_by_name(prism: Command, run_dir: Path, storage: Path) -> None:
    other = shutil.copytree(storage, storage.parent / "other") / "runs" / run_dir.name
    compared = prism.bare("report", str(run_dir), str(other))
    assert compared.code == 0
    assert f"{run_dir.name.removeprefix('digits_smoke-')} (2)" in compared.out


def test_what_cannot_be_compared_is_refused_in_one_line(prism: Command, run_dir: Path, tmp_path: Path) -> None:
    run = str(run_dir)
    refused(prism.bare("report", run, str(tmp_path)), f"{tmp_path}: is no folder of a run", "outputs/runs/NAME")
    refused(prism.bare("report", run, f"{run}/../nowhere"), "is no folder of a run")
    refused(prism.bare("report", run, f"{run}/"), "is named twice")
    refused(prism.bare("report", run, "seed=3"), "seed=3", "leave it out")
    refused(prism.bare("report", run, "storage=a", "storage=b"), "storage=b", "leave it out")


def test_settings_of_another_version_are_refused(prism: Command, run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("\n  seed: 0\n", "\n  seed: 0\n  of_tomorrow: 1\n"))
    refused(prism.bare("report", str(run_dir)), "config.yaml: holds no settings of this version", "of_tomorrow")
    config.write_text("- 1")
    refused(prism.bare("report", str(run_dir)), "holds no settings of this version")


def test_a_run_without_images_is_refused(prism: Command, run_dir: Path) -> None:
    assert prism("run", "seed=5", "stages=[prepare]").code == 0
    (empty,) = set(run_dir.parent.iterdir()) - {run_dir}
    refused(prism.bare("report", str(run_dir), str(empty)), "has no images yet")
