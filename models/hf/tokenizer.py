"""Tokenizer files from folder to folder, so that both sides give a text the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from models.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ENDS = ("bos_token", "eos_token", "pad_token")


def import_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Copy the files; what begins and ends a document is taken from the model's config.json where they do not say it.

    Raises UserError without a readable tokenizer.json, or when it has more ids than the model.
    """
    tokenizer, settings = _read(source)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > config["vocab_size"]:
        raise UserError(f"{source}: the tokenizer has {size} ids, but the model's vocab_size is {config['vocab_size']}")
    for name in ("bos_token", "eos_token"):
        token = config.get(f"{name}_id")
        token = token[0] if isinstance(token, list) and token else token
        text = tokenizer.id_to_token(token) if isinstance(token, int) else None
        if _text(settings.get(name)) is None and text is not None:
            settings[name] = text
    _write(source, target, settings)


def export_tokenizer(source: Path, target: Path, max_length: int) -> dict[str, int]:
    """Copy the files, made to load as exactly this tokenizer.json, with left padding. -> {"bos_token_id": ..., ...}."""
    tokenizer, settings = _read(source)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # any other class may rebuild the pre-tokenizer its own way
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    settings["padding_side"] = "left"
    if max_length:
        settings["model_max_length"] = max_length
    if _text(settings.get("pad_token")) is None and _text(settings.get("eos_token")) is not None:
        settings["pad_token"] = settings["eos_token"]
    _write(source, target, settings)
    ids = {
        f"{name}_id": tokenizer.token_to_id(text) for name in ENDS if (text := _text(settings.get(name))) is not None
    }
    return {name: token for name, token in ids.items() if token is not None}


def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """-> (the tokenizer, its tokenizer_config.json, completed with the ends that special_tokens_map.json names)."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"no tokenizer.json in {folder}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{file} is not a tokenizer.json: {error}") from error
    settings = _read_json(folder / "tokenizer_config.json")
    for name, value in _read_json(folder / "special_tokens_map.json").items():
        if name in ENDS and settings.get(name) is None:
            settings[name] = value
    return tokenizer, settings


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a JSON mapping: {error}") from error


def _write(source: Path, target: Path, settings: dict[str, Any]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _text(token: Any) -> str | None:
    """A special token is written as a string or as a mapping with its content."""
    return token.get("content") if isinstance(token, dict) else token
