"""The README tells the truth: its commands run, its example part passes the contracts, its table comes from run files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand_in import write_question

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [re.findall(r'"[^"]*"|\S+', line) for line in lines if line.strip()]


def run(words: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def copy_of_the_project(to: Path) -> Path:
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    """Every command of the README in its order, on a model shrunk by ``--tiny``."""
    pytest.importorskip("lm_eval")
    project = copy_of_the_project(tmp_path)
    assert len(commands()) >= 7
    for words in commands():
        words = [w.strip('"').replace("runs/quickstart", "runs/quickstart-tiny") for w in words]
        assert words[0] == "python"
        if words[1] == "train.py" and "--resume" not in words:
            words.append("--tiny")
        if words[1] == "ablate.py":  # its runs are those of tests/test_ablate.py
            words += ["--tiny", "--minutes", "0"]
        if "eval" in words:
            words += ["--limit", "4"]
        done = run([sys.executable, *words[1:]], project, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_example_part_signs_the_contract(tmp_path: Path) -> None:
    """The part of "Add a part", added as the README says (one file, one line), passes the contract suite."""
    project = copy_of_the_project(tmp_path)
    (file,) = re.findall(r"The file, `(models/\S+\.py)`", TEXT)
    (code,) = blocks("python")[:1]
    (line,) = blocks("python")[1:]
    (project / file).write_text(code)
    zoo = project / "models" / "zoo.py"
    head, mark, tail = zoo.read_text().partition("MIXERS = {\n")
    assert mark
    zoo.write_text(head + mark + line + tail)
    done = run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_contracts.py",
            "-k",
            "running_mean",
        ],
        project,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert passed
    assert int(passed[1]) >= 10, done.stdout[-1000:]


def test_tables_come_from_the_stored_results() -> None:
    """`python -m bench readme` would change nothing."""
    from bench.readme import render

    assert render(TEXT) == TEXT


def test_a_table_says_what_its_numbers_are(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a choice lies at the end of what was tried, which runs gave no number, and among how many comparisons."""
    import ablate
    from bench import readme

    variants = "'b': Variant(['optim.lr=0.2', 'train.sample_prompt=diverge 2'])"
    more = "seeds=3, metrics=['val/loss', Metric('val/by/x/n', False)], sweep=Sweep('optim.lr', (0.1, 0.5, 1.0))"
    assert ablate.main([str(write_question(stand_in, variants, more))]) == 0
    report = stand_in / "runs" / "asked" / "report" / "report.json"
    monkeypatch.setattr(readme, "RESULTS", stand_in)
    (stand_in / "asked.json").write_text(report.read_text())
    table = readme.question_table("asked")
    assert "| optim.lr | val/loss ± sd | difference to a [interval] | val/by/x/n |" in table
    assert [row.split(" | ")[4] for row in table.splitlines()[2:4]] == ["0.1000 (first tried)"] * 2
    assert "- 1 of 6 runs ended without a number" in table
    assert "as Holm's procedure tested them among 2 comparisons" in table


def test_relative_links_and_files_exist() -> None:
    for name in re.findall(r"`((?:configs|models|kernels|data|training|eval|bench|tests)/[\w./-]+)`", TEXT):
        if name != "models/mixers/running_mean.py":
            assert (ROOT / name).exists(), name


def test_every_kind_of_the_zoo_is_named() -> None:
    from models import zoo

    for table in zoo.TABLE.values():
        for kind in table:
            assert f"`{kind}`" in TEXT, kind
