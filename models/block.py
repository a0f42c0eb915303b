"""One block: memory -> mixer -> channel, each added to the residual stream; any slot may be empty."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models import zoo
from models.config import BlockConfig
from models.residual import Branches
from models.types import SLOTS, Aux, Ctx, Part, Site, State


class Block(nn.Module):
    def __init__(self, cfg: BlockConfig, site: Site) -> None:
        super().__init__()
        self.dropout = site.dropout
        self.slots: list[str] = []
        for slot in SLOTS:
            part_cfg = getattr(cfg, slot)
            if part_cfg is None:
                continue
            here = Site(**{**vars(site), "slot": slot})
            part = zoo.build(slot, part_cfg, here)
            self.add_module(slot, part)
            self.slots.append(slot)
            if site.branches > 1 and not part.sees_branches:
                self.add_module(f"{slot}_branches", Branches(site.branches, site.d_model, site.norm_eps, site.init_std))

    def parts(self) -> dict[str, Part]:
        return {slot: getattr(self, slot) for slot in self.slots}

    def forward(
        self, x: Tensor, ctx: Ctx, state: dict[str, State] | None = None, donate: bool = False
    ) -> tuple[Tensor, dict[str, State] | None, Aux]:
        """x [B, T, D], or [B, T, M, D] with residual branches."""
        said, states = Aux({}, {}, {}), {}
        for slot, part in self.parts().items():
            branches: Any = getattr(self, f"{slot}_branches", None)
            old = None if state is None else state[slot]
            if branches is None:
                y, states[slot], aux = part(x, ctx, old, donate)
                x = x + self._drop(y)
            else:
                read, post, mix = branches(x)
                y, states[slot], aux = part(read, ctx, old, donate)
                x = branches.write(x, self._drop(y), post, mix)
            said = said.merged(aux.prefixed(slot))
        return x, None if state is None else states, said

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.training and self.dropout else y
