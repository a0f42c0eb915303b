"""Text to ids and back: bytes, or any tokenizer.json (one trained here included), behind one small interface."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<BOS>", "[CLS]")
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<EOS>", "[SEP]")


class Tokenizer:
    """What the rest of the project knows of a tokenizer.

    `encode` never adds or recognises special tokens: a document's beginning and end are put there by the loader, and
    text that happens to spell one is text.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; a file tokenizer spreads the batch over the cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, as integer arrays, without a Python list per document."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; specials are left out, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        """int64 [V]: how many UTF-8 bytes of text each id stands for (0 for specials and unused ids)."""
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """One id for the eye: printable text, other bytes escaped."""
        raise NotImplementedError

    def json(self) -> str:
        """The content of a tokenizer.json that gives the same ids in the tokenizers and transformers libraries."""
        raise NotImplementedError

    @property
    def bos_token(self) -> str:
        """The name of the token that begins a document."""
        return END_OF_TEXT

    @property
    def eos_token(self) -> str:
        """The name of the token that ends a document."""
        return END_OF_TEXT

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides which ids a text gets."""
        identity = json.dumps([self.kind, self.bos_id, self.eos_id, self.json()])
        return hashlib.sha256(identity.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (readable by transformers) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json(), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "kind": self.kind,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """As `load_tokenizer`."""
        return load_tokenizer(folder)


class ByteTokenizer(Tokenizer):
    """id = byte; 256 begins and ends a document."""

    kind = "bytes"
    vocab_size = 257
    bos_id = 256
    eos_id = 256

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes 0-255, document end 256").hexdigest()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        counts = np.ones(self.vocab_size, dtype=np.int64)
        counts[self.eos_id] = 0
        return counts

    def token_text(self, token: int) -> str:
        return END_OF_TEXT if token == self.eos_id else _printable(bytes([token]))

    def json(self) -> str:
        letters = {byte: letter for letter, byte in _byte_of_letter().items()}
        model = tokenizers.models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[])
        tok = tokenizers.Tokenizer(model)
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        tok.add_special_tokens([END_OF_TEXT])
        return tok.to_str()


class FileTokenizer(Tokenizer):
    """A tokenizer.json with its beginning and end of document."""

    kind = "file"

    def __init__(self, content: str, bos: str, eos: str):
        self._json = content
        self._tok = tokenizers.Tokenizer.from_str(content)
        self._tok.no_truncation()
        self._tok.no_padding()
        self._tok.encode_special_tokens = True
        self._ends = (bos, eos)
        self.bos_id, self.eos_id = self._id(bos), self._id(eos)
        self.vocab_size = max(self._tok.get_vocab(with_added_tokens=True).values()) + 1
        parts = json.loads(content)
        self._specials = {t["id"] for t in parts["added_tokens"] if t["special"]} | {self.bos_id, self.eos_id}
        self._added = {t["id"]: t["content"] for t in parts["added_tokens"]}
        self._byte_level = "ByteLevel" in _kinds(parts.get("decoder")) | _kinds(parts.get("pre_tokenizer"))
        self._letters = _byte_of_letter()

    @property
    def bos_token(self) -> str:
        return self._ends[0]

    @property
    def eos_token(self) -> str:
        return self._ends[1]

    def _id(self, token: str) -> int:
        found = self._tok.token_to_id(token)
        if found is None:
            raise DataError(f"tokenizer: the token {token!r} that begins or ends a document is not in its vocabulary")
        return found

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = [t if t.isascii() else t.encode("utf-8", "replace").decode() for t in texts]
        return [np.array(e.ids, dtype=np.uint32) for e in self._tok.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tok.decode([int(i) for i in ids if int(i) not in self._specials], skip_special_tokens=True)

    def _raw(self, token: int) -> bytes:
        """The bytes that one id stands for."""
        name = self._tok.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if self._byte_level:
            return b"".join(bytes([self._letters[c]]) if c in self._letters else c.encode() for c in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.removeprefix("##").replace("▁", " ").encode()

    def token_bytes(self) -> np.ndarray:
        counts = np.array([len(self._raw(i)) for i in range(self.vocab_size)], dtype=np.int64)
        counts[sorted(self._specials)] = 0
        return counts

    def token_text(self, token: int) -> str:
        return _printable(self._raw(token))

    def json(self) -> str:
        return self._json


def train_bpe(texts, vocab_size: int, progress: bool = True) -> FileTokenizer:
    """A byte-level BPE with `vocab_size` ids (fewer if the text has too few pairs), trained on an iterator of texts.

    Deterministic in the sequence of texts. `<|endoftext|>` is id 0 and both begins and ends a document.
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=progress,
    )
    tok.train_from_iterator(texts, trainer)
    return FileTokenizer(tok.to_str(), END_OF_TEXT, END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder or a tokenizer.json; its document ends come from its configuration or added tokens.

    Raises DataError if the file is missing or unreadable, or if no beginning and end of document can be found.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such tokenizer file")
    config = _read_json(file.with_name("tokenizer_config.json"))
    if config.get("kind") == "bytes":
        return ByteTokenizer()
    try:
        content = file.read_text(encoding="utf-8")
        added = [t["content"] for t in json.loads(content).get("added_tokens", [])]
        tokenizers.Tokenizer.from_str(content)
    except Exception as err:  # the tokenizers library raises bare Exception for a malformed file
        raise DataError(f"{file}: not a tokenizer.json ({_first_line(err)})") from err
    named = _read_json(file.with_name("special_tokens_map.json")) | config
    eos = _named(named, "eos_token") or next((n for n in EOS_NAMES if n in added), None)
    bos = _named(named, "bos_token") or (next((n for n in BOS_NAMES if n in added), None) if not named else None) or eos
    if eos is None or bos is None:
        shown = ", ".join(added[:6]) or "none"
        raise DataError(
            f"{file}: nothing says which token ends a document (added tokens: {shown}); "
            'put a tokenizer_config.json with "eos_token" beside it'
        )
    return FileTokenizer(content, bos, eos)


def _named(config: dict, key: str) -> str | None:
    value = config.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise DataError(f"{file}: not valid JSON ({_first_line(err)})") from err
    return value if isinstance(value, dict) else {}


def _kinds(part: dict | None) -> set[str]:
    """Types of a pre-tokenizer or decoder, sequences opened."""
    if not part:
        return set()
    inner = part.get("decoders") or part.get("pretokenizers") or []
    return {part["type"]}.union(*map(_kinds, inner)) if inner else {part["type"]}


def _byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in set(plain)]
    return letters | {chr(256 + i): b for i, b in enumerate(others)}


def _printable(raw: bytes) -> str:
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
