"""How much does a mixer recall per byte of its state?

Associative recall (arXiv:2312.04927) of up to 8 pairs in rows of 128 tokens, two layers of width 32. Every mixer twice, with the
state of a small B'MOJO and with that of a large one, in bytes at the end of a row; attention, whose state grows, is here to show
that the task can be learned. All have a convolution of four taps before keys and values; feed-forward layers and data are the same.
Each mixer has its own learning rate, chosen at the large size on a seed that is not compared.
"""

from configs.question import Curve, Question, Sweep, Variant

BMOJO = "kind: bmojo, ssm: {kind: mamba2, head_dim: 16, d_state: 4}, heads: 2, m_f: 1"
ATTENTION = "kind: attention, heads: 2, token_shift: 4, rope_theta: null"
RULE = "heads: 1, head_dim: 8, expand_v: 1.0, gate: false, conv: 4"
MIXERS = {  # settings, and what is varied until the state is equal
    "bmojo_f": (f"{BMOJO}, window: 8, m_e: 0", "mixer.window"),
    "window": (f"{ATTENTION}, window: 8", "mixer.window"),
    "linear_attention": ("kind: linear_attention, heads: 1, head_dim: 8, conv: 4", "mixer.head_dim"),
    "mamba2": ("kind: mamba2, head_dim: 16, d_state: 4", "mixer.d_state"),
    "gla": ("kind: gla, heads: 1, head_dim: 8, expand_v: 1.0, conv: 4", "mixer.head_dim"),
    "gated_delta": (f"kind: gated_delta, {RULE}", "mixer.head_dim"),
    "mom": (f"kind: mom, rule: {{kind: gated_delta, {RULE}}}", "mixer.rule.head_dim"),
}


def mixer(settings: str, to: str | None = None, vary: str = "", tuned_as: str | None = None) -> Variant:
    """The base with another mixer; ``to``: the variant whose bytes of state it gets, by the setting ``vary``."""
    return Variant([f"model.blocks.base.mixer={{{settings}}}"], to, "state", vary, tuned_as=tuned_as)


question = Question(
    base="configs/bmojo-mqar.yaml",
    variants={
        "bmojo_large": Variant(),
        "bmojo_small": mixer(f"{BMOJO}, window: 4, m_e: 4", tuned_as="bmojo_large"),
        **{
            f"{name}_{size}": mixer(settings, f"bmojo_{size}", vary, tuned_as)
            for name, (settings, vary) in MIXERS.items()
            for size, tuned_as in (("large", None), ("small", f"{name}_large"))
        },
        "attention": mixer(ATTENTION),
    },
    baseline="bmojo_large",
    metrics=["val/accuracy", "val/by/distance/64-127/accuracy"],
    curves=[
        Curve("val/by/pairs/{}/accuracy", (2, 4, 8), "pairs"),
        Curve("val/by/distance/{}/accuracy", ("4-7", "8-15", "16-31", "32-63", "64-127"), "distance"),
    ],
    sweep=Sweep("optim.lr", (1.0e-3, 3.0e-3, 1.0e-2, 3.0e-2, 1.0e-1, 3.0e-1)),
    seeds=3,
)
