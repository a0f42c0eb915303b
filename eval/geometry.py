"""Did the embeddings take the shape of the graph? ``python -m eval.geometry RUN``, for a run on the task ``path_star``.

A model may keep a graph as single associations, which leave its embeddings free, or as a geometry in which nodes lie near one
another that were never seen together (arXiv:2510.26745). Of every matrix that holds the nodes (embedding, and head where it is
another), with the mean over nodes taken off, X [nodes, D]:

- the mean cosine of two nodes of one arm, and of two nodes of different arms; without the root, which is in all arms
- how often the nearest other node is of the same arm
- how much of the Gram matrix X X^T lies in the lowest eigenvectors of the graph's Laplacian, and how far its own highest
  eigenvectors span the same space. The constant one is left out; the next ``degree - 1`` are one space: in them nodes of an arm
  move together.

What random embeddings would have stands beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import schema
from data.synthetic.path_star import PathStar
from eval.run import pick_device
from eval.tables import markdown
from models import UserError, zoo
from models.errors import guard
from models.folder import load_model, run_config
from training.runfolder import write_whole

LARGEST = 8192  # nodes: eigenvectors of a dense matrix


def laplacian(degree: int, length: int) -> Tensor:
    """Degrees minus adjacency, float64 [nodes, nodes]: the root first, then arm after arm from the inside outward."""
    nodes = degree * (length - 1) + 1
    outer = torch.arange(1, nodes)
    inner = torch.where((outer - 1) % (length - 1) == 0, 0, outer - 1)
    joined = torch.zeros(nodes, nodes, dtype=torch.float64)
    joined[inner, outer] = joined[outer, inner] = 1.0
    return joined.sum(dim=1).diag() - joined


def geometry(x: Tensor, degree: int, length: int) -> dict[str, float]:
    """Of the vectors [nodes, D] of a path-star's nodes, ordered as in `laplacian`."""
    x = x.double()
    x = x - x.mean(dim=0)
    modes = degree - 1
    low = torch.linalg.eigh(laplacian(degree, length)).eigenvectors[:, 1 : 1 + modes]
    high = torch.linalg.svd(x, full_matrices=False).U[:, :modes]
    arms = x[1:] / x[1:].norm(dim=1, keepdim=True)
    cosine = arms @ arms.T
    arm = torch.arange(len(arms)) // (length - 1)
    same, itself = arm[:, None] == arm, torch.eye(len(arms), dtype=torch.bool)
    nearest = cosine.masked_fill(itself, -torch.inf).argmax(dim=1)
    return {
        "within": cosine[same & ~itself].mean().item(),
        "across": cosine[~same].mean().item(),
        "nearest": (arm[nearest] == arm).double().mean().item(),
        "energy": ((low.T @ x).square().sum() / x.square().sum()).item(),
        "overlap": ((low.T @ high).square().sum() / modes).item(),
    }


def chance(degree: int, length: int, width: int) -> dict[str, float]:
    """What is expected of random vectors of ``width`` features, whose sum is zero once their mean is off. They span no more than
    ``width`` dimensions: with fewer than ``degree - 1`` of them, not even the best vectors overlap by 1."""
    nodes = degree * (length - 1) + 1
    cosine, modes = -1 / (nodes - 1), degree - 1
    return {
        "within": cosine,
        "across": cosine,
        "nearest": (length - 2) / (nodes - 2),
        "energy": modes / (nodes - 1),
        "overlap": min(width, modes) / (nodes - 1),
    }


def evaluate(run: Path | str, device: str = "auto", step: int | None = None) -> dict[str, Any]:
    """-> results, written to ``RUN/eval/geometry_<step>.json``. Raises UserError for a run on anything but a path-star."""
    run = Path(run)
    run_config(run)
    task = schema.load(run / "config.yaml").data.synthetic
    if not isinstance(task, PathStar):
        raise UserError(f"{run}: not trained on the task path_star")
    if task.nodes > LARGEST:
        raise UserError(f"{run}: {task.nodes} nodes; eigenvectors are only computed of up to {LARGEST}")
    model, folder = load_model(run, pick_device(device), step=step)
    nodes = torch.from_numpy(task.paths)
    order = torch.cat([nodes[:1, 0], nodes[:, 1:].flatten()])
    weights = {"embedding": model.embed.weight} | ({} if model.cfg.tied else {"head": model.head_weight})
    found = {name: geometry(w.detach().cpu()[order], task.degree, task.length) for name, w in weights.items()}
    at = int(folder.name.removeprefix("step_"))
    settings = {"step": at, "degree": task.degree, "length": task.length, "graph_seed": task.graph_seed}
    results = {"config": settings, "geometry": found, "chance": chance(task.degree, task.length, model.cfg.d_model)}
    target = run / "eval" / f"geometry_{at}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """A row for each matrix, and what random vectors would have."""
    names = list(results["chance"])
    rows = [
        (where, *(one[name] for name in names))
        for where, one in {**results["geometry"], "random": results["chance"]}.items()
    ]
    return markdown(("nodes in the", *names), rows)


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.geometry",
        description="Whether the embeddings of a run on the task path_star took the shape of its graph.",
        epilog="example: python -m eval.geometry runs/path_star --step 500",
    )
    p.add_argument("run", help="a run folder")
    p.add_argument("--device", default="auto")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    args = p.parse_args(argv)
    zoo.allow_foreign(args.allow_foreign)
    print(table(evaluate(args.run, args.device, args.step)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
