"""The decoder-only language model: embed, blocks, norm, head. One `forward` serves training, prefill, any split and decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import prefix_topm
from kernels.cross_entropy import linear_cross_entropy, token_nll
from models.block import Block
from models.config import ModelConfig
from models.errors import UserError
from models.state import nbytes
from models.types import (
    Aux,
    Batch,
    CommitInfo,
    Cost,
    Ctx,
    ParamMeta,
    Part,
    RowReset,
    Site,
    Stat,
    State,
    Write,
    build_norm,
    normal_,
    reset_norm,
    segment_ids,
)


class LMState(NamedTuple):
    """The memory of B sequences: how much each has seen, what every part remembers, and the lookback of the addressings."""

    seen: Tensor  # [B] int64
    layers: tuple[dict[str, State], ...]
    lookback: dict[str, State]


class Output(NamedTuple):
    losses: dict[str, Tensor]  # "lm" is pure cross-entropy per target token; others "<kind>.<loss>", mean over layers
    logits: Tensor | None
    state: LMState | None
    stats: dict[str, Stat]
    writes: dict[str, Write]


class LM(nn.Module):
    """Build on the meta device, `to_empty`, `reset_parameters` (or use `models.build`)."""

    progress: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size < 1:
            raise UserError("vocab_size is not known: give model.vocab_size or take it from the tokenizer")
        self.cfg = cfg
        self.recompute = False  # activation checkpointing, one segment per block
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.learned_positions else None
        self.layers = nn.ModuleList(Block(block, self._site(i)) for i, block in enumerate(cfg.layers()))
        self.norm = build_norm(cfg.norm, cfg.d_model, cfg.norm_eps, cfg.norm_bias)
        self.head = None if cfg.tied else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.register_buffer("progress", torch.zeros(()))
        self.addressing = nn.ModuleDict(self._addressing())
        self.loss_weights = self._loss_weights()
        self._shared = self._shared_functions()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy asks its own parts for what they share, not those of the original."""
        super().__setstate__(state)
        self._shared = self._shared_functions()

    def _site(self, layer: int) -> Site:
        c = self.cfg
        return Site(
            d_model=c.d_model,
            n_layers=c.n_layers,
            layer=layer,
            norm=c.norm,
            norm_eps=c.norm_eps,
            norm_bias=c.norm_bias,
            init_std=c.init_std,
            vocab_size=c.vocab_size,
            dropout=c.dropout,
            branches=c.branches,
        )

    def parts(self) -> list[tuple[int, str, Part]]:
        """(layer, slot, part) in the order in which they run."""
        return [(i, slot, part) for i, block in enumerate(self.layers) for slot, part in block.parts().items()]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def _addressing(self) -> dict[str, nn.Module]:
        by_class: dict[type[Part], list[Part]] = {}
        for _, _, part in self.parts():
            by_class.setdefault(type(part), []).append(part)
        made = {cls.__name__: cls.addressing(parts) for cls, parts in by_class.items()}
        return {name: module for name, module in made.items() if module is not None}

    def _shared_functions(self) -> dict[str, tuple[Callable[[Ctx, State | None], Any], int, str]]:
        """(function, layer, slot) by key, of the first part that asks for the key."""
        found = reversed(self.parts())
        return {key: (fn, i, slot) for i, slot, part in found for key, fn in part.shared().items()}

    def _loss_weights(self) -> dict[str, float]:
        weights = {"lm": 1.0}
        for layer, _, part in self.parts():
            for loss, weight in part.loss_weights().items():
                name = f"{part.cfg.kind}.{loss}"
                if weights.setdefault(name, weight) != weight:
                    raise UserError(
                        f"layer {layer}: weight of loss '{name}' is {weight}, but {weights[name]} in another layer"
                    )
        return weights

    # -- forward

    def forward(
        self,
        batch: Batch,
        state: LMState | None = None,
        *,
        donate: bool = False,
        denom: Tensor | float | None = None,
        logits: str = "auto",
    ) -> Output:
        """Losses if the batch has targets, else logits (``logits``: auto | none | last | all).

        ``denom`` divides the summed cross-entropy; the default is this batch's number of counted targets. The loop passes
        the step's global number divided by micro-batches and ranks, so that the mean over those is the exact global mean.
        """
        h, new_state, aux = self.features(batch, state, donate=donate)
        losses = self._mean_over_layers(aux.losses)
        if batch.targets is not None:
            mask = batch.loss_mask if batch.loss_mask is not None else batch.valid
            count: Any = denom
            if count is None:
                count = batch.targets.numel() if mask is None else mask.sum().clamp(min=1)
            keep = None if mask is None else mask.flatten()
            nll = linear_cross_entropy(h.flatten(0, -2), self.head_weight, batch.targets.flatten(), keep)
            losses = {"lm": nll / count, **losses}
        want = logits if logits != "auto" else ("none" if batch.targets is not None else "all")
        return Output(losses, self.logits(h, batch.valid, want), new_state, aux.stats, aux.writes)

    def features(
        self, batch: Batch, state: LMState | None = None, *, donate: bool = False
    ) -> tuple[Tensor, LMState | None, Aux]:
        """-> (final hidden states after the last norm [B, T, D], new state, what the parts said, by full name)."""
        ctx, seen, lookback = self.prepare(batch, state)
        x = self.embed(batch.tokens)
        if self.position is not None:
            x = x + self.position(ctx.positions.clamp(min=0))
        drop = self.cfg.dropout if self.cfg.embedding_dropout is None else self.cfg.embedding_dropout
        if self.training and drop:
            x = F.dropout(x, drop)
        if self.cfg.branches > 1:
            x = x.unsqueeze(-2).expand(*x.shape[:-1], self.cfg.branches, x.shape[-1])
        said, states = Aux({}, {}, {}), []
        for i, block in enumerate(self.layers):
            old = None if state is None else state.layers[i]
            if self.recompute and torch.is_grad_enabled() and state is None:
                x, new, aux = checkpoint(block, x, ctx, use_reentrant=False, context_fn=_keep_selections)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x, new, aux = block(x, ctx, old, donate)
            states.append(new)
            said = said.merged(aux.prefixed(f"layers.{i}"))
        if self.cfg.branches > 1:
            x = x.mean(dim=-2)
        new_state = None if state is None else LMState(seen, tuple(states), lookback)
        return self.norm(x), new_state, said

    def prepare(self, batch: Batch, state: LMState | None) -> tuple[Ctx, Tensor, dict[str, State]]:
        """-> (the context of this forward, tokens seen by each sequence after it, new lookbacks)."""
        tokens = batch.tokens
        B, T = tokens.shape
        if state is not None and batch.cu_seqlens is not None:
            raise ValueError("cu_seqlens and a state exclude each other")
        self._check_length(T)
        seen = tokens.new_zeros(B) if state is None else state.seen
        positions = batch.positions
        if positions is None or state is not None:
            positions = seen[:, None] + _positions(batch)
        free_to_look = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if state is not None and self.position is not None and free_to_look:
            self._check_length(int(positions.max()) + 1)
        new_seen = seen + (T if batch.valid is None else batch.valid.sum(dim=1))
        ctx = Ctx(tokens, positions, batch.cu_seqlens, batch.valid, self.progress, {}, {})
        shared: dict[str, Any] = {}
        if batch.cu_seqlens is not None:
            shared["segments"] = segment_ids(batch.cu_seqlens, B, T)
        ctx = ctx._replace(shared=shared)
        rows, lookback = {}, {}
        for name, module in self.addressing.items():
            found, lookback[name] = module(ctx, None if state is None else state.lookback[name])
            rows |= found
        ctx = ctx._replace(rows=rows)
        for key, (fn, layer, slot) in self._shared.items():
            shared[key] = fn(ctx, None if state is None else state.layers[layer][slot])
        return ctx, new_seen, lookback

    def _check_length(self, length: int) -> None:
        limit = self.cfg.max_seq_len
        if self.cfg.learned_positions and length > limit:
            raise UserError(f"context of {length} tokens is longer than the {limit} learned positions of this model")

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, h: Tensor, valid: Tensor | None = None, want: str = "all") -> Tensor | None:
        """h [B, T, D] -> logits [B, T, V] (all), [B, 1, V] of each row's last valid token (last), or None (none)."""
        if want == "none":
            return None
        if want == "last":
            index = torch.full_like(h[:, 0, 0], h.shape[1] - 1, dtype=torch.int64)
            if valid is not None:
                time = torch.arange(h.shape[1], device=h.device)
                index = torch.where(valid, time, 0).amax(dim=1)
            h = h.gather(1, index[:, None, None].expand(-1, 1, h.shape[-1]))
        return F.linear(h, self.head_weight)

    def token_nll(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, T, D], targets [B, T] -> (-log p(target) [B, T] in nats, target is the argmax [B, T]); no gradient."""
        nll, greedy = token_nll(h.flatten(0, -2), self.head_weight, targets.flatten())
        return nll.view_as(targets), greedy.view_as(targets)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The one place where loss weights are applied."""
        return torch.stack([value * self.loss_weights[name] for name, value in losses.items()]).sum()

    def _mean_over_layers(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for name, value in losses.items():
            _, layer, slot, loss = name.split(".", 3)
            part = getattr(self.layers[int(layer)], slot)
            found.setdefault(f"{part.cfg.kind}.{loss}", []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    # -- state and model memory

    def init_state(
        self,
        batch: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LMState:
        """Empty memory of ``batch`` sequences of at most ``max_len`` tokens, by default on the model's device in its dtype."""
        self._check_length(max_len)
        device = device or self.embed.weight.device
        dtype = dtype or self.embed.weight.dtype
        layers = tuple(
            {slot: part.init_state(batch, device, dtype, max_len) for slot, part in block.parts().items()}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            for block in self.layers
        )
        lookback = {name: module.init_state(batch, device) for name, module in self.addressing.items()}  # pyright: ignore[reportCallIssue]
        return LMState(torch.zeros(batch, dtype=torch.int64, device=device), layers, lookback)

    @torch.no_grad()
    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        """Hand each part its writes: the only place where model memory changes. -> rows whose moments must be zeroed."""
        by_part: dict[str, dict[str, Write]] = {}
        for name, write in writes.items():
            prefix, layer, slot, key = name.split(".", 3)
            by_part.setdefault(f"{prefix}.{layer}.{slot}", {})[key] = write
        resets = []
        for name, part_writes in by_part.items():
            for reset in self.get_submodule(name).commit(part_writes, info):  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
                resets.append(RowReset(f"{name}.{reset.name}", reset.rows))
        return resets

    def tables(self) -> dict[str, Any]:
        """Row stores by full name."""
        return {f"layers.{i}.{slot}.{name}": t for i, slot, part in self.parts() for name, t in part.tables().items()}

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Complete initialisation; the same seed gives the same weights on every device."""
        normal_(self.embed.weight, self.cfg.init_std, generator)
        for extra in (self.position, self.head):
            if extra is not None:
                normal_(extra.weight, self.cfg.init_std, generator)
        for block in self.layers:
            for slot, part in block.parts().items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                part.reset_parameters(generator, self.cfg.n_layers)
                branches = getattr(block, f"{slot}_branches", None)
                if branches is not None:
                    branches.reset_parameters(generator)
                for table in part.tables().values():
                    table.reset(generator)
        reset_norm(self.norm)
        for module in self.addressing.values():
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
        with torch.no_grad():
            self.progress.zero_()

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """Tell a new model what its ids spell, for memories that are addressed by text. Raises UserError where that cannot be."""
        for module in self.addressing.values():
            module.use_tokenizer(tokenizer_json)  # pyright: ignore[reportCallIssue]

    def meta(self) -> dict[str, ParamMeta]:
        """Of every parameter, by full name."""
        embedding = ParamMeta(role="embedding", decay=False, optimizer="adamw")
        found = {"embed.weight": embedding}
        if self.position is not None:
            found["position.weight"] = embedding
        if self.head is not None:
            found["head.weight"] = ParamMeta(role="embedding", optimizer="adamw")
        for name, _ in self.norm.named_parameters():
            found[f"norm.{name}"] = ParamMeta(role="vector", decay=False, optimizer="adamw")
        for i, block in enumerate(self.layers):
            for slot, part in block.parts().items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                found |= {f"layers.{i}.{slot}.{k}": m for k, m in part.meta().items()}
                branches = getattr(block, f"{slot}_branches", None)
                if branches is not None:
                    found |= {f"layers.{i}.{slot}_branches.{k}": m for k, m in branches.meta().items()}
        missing = {n for n, _ in self.named_parameters()} ^ set(found)
        if missing:
            raise ValueError(f"parameters and meta disagree: {sorted(missing)}")
        return found

    def costs(self, seq_len: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, Cost]]:
        """(place, kind, cost) of everything in the model at sequence length T; the embedding is counted, its lookup is free."""
        c = self.cfg
        embedding = self.embed.weight.numel() + (0 if self.position is None else self.position.weight.numel())
        rows = [("embed", "embedding", Cost(embedding, embedding))]
        for i, slot, part in self.parts():
            rows.append((f"layers.{i}.{slot}", part.cfg.kind, part.cost(seq_len, dtype)))
            branches = getattr(self.layers[i], f"{slot}_branches", None)
            if branches is not None:
                n = branches.params()
                rows.append((f"layers.{i}.{slot}_branches", "branches", Cost(n, n, branches.flops_per_token())))
        final = sum(p.numel() for p in self.norm.parameters())
        rows.append(("norm", c.norm, Cost(final, final)))
        head = 0 if self.head is None else self.head.weight.numel()
        rows.append(("head", "tied" if c.tied else "linear", Cost(head, head, 2 * c.d_model * c.vocab_size)))
        lookback = [module.init_state(1, "meta") for module in self.addressing.values()]  # pyright: ignore[reportCallIssue]
        rows.append(("state", "positions", Cost(state_bytes=torch.int64.itemsize + nbytes(lookback))))
        return rows

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        return sum((cost for _, _, cost in self.costs(seq_len, dtype)), Cost())


def build(
    cfg: ModelConfig, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LM:
    """A model with initialised weights; the same seed gives the same weights on every device."""
    model = meta_model(cfg).to(dtype).to_empty(device=device)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


def meta_model(cfg: ModelConfig) -> LM:
    """The model without memory for its weights: for counting, summaries and matching at any size."""
    with torch.device("meta"):
        return LM(cfg)


def _positions(batch: Batch) -> Tensor:
    """Positions from zero: [1 or B, T]; -1 for invalid tokens before the first valid one."""
    T = batch.tokens.shape[1]
    index = torch.arange(T, device=batch.tokens.device)
    if batch.valid is not None and batch.cu_seqlens is None:
        return batch.valid.long().cumsum(dim=1) - 1
    if batch.cu_seqlens is None:
        return index[None].expand_as(batch.tokens)
    flat = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    segment = torch.searchsorted(batch.cu_seqlens[1:].long(), flat, right=True)
    return (flat - batch.cu_seqlens.long()[segment]).view_as(batch.tokens)


_SELECTIONS = {
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.argmax.default,
    torch.ops.aten.argmin.default,
    torch.ops.aten.max.dim,
    torch.ops.aten.min.dim,
    torch.ops.aten.argsort.default,
    torch.ops.aten.argsort.stable,
    torch.ops.aten.multinomial.default,
    prefix_topm.OPERATOR,
}


def _keep_selections() -> Any:
    """Recompute everything in the backward except discrete selections: a tie or last bit must not choose anew."""

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _SELECTIONS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
