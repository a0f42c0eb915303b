"""Does a memory of surprising tokens find what hybrids of state-space model and window cannot?

B'MOJO (arXiv:2407.06324) against its parts on associative recall, at equal bytes of state (by lot 5 per cent less): attention in a
window alone, the fading memory alone, both as alternating layers, B'MOJO-F (window and fading outputs in one softmax), B'MOJO, and
B'MOJO that keeps tokens by lot. All have a convolution of four taps before keys and queries, but for the attention of one of the two
hybrids: below it Mamba-2 has one already. What has no eidetic tokens has a wider window, or a larger state, instead. Queries come
anywhere behind the pairs (clustered ones hide the effect); those at a distance that no window reaches are also counted alone. Pairs
come first in a row, so a memory that keeps the earliest tokens would do: every run is also judged, without further training, with
filler before the pairs (lead 16 and 32): what depends on content stays, what depends on position falls. With random filler, which no
surprise tells from a pair: data.synthetic.filler=random --out runs/bmojo_mqar_random. Each variant has its own learning rate, chosen
on a seed that is not compared: at B'MOJO's, Mamba-2 looks far worse than it is.
"""

from configs.question import Curve, Question, Sweep, Variant

BMOJO = "{kind: bmojo, ssm: {kind: mamba2, head_dim: 16, d_state: 4}, heads: 2, window: 8, m_f: 1, m_e: %d, score: %s}"
ATTENTION = "{kind: attention, heads: 2, rope_theta: null, token_shift: 4, window: 8}"
MAMBA = "{kind: mamba2, head_dim: 16, d_state: 4}"


def mixer(settings: str, vary: str) -> Variant:
    """The base with another mixer that holds as many bytes."""
    return Variant([f"model.blocks.base.mixer={settings}"], to="bmojo", on="state", vary=vary)


def stacked(attention: str) -> Variant:
    """Mamba-2 below, attention in a window above, as many bytes in both together."""
    changes = [f"model.blocks.fading={{mixer: {MAMBA}, channel: {{kind: swiglu, hidden: 64}}}}"]
    changes += [f"model.blocks.base.mixer={attention}", "model.pattern=[fading, base]"]
    return Variant(changes, to="bmojo", on="state", vary="mixer.window")


question = Question(
    base="configs/bmojo-mqar.yaml",
    variants={
        "bmojo": Variant(),
        "bmojo_random": Variant(["model.blocks.base.mixer.score=random"]),
        "bmojo_f": mixer(BMOJO % (0, "innov"), "mixer.window"),
        "window": mixer(ATTENTION, "mixer.window"),
        "fading": mixer(MAMBA, "mixer.d_state"),
        "stacked": stacked(ATTENTION.replace("token_shift: 4, ", "")),
        "stacked_shift": stacked(ATTENTION),
    },
    baseline="bmojo",
    metrics=[
        "val/accuracy",
        "val/by/distance/64-127/accuracy",
        "eval/mqar_synthetic.lead-16_seq_len-144/acc",
        "eval/mqar_synthetic.lead-32_seq_len-160/acc",
    ],
    curves=[
        Curve("val/by/pairs/{}/accuracy", (2, 4, 8), "pairs"),
        Curve("val/by/distance/{}/accuracy", ("4-7", "8-15", "16-31", "32-63", "64-127"), "distance"),
    ],
    sweep=Sweep("optim.lr", (3.0e-3, 1.0e-2, 3.0e-2)),
    seeds=3,
)
