"""By what rule should B'MOJO keep tokens: by surprise, by lot, the newest that left the window, or the earliest?

The task and the layer of bmojo_mqar.py (arXiv:2407.06324), constant filler; only the score differs, so parameters are equal, and the
state but for what surprise is measured with, 5 per cent. The pairs come first in a row, so keeping the earliest tokens is a good
rule there, and a bad one where filler stands before the pairs, as it does in the last two columns and never in training.
"""

from configs.question import Curve, Question, Variant


def score(name: str) -> Variant:
    return Variant([f"model.blocks.base.mixer.score={name}"])


question = Question(
    base="configs/bmojo-mqar.yaml",
    variants={"bmojo": Variant(), **{f"bmojo_{name}": score(name) for name in ("random", "fifo", "first")}},
    baseline="bmojo",
    metrics=[
        "val/accuracy",
        "val/by/distance/64-127/accuracy",
        "eval/mqar_synthetic.lead-16_seq_len-144/acc",
        "eval/mqar_synthetic.lead-32_seq_len-160/acc",
    ],
    curves=[Curve("val/by/distance/{}/accuracy", ("4-7", "8-15", "16-31", "32-63", "64-127"), "distance")],
    seeds=3,
)
