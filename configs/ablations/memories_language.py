"""Which memory makes a small language model better on real text, at equal cost?

Quickstart's transformer on Python source in bytes, and each of the four systems in it: an n-gram table in its second block (Engram,
arXiv:2601.07372), cells of a graph of centroids in place of feed-forward layers (the corrected GMT, arXiv:2604.23862), a mixture of
gated-delta memories in place of attention (MoM, arXiv:2502.13685), and B'MOJO in place of attention (arXiv:2407.06324). Each twice:
with as many parameters as the dense model, and with as many operations per token; what gives way is the feed-forward layer, or the
number of centroids. The table counts among the parameters, so at equal parameters it is small. Data, steps and learning rate are
equal; the rate is that of quickstart, which was chosen on the dense model. Another corpus: data.sources.0.path=FILE.
"""

from configs.question import Question, Variant

COMMON = ["train={steps: 600, batch_size: 8, val_every: 300, val_tokens: 131072, sample_every: -1}", "eval={}"]
ENGRAM = "{kind: engram, orders: [2, 3, 4], heads: 2, row_width: 16, base: %d, pad: 256}"
GMT = "model.blocks.base.channel={kind: gmt, slots: 32, width: 32, fidelity: corrected}"
RULE = "{kind: gated_delta, heads: 2, head_dim: 32, expand_v: 1.0, gate: false, conv: 4}"
MOM = f"model.blocks.base.mixer={{kind: mom, rule: {RULE}, memories: 4, top_k: 2}}"
FADING = "{kind: mamba2, head_dim: 32, d_state: 16}"
BMOJO = f"model.blocks.base.mixer={{kind: bmojo, ssm: {FADING}, heads: 4, window: 32, m_f: 1, m_e: 16}}"


def engram(base: int) -> str:
    return f"model.at={{1: {{memory: {ENGRAM % base}}}}}"


def equal(on: str, change: str, vary: str = "channel.hidden", multiple_of: int = 1) -> Variant:
    return Variant([*COMMON, change], to="dense", on=on, vary=vary, multiple_of=multiple_of)


question = Question(
    base="configs/quickstart.yaml",
    variants={
        "dense": Variant(COMMON),
        "engram_params": equal("params", engram(1000)),
        "engram_flops": equal("flops", engram(20000)),
        "gmt_params": equal("params", GMT, "channel.slots", 4),
        "gmt_flops": equal("flops", GMT, "channel.slots", 4),
        "mom_params": equal("params", MOM),
        "mom_flops": equal("flops", MOM),
        "bmojo_params": equal("params", BMOJO),
        "bmojo_flops": equal("flops", BMOJO),
    },
    baseline="dense",
    metrics=["val/loss"],
    seeds=5,
)
