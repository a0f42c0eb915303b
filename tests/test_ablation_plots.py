"""Pictures of a question's report: who is who, and what the bars are."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.question import load_question
from eval import ablation_plots
from eval.ablation import answer
from eval.ablation_plots import COLORS, looks
from eval.inspection.figures import new_figure
from tests.stand_in import write_question


def test_ten_variants_have_a_color_each():
    found = looks([f"mixer_{i}" for i in range(COLORS)])
    assert len({look.color for look in found.values()}) == COLORS
    assert {(look.marker, look.dashes) for look in found.values()} == {("o", "-")}


def test_of_many_variants_those_of_one_name_share_a_color():
    """And no two look alike, as lines or as points."""
    names = [f"{name}_{size}" for name in ("mom", "bmojo", "bmojo_f", *"ghijk") for size in ("large", "small")]
    found = looks([*names, "attention", "some_mixer"])
    assert found["bmojo_large"].color == found["bmojo_small"].color != found["bmojo_f_small"].color
    assert found["some_mixer"].family == "some_mixer"
    for i in (2, 3):  # marker, dashes
        assert len({(look.color, look[i]) for look in found.values()}) == len(found) == 18
    assert len({look.color for look in found.values()}) == COLORS
    for name, count in (("mixer{}", 40), ("rate_{}", 12), ("f{}_x", 40)):
        many = looks([name.format(i) for i in range(count)])
        assert len({(look.color, look.marker) for look in many.values()}) == count
        assert len({(look.color, look.dashes) for look in many.values()}) == count
    pairs = looks([f"f{i}_{size}" for i in range(11) for size in ("large", "small")])
    assert len({(look.color, look.marker) for look in pairs.values()}) == 22


def test_bars_go_from_the_lowest_to_the_highest_run(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    import ablate

    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=3")
    assert ablate.main([str(asked)]) == 0
    folder = stand_in / "runs" / "asked"
    found = answer(load_question(asked), folder, (0, 1, 2))
    figures = []
    monkeypatch.setattr(ablation_plots, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    ablation_plots.plot_quality(found, stand_in / "quality.png")
    (figure,) = figures
    assert [axes.get_xlabel() for axes in figure.axes] == list(ablation_plots.PRICES.values())
    for axes in figure.axes:
        assert [container.get_label() for container in axes.containers] == ["a", "b"]
        for container, variant in zip(axes.containers, "ab", strict=True):
            values = next(line.values for line in found.lines if line.variant == variant)
            (segment,) = container.lines[2][0].get_segments()
            assert segment[:, 1].tolist() == pytest.approx([min(values), max(values)])
            assert container.lines[0].get_ydata()[0] == pytest.approx(sum(values) / 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
