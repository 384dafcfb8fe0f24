"""`python -m dpo_runner.cache`: listing and clearing what is kept between runs."""

from pathlib import Path

import numpy as np
import pytest

from dpo_runner.cache.__main__ import main
from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore
from tests.support.common import run_main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path))
    for folder in ("smollm2", "data/0123", "scores"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(bytes(3_000_000))
    with ReferenceStore("abcd", {"reference": "the base"}, 10**9) as store:
        store.add({b"key": PairLogps(*[np.zeros(5, np.float32)] * 2)})
    return tmp_path


def test_it_lists_everything_with_its_size(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    for line in ("models │ smollm2", "data │ 0123", "scores │ scores", "reference │ abcd.sqlite"):
        assert line in " ".join(printed.split()), printed
    assert "1 pairs; the base" in printed
    assert "9.0 MB in all" in printed


def test_it_clears_what_it_is_told_and_nothing_in_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["clear", "data", "scores"])
    assert "6.0 MB freed" in capsys.readouterr().out
    assert sorted(path.name for path in cache.iterdir()) == ["data", "reference", "smollm2"]
    assert not list((cache / "data").iterdir())
    with ReferenceStore("abcd", {}, 10**9), pytest.raises(SystemExit) as ended:
        main(["clear", "all"])
    assert ended.value.code == 2
    assert "abcd.sqlite: in use" in capsys.readouterr().err
    assert not (cache / "smollm2").exists()
    main(["clear", "reference"])
    assert not list((cache / "reference").glob("*.sqlite"))


def test_an_empty_cache_and_an_unknown_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "none"))
    main(["list"])
    assert "empty" in capsys.readouterr().out
    main(["clear", "all"])
    with pytest.raises(SystemExit) as ended:
        main(["clear", "everything"])
    assert ended.value.code == 2


def test_a_user_without_a_home_directory_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("DPO_RUNNER_CACHE")
    monkeypatch.setattr("os.getuid", lambda: 987_654)  # of no account, as in containers
    assert run_main(main) == 2
    told = "error: ~/.cache/dpo_runner: this home directory is not known; set DPO_RUNNER_CACHE=DIR, or HOME\n"
    assert capsys.readouterr().err == told
