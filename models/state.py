"""Operations on a state: a pytree of tensors, batch first, and of host objects that know the same verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from models.errors import UserError
from models.types import State


def _map(state: State, on_tensor: Any, verb: str, *args: Any) -> State:
    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return on_tensor(x)
        return getattr(x, verb)(*args) if hasattr(x, verb) else x

    return pytree.tree_map(leaf, state)


def clone(state: State) -> State:
    """A state of its own: writing one never shows in the other."""
    return _map(state, torch.clone, "clone")


def detach(state: State) -> State:
    """The same values without the graph behind them (between training segments)."""
    return _map(state, torch.detach, "detach")


def select_rows(state: State, index: Tensor) -> State:
    """Branch, reorder or drop sequences: row i of the result is row ``index[i]`` (int64 [B']), in memory of its own."""
    return _map(state, lambda t: t.index_select(0, index.to(t.device)), "select_rows", index)


def nbytes(state: State) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(state) if isinstance(t, Tensor))


def _named_tensors(state: State) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(state)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def save(state: State, path: str | Path, **about: Any) -> None:
    """Write the tensors as safetensors; ``about`` (plain JSON) travels in the header."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in _named_tensors(state).items()}
    save_file(tensors, str(path), metadata={"about": json.dumps(about)})


def load(path: str | Path, like: State, device: torch.device | str = "cpu") -> State:
    """Read a state of the same structure as ``like`` (made by ``init_state``; its batch and length may differ).

    Raises UserError when the file belongs to another model.
    """
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (a safetensors file is not a dict)
    names = _named_tensors(like)
    if set(stored) != set(names):
        odd = sorted(set(stored) ^ set(names))[0]
        raise UserError(f"{path}: not a state of this model (entry {odd} does not match)")
    values = iter([stored[name] for name in names])
    leaves, spec = pytree.tree_flatten(like)
    return pytree.tree_unflatten([next(values) if isinstance(x, Tensor) else x for x in leaves], spec)


def about(path: str | Path) -> dict[str, Any]:
    """What was said about a saved state."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))
