"""Associative recall in rows of up to 8,192 tokens by models that were trained on rows of 256.

The task of bmojo_mqar.py (arXiv:2312.04927): up to 8 pairs first, then the questions anywhere behind them, so at 8,192 most lie
thousands of tokens away. B'MOJO (arXiv:2407.06324) beside attention without positions and with rotary ones, which see everything,
and beside the state-space mixer alone; all with a convolution of four taps before them, all with as many parameters. The second
curve is accuracy by distance in rows of 8,192. The state of all but attention stays as it is whatever the length. Rotary attention
has q/k-norm: without it, it does not learn the task in these steps.
"""

from configs.question import Curve, Question, Variant

LENGTHS = (512, 1024, 2048, 4096, 8192)
COMMON = [
    "data.seq_len=256",
    "train={steps: 800, batch_size: 16, val_tokens: 32768, precision: fp32, val_every: 400, save_every: 400}",
    f"eval.recall=[{', '.join(f'data.seq_len={n}' for n in LENGTHS)}]",
]
TASK = "eval/mqar_seq_len-{}"


def mixer(settings: str) -> Variant:
    """The base with another mixer, its SwiGLU as wide as makes the parameters equal."""
    return Variant([*COMMON, f"model.blocks.base.mixer={{{settings}}}"], to="bmojo")


question = Question(
    base="configs/bmojo-mqar.yaml",
    variants={
        "bmojo": Variant(COMMON),
        "attention_nope": mixer("kind: attention, heads: 2, token_shift: 4, rope_theta: null"),
        "attention_rope": mixer("kind: attention, heads: 2, token_shift: 4, qk_norm: true"),
        "fading": mixer("kind: mamba2, head_dim: 16, d_state: 4"),
    },
    baseline="bmojo",
    metrics=["val/accuracy", f"{TASK.format(8192)}/acc"],
    curves=[
        Curve(f"{TASK}/acc", LENGTHS, "tokens of a row"),
        Curve(
            "eval/mqar_seq_len-8192/by/distance/{}/accuracy",
            ("128-255", "512-1023", "1024-2047", "2048-4095", "4096-8191"),
            "distance",
        ),
    ],
    seeds=3,
)
