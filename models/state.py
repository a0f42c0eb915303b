"""Operations on a state: a pytree of tensors, batch first, and of host objects that know the same verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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


def _named_leaves(state: State) -> dict[str, Any]:
    leaves, _ = pytree.tree_flatten_with_path(state)
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def save(state: State, path: str | Path, **about: Any) -> None:
    """Write a state as safetensors; ``about`` (plain JSON) travels in the header.

    A host object gives its content as ``tensors() -> {name: tensor}``; one that cannot is refused, not left out.
    """
    tensors: dict[str, Tensor] = {}
    for key, leaf in _named_leaves(state).items():
        if isinstance(leaf, Tensor):
            tensors[key] = leaf
        elif hasattr(leaf, "tensors"):
            tensors |= {f"{key}/{name}": t for name, t in leaf.tensors().items()}
        elif leaf is not None:
            raise UserError(f"a state with a {type(leaf).__name__} cannot be saved")
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(plain, str(path), metadata={"about": json.dumps(about)})


def load(path: str | Path, like: State, device: torch.device | str = "cpu") -> State:
    """Read a state of the same structure as ``like`` (made by ``init_state``; its batch and length may differ).

    A host object in ``like`` takes its content by ``with_tensors({name: tensor})``, which returns a new object.
    Raises UserError when the file cannot be read or belongs to another model.
    """
    with _opened(path, device) as file:
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (a safetensors file is not a dict)
    _, spec = pytree.tree_flatten(like)
    values = []
    for key, leaf in _named_leaves(like).items():
        if isinstance(leaf, Tensor):
            found = stored.pop(key, None)
            if found is None or found.ndim != leaf.ndim:
                raise UserError(f"{path}: not a state of this model (entry {key} does not match)")
            values.append(found)
        elif hasattr(leaf, "with_tensors"):
            own = [name for name in stored if name.startswith(f"{key}/")]
            values.append(leaf.with_tensors({name.removeprefix(f"{key}/"): stored.pop(name) for name in own}))
        else:
            values.append(leaf)
    if stored:
        raise UserError(f"{path}: not a state of this model (entry {min(stored)} does not match)")
    return pytree.tree_unflatten(values, spec)


def about(path: str | Path) -> dict[str, Any]:
    """What was said about a saved state. Raises UserError when the file cannot be read."""
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def _opened(path: str | Path, device: torch.device | str = "cpu") -> Any:
    try:
        return safe_open(str(path), framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the state in '{path}': {error}") from error
