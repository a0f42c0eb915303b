"""The page of a run: it stands alone, says everything as text whatever a run contains, and opens in a browser without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from eval import html, report, run_page
from eval.inspection import verbatim
from eval.tables import markdown
from models import UserError
from tests.test_eval_runs import tiny_model, write_run
from tests.test_report import metrics

HOSTILE = """<script>alert(1)</script><img src="http://example.org/a.png" onerror='x'>&amp;"""
VOID = {"meta", "link", "img", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, text by the tag it stands in; tags must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def said(self, tag: str) -> str:
        return "\n".join(words for within, words in self.words if within == tag)

    def check_alone(self) -> None:
        """Nothing is loaded, nothing runs, and links lead to places of the page."""
        places = {attributes["id"] for _, attributes in self.tags if "id" in attributes}
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "embed", "form", "base")
            assert not [
                name for name in attributes if name.startswith("on") or name in ("srcset", "action", "background")
            ]
            source, target = attributes.get("src"), attributes.get("href")
            assert source is None or source.startswith("data:image/png;base64,")
            assert target is None or target == "data:," or target.removeprefix("#") in places
            assert "url" not in (attributes.get("style") or "")
        assert "url(" not in self.said("style")
        assert "@import" not in self.said("style")


def attribution() -> dict:
    target = {
        "at": 3, "window": 0, "gain": 0.5, "target": "</b>", "loss": 1.25, "agreement": 0.5,
        "tokens": ["a", HOSTILE, "\\n", "b"], "attribution": [0.2, -0.4, None, 0.0],
        "checked": [0, 1], "left_out": [0.125, -0.5],
    }  # fmt: skip
    return {"fillers": ["<i>", "␣"], "spaced": False, "targets": [target]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With everything that a run folder may hold, and text in it that would be tags."""
    pytest.importorskip("matplotlib")
    records = metrics(1.0)
    for record in records[:40]:
        record["losses"] = {"lm": record["loss"], "moe.balance": 1.0}
        record["stats"] = {
            "layers.0.channel.dead": 1.0,
            "layers.1.channel.dead": 2.0,
            "layers.0.channel.load": [0.5, 0.5],
        }
    records[-1]["val"]["accuracy"] = 0.625
    folder = write_run(tmp_path / "a<b>&c", tiny_model(), records)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "name": HOSTILE}))
    (folder / "samples.txt").write_text(f"=== step 8\nfirst\n\n=== step 16\n{HOSTILE}\n\n")
    (folder / "summary.txt").write_text("layers  part  <kind>\n")
    environment = {
        "command": ["train.py", HOSTILE], "commit": "0123456789abcdef", "uncommitted_changes": True, "python": "3.11",
        "versions": {"torch": "2.11"}, "finished": False,
        "kernels": {"ran": {"gla": {"reference": 12, "reason": "no <GPU>"}, "rope": {"triton": 3}}},
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    results = {
        "results": {"mqar": {"acc,none": 0.25, "acc_stderr,none": 0.1}},
        "n-samples": {"mqar": {"effective": 64}},
    }
    results["by"] = {"pairs": {"<4>": {"accuracy": 0.5, "answers": 8}}}
    (folder / "eval").mkdir()
    (folder / "eval" / "mqar_60.json").write_text(json.dumps(results))
    (folder / "eval" / "baselines.json").write_text(json.dumps({"orders": {"0": {"bpb": 4.5}}, "xz": HOSTILE}))
    (folder / "eval" / "torn.json").write_text('{"results": {')
    looked = folder / "inspection"
    looked.mkdir()
    report.plot({"one": records}, looked / "any-states.png")
    (looked / "inspect.json").write_text(json.dumps({"run": folder.name, "any": {"attribution": attribution()}}))
    table = "| slot | tokens |\n|-----:|--------|\n| 1 | `<b>` 2  `` ` `` 3 a\\|b |"
    (looked / "inspect.md").write_text(f"{HOSTILE}\n\n{table}\n\n![any-states](any-states.png)\n\n## Layer <1>\n")
    return folder


def page_of(run: Path) -> tuple[str, Page]:
    source = run_page.page(run, report.summary(run), run_page.inspections_of(run))
    return source, Page(source)


def test_a_page_stands_alone_whatever_the_run_says(run):
    source, page = page_of(run)
    page.check_alone()
    assert HOSTILE not in source
    assert "<script" not in source
    assert page.said("pre").count("<script>alert(1)</script>") >= 3  # the sample, the command, the config
    assert "default-src 'none'" in next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert [a["lang"] for t, a in page.tags if t == "html"] == ["en"]


def test_a_page_says_everything(run):
    _, page = page_of(run)
    titles = ["Summary", "Model", "Training", "Evaluation", "Samples", "Inspection", "Environment", "Configuration"]
    assert page.said("a").splitlines() == page.said("h2").splitlines() == titles
    assert page.said("h1") == "a<b>&c"
    assert page.said("span").count("commit 0123456789 with changes") == 1
    assert "not finished" in page.said("span")
    assert f"{report.summary(run)['params']:,}" in page.said("dd")
    assert page.said("dd").splitlines()[page.said("dt").splitlines().index("val accuracy")] == "0.6250"
    assert [a["alt"] for t, a in page.tags if t == "img"] == [
        "Loss in training, and of the validation data", "What else was logged, over training tokens", "any-states",
    ]  # fmt: skip
    cells = page.said("td")
    for words in ("0.2500", "by pairs", "<4>", "orders.0.bpb", "no <GPU>", "triton 3", "2.11", "a|b"):
        assert words in cells
    assert {"<b>", "`"} <= set(page.said("code").splitlines())
    assert "Layer <1>" in page.said("h3")
    first, last = (page.said("pre").index(words) for words in ("<script>", "first"))
    assert first < last  # the newest sample stands before the folded ones
    assert page.said("summary").splitlines() == ["baselines.json", "1 earlier ones", "config.yaml"]


def test_tokens_are_marked_by_their_attribution(run):
    source, page = page_of(run)
    assert '</span> <span class="against"' not in source
    marked = [a for t, a in page.tags if t == "span" and "title" in a]
    assert [(a["class"], a["style"]) for a in marked] == [
        ("for", "--a:0.188"), ("against", "--a:0.750"), ("against", "--a:0.000"), ("against", "--a:0.000"),
    ]  # fmt: skip
    titles = ["0: left out 0.125, gradient 0.2", "1: left out -0.5, gradient -0.4", "2: gradient nan", "3: gradient 0"]
    assert [a["title"] for a in marked] == titles
    assert HOSTILE in page.said("span")
    assert page.said("b") == "</b>"
    assert "agreement of both attributions 0.50" in page.said("p")
    assert "«<i>» or «␣»" in page.said("p")
    found = {"run": run.name, "any": {"attribution": {**attribution(), "spaced": True}}}
    (run / "inspection" / "inspect.json").write_text(json.dumps(found))
    assert '</span> <span class="against"' in page_of(run)[0]


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    (tmp_path / "exported").mkdir()
    assert Page(run_page.page(tmp_path / "exported", {})).said("h2") == ""
    page = Page(run_page.page(tmp_path / "exported", {}, model=tiny_model().cfg))
    page.check_alone()
    assert page.said("h2") == "Model"
    assert "an exported model" in page.said("span")
    run = write_run(tmp_path / "imported", tiny_model())
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no metrics"):
        report.summary(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "imported_from": "models/<llama>"}))
    page = page_of(run)[1]
    page.check_alone()
    assert page.said("h2").splitlines() == ["Summary", "Model", "Configuration"]
    assert "imported from models/<llama>" in page.said("span")
    assert "attention" in page.said("pre")


def test_the_command_writes_a_page_for_each_run(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert report.main([str(run), "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "any-states" in (out / "report.html").read_text(encoding="utf-8")
    other = write_run(tmp_path / "other", tiny_model(), metrics(0.9))
    (tmp_path / "seen").mkdir()
    found = {"run": "other", "any": {"attribution": attribution()}}
    (tmp_path / "seen" / "inspect.json").write_text(json.dumps(found))
    (tmp_path / "seen" / "inspect.md").write_text("what was seen\n")
    words = [str(run), str(other), "--out", str(out / "both")]
    assert report.main([*words, "--inspection", str(tmp_path / "seen")]) == 0
    pages = {p.parent.name: Page(p.read_text(encoding="utf-8")) for p in (out / "both").glob("*/report.html")}
    assert sorted(pages) == ["a<b>&c", "other"]
    assert "what was seen" in pages["other"].said("p")
    assert "what was seen" not in pages["a<b>&c"].said("p")
    assert report.main([*words, "--inspection", str(tmp_path)]) == 2
    assert "no inspect.json" in capsys.readouterr().err


def test_tables_and_text():
    made = Page(html.table(("name", "n", "share"), [("a", 1000, "1.5%"), ("<b>", None, "-")]))
    assert [a.get("class") for t, a in made.tags if t == "td"] == [None, "number", "number"] * 2
    assert made.said("td").splitlines() == ["a", "1,000", "1.5%", "<b>", "-", "-"]
    words = "## A `b`\n\nplain ``c`d`` <e>\nsecond line\n\n![gone](gone.png)"
    made = Page(html.from_markdown(words, Path("nowhere")))
    assert made.said("h3") == "A `b`"
    assert made.said("code") == "c`d"
    assert made.said("p").splitlines()[0] == "plain "
    assert "![gone](gone.png)" in made.said("p")


def read_back(words: str) -> Page:
    """Markdown as a page would show it."""
    return Page(html.from_markdown(words, Path("nowhere")))


@pytest.mark.parametrize(
    "shown",
    [
        "a", "a`b", "`", "``", "```py", "a``b`", "|", "\\", "\\|", "<b>&", "**", "#", " ", " a ", " `", "a ", "«`» ",
        "x\u2028y", "x\x0c",
    ],
)  # fmt: skip
def test_code_is_shown_as_it_stands(shown):
    """In a paragraph among other code, and in a cell."""
    made = read_back(f"see {verbatim.code(shown)} or {verbatim.code('c')}")
    assert [words for tag, words in made.words if tag == "code"] == [shown, "c"]
    assert [words for tag, words in made.words if tag == "p"] == ["see ", " or "]
    made = read_back(markdown(("token", "n"), [(verbatim.code(shown), 1), (verbatim.code("c"), 2)]))
    assert [words for tag, words in made.words if tag == "code"] == [shown, "c"]
    assert made.said("td").splitlines() == ["1", "2"]


@pytest.mark.parametrize(
    "shown",
    [
        "line one\\n\n\nline <two>", "```", "a\n```text\nb\n```\nc", "`````", "| a |\n|---|", "# no title", "  far  in ", "",
    ],
)  # fmt: skip
def test_a_block_is_shown_as_it_stands(shown):
    """Every line by itself, whatever it would be elsewhere; what stands around it is read as ever."""
    made = read_back(f"before\n\n{verbatim.block(shown)}\n\n## title\n\n{verbatim.block('second')}")
    assert made.said("pre").removesuffix("second").removesuffix("\n") == shown
    assert [a for tag, a in made.tags if tag == "pre"] == [{"class": "wrap"}] * 2
    assert (made.said("p"), made.said("h3")) == ("before", "title")
    assert [tag for tag, _ in made.tags] == ["p", "pre", "h3", "pre"]


def test_what_is_no_block_is_a_paragraph():
    assert read_back("```text\nnever closed").said("pre") == ""
    assert read_back("```text\nnever closed").said("p") == "```text\nnever closed"
    assert read_back("````\n```\n````").said("pre") == "```"
    assert read_back("```\na\n`````\nb").said("pre") == "a"
    assert read_back("a ```b``` c").said("code") == "b"


# -- in a browser


def look(page: Path, shot: Path, *more: str) -> str:
    """-> what the browser's console said; the picture is written to ``shot``."""
    assert BROWSER is not None
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    ]  # fmt: skip
    own = [f"--user-data-dir={shot.parent / 'browser'}", "--window-size=1280,900", f"--screenshot={shot}"]
    command = [BROWSER, *quiet, *own, "--enable-logging=stderr", "--v=0", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return "\n".join(re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_opens_light_and_dark_without_complaint(run, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    source = page_of(run)[0]
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    assert look(tmp_path / "page.html", tmp_path / "light.png") == ""
    assert look(tmp_path / "page.html", tmp_path / "dark.png", "--blink-settings=preferredColorScheme=0") == ""
    light, dark = (image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("light", "dark"))
    assert light.shape[1] == 1280
    assert light[:200].mean() > 0.9
    assert dark[:200].mean() < 0.2
    broken = source.replace("<main>", '<main><img src="http://example.org/a.png">')
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    assert "Content Security Policy" in look(tmp_path / "broken.html", tmp_path / "broken.png")
