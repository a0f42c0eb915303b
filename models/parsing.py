"""Plain data (YAML, command line) <-> frozen dataclasses. Unknown keys and bad values are errors that name the nearest valid one."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from models.errors import UserError, nearest


def from_dict(cls: type, raw: Any, where: str = "") -> Any:
    """Build dataclass ``cls`` from a mapping; ``where`` is the dotted path used in error messages.

    A field with ``metadata={"slot": "mixer"}`` holds the config of a part (chosen by its ``kind``) or null; one with
    ``metadata={"kinds": f}`` a config of the class ``f(kind)``, or null.
    """
    if dataclasses.is_dataclass(raw) and isinstance(raw, cls):
        return raw
    if not isinstance(raw, dict):
        raise UserError(f"{where or cls.__name__}: expected a mapping, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise UserError(f"unknown key '{_join(where, key)}'{nearest(key, fields)}")
        path = _join(where, key)
        slot, kinds = (fields[key].metadata.get(name) for name in ("slot", "kinds"))
        if slot:
            values[key] = _part(slot, value, path)
        else:
            values[key] = _tagged(kinds, value, path) if kinds else _convert(hints[key], value, path)
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            raise UserError(f"missing key '{_join(where, name)}'")
    try:
        return cls(**values)
    except UserError as error:
        if where and not str(error).startswith(where):
            raise UserError(f"{where}: {error}") from None
        raise


def _part(slot: str, raw: Any, where: str) -> Any:
    from models import zoo  # parts import the types of this room; only here does parsing need the parts

    return None if raw is None else zoo.parse(slot, raw, where)


def _tagged(kinds: Callable[[str], type], raw: Any, where: str) -> Any:
    if isinstance(raw, dict) and "kind" not in raw:
        raise UserError(f"{where}: missing 'kind'")
    return from_dict(kinds(raw["kind"]), raw, where) if isinstance(raw, dict) else raw


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
        return _convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        inner = args[0] if args else Any
        return tuple(_convert(inner, v, f"{where}.{i}") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return {_convert(args[0], k, where): _convert(args[1], v, _join(where, k)) for k, v in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        try:  # 1e6, written for readability
            if float(value) == int(float(value)):
                return int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except (TypeError, ValueError):
            pass
    if hint is str and isinstance(value, str):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def to_dict(value: Any) -> Any:
    """The inverse: plain data that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def choice(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise UserError(f"unknown {name} '{value}'{nearest(value, valid)}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with each ``key.path=value`` set in it (the value is read as YAML).

    A part of a path that is a number is an index into a list, or an integer key (``model.at.1.memory=null``). Whether
    the keys exist is for `from_dict` to say. Raises UserError for an unreadable file or an override that cannot be set.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        if path.exists():
            raise UserError(f"cannot read '{path}': {error.strerror}") from error
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"no file '{path}'{nearest(path.name, siblings)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"'{path}': expected a mapping at the top, got {type(raw).__name__}")
    for override in overrides:
        set_key(raw, override)
    return raw


def set_key(raw: dict[str, Any], override: str) -> None:
    """One ``key.path=value`` of `load_yaml`, in place."""
    dotted, equals, text = override.partition("=")
    keys = [k.strip() for k in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"override '{override}': expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not YAML: {' '.join(str(error).split())}") from error
    at: Any = raw
    for i, key in enumerate(keys):
        where = ".".join(keys[:i])
        index: Any = int(key) if key.isdigit() and not (isinstance(at, dict) and key in at) else key
        if isinstance(at, list):
            if not isinstance(index, int) or index >= len(at):
                raise UserError(f"override '{override}': '{where}' is a list of {len(at)}; valid: 0 to {len(at) - 1}")
        elif not isinstance(at, dict):
            raise UserError(f"override '{override}': '{where}' is {at!r}, not a mapping")
        if i == len(keys) - 1:
            at[index] = value
        else:
            if isinstance(at, dict) and at.get(index) is None:
                at[index] = {}
            at = at[index]
