"""Does a hop over a graph of learned centroids do what a feed-forward layer does, at equal cost?

The memory cell of the Graph Memory Transformer (arXiv:2604.23862), as published and corrected (edges as log-probabilities, means
normalised before write-back, pressure on the usage of targets, displacements of fixed size), against feed-forward layers: dense
ones with as many parameters, with as many operations as our cell and as the cell as published takes, and as much wider as in the
paper's own comparison; and one from small matrices (arXiv:2406.16450), with as many parameters. Everything but the channel is equal,
the learning rate too: of 1e-3 and 3e-3 the latter was better for the published cell and for its dense rival. The published cell
without write-back tells how much of its result write-back makes. Another corpus: data.sources.0.path=FILE, for example WikiText-2.
"""

from configs.question import Question, Variant

DENSE = "model.blocks.base.channel={kind: gelu, hidden: 64}"
LOW_RANK = "model.blocks.base.channel={kind: structured_ffn, form: low_rank, activation: gelu, hidden: 512, rank: 8}"

question = Question(
    base="configs/gmt-small.yaml",
    variants={
        "gmt_paper": Variant(),
        "gmt_corrected": Variant(["model.blocks.base.channel.fidelity=corrected"]),
        "gmt_paper_no_writeback": Variant(
            ["model.blocks.base.channel.momentum=0.99999999", "model.blocks.base.channel.maintenance_every=0"]
        ),
        "dense_params": Variant([DENSE], to="gmt_paper", on="params"),
        "dense_flops": Variant([DENSE], to="gmt_paper", on="flops"),
        "dense_flops_published": Variant(["model.blocks.base.channel={kind: gelu, hidden: 72}"]),
        "dense_paper": Variant(["model.blocks.base.channel={kind: gelu, hidden: 175}"]),
        "low_rank_params": Variant([LOW_RANK], to="gmt_paper", on="params", vary="channel.rank"),
    },
    baseline="dense_params",
    metrics=["val/loss"],
    seeds=3,
)
