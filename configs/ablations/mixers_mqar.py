"""Which memory finds again what it was told, at equal parameters?

Associative recall (arXiv:2312.04927). Attention keeps every token. Linear attention adds up keys times values and forgets
nothing, the gated delta rule erases what a key held before it writes, and a mixture of memories sends each token to a few of
several such memories. All but attention remember 16 x 16 numbers in each head or memory; the baseline is the config's mixer.
"""

from configs.question import Question, Variant


def mixer(settings: str) -> Variant:
    """The base with another mixer, its SwiGLU as wide as makes the parameters equal."""
    return Variant([f"model.blocks.base.mixer={{{settings}}}"], to="gated_delta", on="params", vary="channel.hidden")


question = Question(
    base="configs/mqar.yaml",
    variants={
        "gated_delta": Variant(),
        "linear_attention": mixer("kind: linear_attention, heads: 1, head_dim: 16, conv: 4"),
        "mom": mixer("kind: mom, rule: {kind: gated_delta, heads: 1, head_dim: 16, expand_v: 1.0, gate: false}"),
        "attention": mixer("kind: attention, heads: 4"),
    },
    baseline="gated_delta",
    metrics=["val/accuracy", "val/by/pairs/16/accuracy"],
    seeds=5,
)
