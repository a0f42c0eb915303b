"""One composite optimizer for everything that learns: AdamW groups, Muon for matrices, row stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError, nearest
from models.lm import LM
from models.parsing import choice
from models.rows import RowStore
from models.types import ParamMeta, RowReset
from training import schedule
from training.muon import Muon

VALUE = "value"  # in the state of a guest: the parameter itself


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    muon: bool = False  # for matrices (arXiv:2502.16982); the same rate serves both
    muon_momentum: float = 0.95
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup: float = 0.02  # steps, or a share of the run when below 1
    decay: float = 0.2  # share of the run in which wsd falls
    floor: float = 0.1  # last rate as a share of the first

    def __post_init__(self) -> None:
        choice("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas: expected two numbers in [0, 1), got {list(self.betas)}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "warmup"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        for name in ("muon_momentum", "decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} must lie in [0, 1], got {getattr(self, name)}")

    def rate(self, step: int, total: int) -> float:
        """The base learning rate of a step."""
        warmup = round(self.warmup * total) if self.warmup < 1 else round(self.warmup)
        return self.lr * schedule.factor(step, total, self.schedule, warmup, self.decay, self.floor)


class Optimizer:
    """Built from the model's `meta`. State is kept by parameter name, so that it survives a model that gains parts."""

    def __init__(self, model: LM, cfg: OptimConfig) -> None:
        self.cfg = cfg
        self.tables = model.tables()
        self.frozen: set[str] = set()  # tables that do not learn, as parameters without requires_grad do not
        self.guests: set[str] = set()  # names of parameters that learn here without being part of the model
        self.absent: dict[str, Tensor] = {}  # what a checkpoint holds of guests that have not joined yet
        self.muon = Muon(cfg.muon_momentum)
        self.base_lr = cfg.lr
        self._place(dict(model.named_parameters()), model.meta())

    def _place(self, params: dict[str, nn.Parameter], meta: dict[str, ParamMeta]) -> None:
        """Give every parameter its place in Muon or in a group of AdamW, without moments."""
        cfg = self.cfg
        self.params, self.meta = params, meta
        self.muon_names = [n for n in params if cfg.muon and _takes_muon(meta[n], params[n])]
        groups: dict[tuple[float, bool], list[str]] = {}
        for name in params.keys() - set(self.muon_names):
            groups.setdefault((meta[name].lr_mult, meta[name].decay), []).append(name)
        self.groups = {key: sorted(names) for key, names in sorted(groups.items())}
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": [params[n] for n in names],
                    "lr_mult": lr_mult,
                    "weight_decay": cfg.weight_decay * decay,
                }
                for (lr_mult, decay), names in self.groups.items()
            ],
            lr=cfg.lr,
            betas=(cfg.betas[0], cfg.betas[1]),
            eps=cfg.eps,
            fused=all(p.dtype.is_floating_point and p.device.type in ("cpu", "cuda") for p in params.values()),
        )

    def join(self, params: Mapping[str, nn.Parameter], meta: Mapping[str, ParamMeta]) -> None:
        """Let parameters that are no part of the model learn with it, until they `leave`.

        Their values are saved with the moments. After a resume they take both from the checkpoint when they join.
        """
        kept = {**self.state_dict(), **self.absent}
        self.guests |= params.keys()
        self._replace({**self.params, **params}, {**self.meta, **meta}, kept)

    def leave(self, names: Iterable[str]) -> None:
        """Forget guests, their moments, and what a checkpoint held of them; everything else keeps its state."""
        gone = set(names) & (self.guests | {_owner(key) for key in self.absent})
        if not gone:
            return
        kept = {key: t for key, t in {**self.state_dict(), **self.absent}.items() if _owner(key) not in gone}
        self.guests -= gone
        params, meta = ({n: x for n, x in held.items() if n not in gone} for held in (self.params, self.meta))
        self._replace(params, meta, kept)

    def _replace(self, params: Any, meta: Any, state: Mapping[str, Tensor]) -> None:
        """Take other parameters, with the state of those that stay."""
        self._place(params, meta)
        self.load_state_dict(state)
        self.set_lr(self.base_lr)

    def set_lr(self, lr: float) -> None:
        """The base rate of the next step; every group applies its own multiple."""
        self.base_lr = lr
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_mult"]

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None
        for table in self.tables.values():
            table.clear_grad()

    def learning_tables(self) -> dict[str, RowStore]:
        return {name: table for name, table in self.tables.items() if name not in self.frozen}

    def grads(self) -> list[Tensor]:
        """Every gradient there is, row gradients of tables included (summed over repeated rows)."""
        taken = [table.take_grad() for table in self.learning_tables().values()]
        return self._param_grads() + [t[1] for t in taken if t is not None]

    def _param_grads(self) -> list[Tensor]:
        return [p.grad for p in self.params.values() if p.grad is not None]

    def grad_norm(self) -> Tensor:
        """The global L2 norm over everything that learns, each row once whoever owns it: a 0-d tensor, not synchronised with the
        host. With tables that are split over ranks, all ranks call it."""
        rows = [table.grad_to_measure() for table in self.learning_tables().values()]
        return torch.nn.utils.get_total_norm(self._param_grads() + [g for g in rows if g is not None])

    def clip(self, norm: Tensor) -> None:
        """Scale all gradients so that their norm is at most ``cfg.clip``."""
        if self.cfg.clip:
            scale = (self.cfg.clip / (norm + 1e-6)).clamp(max=1.0)
            grads = self.grads()
            for device in {g.device for g in grads}:  # tables may live on the host
                torch._foreach_mul_([g for g in grads if g.device == device], scale.to(device))

    def step(self) -> None:
        self.adamw.step()
        # Fused kernels do not count what they write, and what is cached by a tensor's version (inference tables) would not notice.
        torch.autograd.graph.increment_version([p for p in self.params.values() if p.grad is not None])
        if self.muon_names:
            names = self.muon_names
            self.muon.step(
                {n: self.params[n] for n in names},
                {n: self.meta[n].splits for n in names},
                {n: self.base_lr * self.meta[n].lr_mult for n in names},
                {n: self.cfg.weight_decay * self.meta[n].decay for n in names},
            )
        for table in self.learning_tables().values():
            grad = table.take_grad()
            if grad is not None:
                lr = self.base_lr * table.meta.lr_mult
                table.step(*grad, lr, self.cfg.betas[0], self.cfg.betas[1], self.cfg.eps)

    def zero_rows(self, resets: Iterable[RowReset]) -> None:
        """Forget the moments of rows that were replaced, so that old gradients do not pull on new values."""
        for name, rows in resets:
            if name in self.tables:
                self.tables[name].zero_moments(rows)
                continue
            if name not in self.params:
                raise ValueError(f"reset of unknown parameter '{name}'{nearest(name, self.params)}")
            for moment in self._moments(name).values():
                if moment.ndim:
                    moment[rows.to(moment.device)] = 0

    def forget(self, name: str) -> None:
        """Drop the moments and the step count of a parameter that was replaced: its next step is its first."""
        self.muon.state.pop(name, None)
        self.adamw.state.pop(self.params[name], None)

    def _moments(self, name: str) -> dict[str, Tensor]:
        if name in self.muon_names:
            return {"momentum": self.muon.state[name]} if name in self.muon.state else {}
        return self.adamw.state.get(self.params[name], {})

    # -- checkpoint: tensors by name; those of tables are saved with their rows

    def state_dict(self) -> dict[str, Tensor]:
        moments = {f"{name}/{key}": t for name in self.params for key, t in self._moments(name).items()}
        return moments | {f"{name}/{VALUE}": self.params[name].detach() for name in sorted(self.guests)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Replace all state. ``strict=False`` passes over moments of parameters that are gone or changed optimizer.

        Parameters without stored moments start without; guests that have not joined yet are waited for. Raises UserError
        for state that has no place.
        """
        self.adamw.state.clear()
        self.muon.state.clear()
        waiting = {_owner(key) for key in tensors if key.endswith(f"/{VALUE}")} - self.guests
        self.absent = {key: t for key, t in tensors.items() if _owner(key) in waiting}
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key not in self.absent:
                by_name.setdefault(_owner(key), {})[key.rpartition("/")[2]] = tensor
        unknown = sorted(by_name.keys() - self.params.keys())
        if strict and unknown:
            raise UserError(
                f"optimizer state of '{unknown[0]}' belongs to no parameter{nearest(unknown[0], self.params)}"
            )
        for name in sorted(by_name.keys() - set(unknown)):
            p, moments = self.params[name], by_name[name]
            value = moments.pop(VALUE, None)
            if value is not None:
                p.data.copy_(value)
            if not moments:
                continue
            takes_muon = name in self.muon_names
            if takes_muon != ("momentum" in moments):
                if strict:
                    raise UserError(f"optimizer state of '{name}' was made by the other of AdamW and Muon (optim.muon)")
            elif takes_muon:
                self.muon.state[name] = moments["momentum"].to(p.device)
            else:  # the step count is a 0-d tensor that only the fused form keeps on the device
                fused = self.adamw.defaults["fused"]
                self.adamw.state[p] = {k: t.to(p.device) if t.ndim or fused else t for k, t in moments.items()}


def _owner(key: str) -> str:
    """The parameter that an entry of the state dict belongs to."""
    return key.rpartition("/")[0]


def _takes_muon(meta: ParamMeta, p: Tensor) -> bool:
    return meta.optimizer == "auto" and meta.role == "matrix" and p.ndim >= 2
