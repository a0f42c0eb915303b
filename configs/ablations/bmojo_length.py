"""Does a memory of surprising tokens go on working where no training row has been?

B'MOJO (arXiv:2407.06324, section 4.4) trained on rows of 256 bytes of text and read up to 8,192: the same held-out bytes, cut into
pieces of each length, so that a curve that falls means use of what lies further back, and one that rises, breaking down. Beside it
full attention with rotary positions, attention in the same window, and the state-space mixer alone; all with a convolution of four
taps, all with as many parameters. The second curve is the loss by position in pieces of 8,192: where something breaks.
Of recall at lengths never trained at: bmojo_length_recall.py.
"""

from configs.question import Curve, Metric, Question, Variant

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
COMMON = [
    "train={steps: 600, batch_size: 8, val_every: 300, val_tokens: 65536, sample_every: -1}",
    f"eval={{length: [{', '.join(map(str, LENGTHS))}]}}",
]


def mixer(settings: str) -> Variant:
    """The base with another mixer, its SwiGLU as wide as makes the parameters equal."""
    return Variant([*COMMON, f"model.blocks.base.mixer={{{settings}}}"], to="bmojo")


def loss(path: str) -> Metric:
    return Metric(path, more_is_better=False, unit="nats")


question = Question(
    base="configs/bmojo-small.yaml",
    variants={
        "bmojo": Variant(COMMON),
        "attention": mixer("kind: attention, heads: 4, token_shift: 4"),
        "window": mixer("kind: attention, heads: 4, token_shift: 4, window: 32"),
        "fading": mixer("kind: mamba2, head_dim: 32, d_state: 16"),
    },
    baseline="bmojo",
    metrics=["val/loss", loss("eval/length/loss_8192"), loss("eval/length/loss_at_4096")],
    curves=[
        Curve("eval/length/loss_{}", LENGTHS, "tokens of context", more_is_better=False, unit="nats"),
        Curve(
            "eval/length/loss_at_{}", ("0", *map(str, LENGTHS[:-1])), "position from", more_is_better=False, unit="nats"
        ),
    ],
    seeds=3,
)
