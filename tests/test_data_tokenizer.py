"""Tokenizers: exact round trips, byte counts, document ends of foreign files, and what is refused."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data import ByteTokenizer, DataError, FileTokenizer, Tokenizer, load_tokenizer
from data.tokenizer import END_OF_TEXT, train_bpe

PROSE = ["the cat sat on the mat", "def f(x):\n    return x + 1\n", "ünïcödé 漢字 🙂", "a\tb\r\n\n  c"] * 20


def random_texts(n=60):
    rng = random.Random(7)

    def letter():
        kind = rng.random()
        if kind < 0.4:
            return chr(rng.randrange(0, 128))
        code = rng.randrange(0x80, 0x110000) if kind < 0.8 else rng.choice([0x20, 0x0A, 0xA0, 0x2028, 0x1F600, 0xFEFF])
        return "x" if 0xD800 <= code < 0xE000 else chr(code)

    texts = ["".join(letter() for _ in range(rng.randrange(0, 80))) for _ in range(n)]
    return [*texts, "", END_OF_TEXT, f"a{END_OF_TEXT}b{END_OF_TEXT}", "<s> </s> [CLS]"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PROSE, 300, progress=False)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_round_trip_of_any_text(tokenizer):
    texts = random_texts()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


def test_token_bytes_sum_to_the_text(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts.dtype == np.int64
    assert counts[tokenizer.eos_id] == 0
    for text in random_texts():
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for again in (Tokenizer.load(tmp_path / "t"), load_tokenizer(tmp_path / "t" / "tokenizer.json")):
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.bos_id, again.eos_id) == (
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        assert again.encode_batch(random_texts()) == tokenizer.encode_batch(random_texts())


def test_saved_file_gives_the_same_ids_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn 'ü漢🙂'  # ok"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_decode_of_broken_bytes_and_specials(tokenizer):
    word = tokenizer.encode("é")
    assert tokenizer.decode([tokenizer.bos_id, *word, tokenizer.eos_id]) == "é"
    first_byte = ByteTokenizer().encode("é")[:1]
    assert ByteTokenizer().decode(first_byte) == "\ufffd"


def test_display_of_tokens(tokenizer):
    shown = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
    assert all(text and text.isprintable() for text in shown)
    assert shown[tokenizer.eos_id] == END_OF_TEXT
    assert shown[tokenizer.encode("\n")[0]] == "\\n"
    assert "".join(tokenizer.token_text(i) for i in tokenizer.encode("the cat")) == "the cat"


def test_lone_surrogate_does_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_bpe_training_is_deterministic_and_bounded(bpe):
    assert train_bpe(iter(PROSE), 300, progress=False).fingerprint == bpe.fingerprint
    assert train_bpe(PROSE[:-1] + ["other other other"] * 9, 300, progress=False).fingerprint != bpe.fingerprint
    assert bpe.vocab_size == 300
    assert train_bpe(["ab"], 400, progress=False).vocab_size < 400
    assert len(bpe.encode("the cat sat on the mat")) < 12


def foreign(path, added=("<s>", "</s>"), config=None, byte_fallback=False):
    """A SentencePiece-like or plain word-level tokenizer.json as other projects ship them."""
    if byte_fallback:
        vocab = {t: i for i, t in enumerate([f"<0x{b:02X}>" for b in range(256)] + ["▁", "a", "▁a"])}
        tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tok.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # as Llama 2 has it
        )
    else:
        tok = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(list(added))
    tok.enable_truncation(3)
    tok.enable_padding()
    path.mkdir(exist_ok=True)
    tok.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "tokenizer.json"


def test_document_ends_of_foreign_files(tmp_path):
    def ends(name, **kwargs):
        tok = load_tokenizer(foreign(tmp_path / name, **kwargs))
        return tok.bos_token, tok.eos_token

    assert ends("plain") == ("<s>", "</s>")
    assert ends("gpt2", added=["<|endoftext|>"]) == ("<|endoftext|>", "<|endoftext|>")
    assert ends("bert", added=["[CLS]", "[SEP]"]) == ("[CLS]", "[SEP]")
    config = {"bos_token": {"content": "<b>"}, "eos_token": "<e>"}
    assert ends("named", added=["<b>", "<e>", "<s>"], config=config) == ("<b>", "<e>")
    qwen = {"bos_token": None, "eos_token": "<|endoftext|>"}
    assert ends("qwen", added=["<s>", "<|endoftext|>"], config=qwen) == ("<|endoftext|>", "<|endoftext|>")


def test_no_document_end_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"added tokens: <x>, <y>.*tokenizer_config.json") as caught:
        load_tokenizer(foreign(tmp_path, added=["<x>", "<y>"]))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="'<gone>'"):
        load_tokenizer(foreign(tmp_path, config={"eos_token": "<gone>"}))


def test_byte_fallback_tokenizer(tmp_path):
    tok = load_tokenizer(foreign(tmp_path, byte_fallback=True))
    text = "a a漢 a a a a a"  # longer than the file's own truncation
    ids, short = tok.encode_batch([text, "a"])
    assert tok.decode(ids) == text
    assert tok.decode(short) == "a"
    assert len(short) == 1
    assert tok.token_bytes()[ids].sum() == len(text.encode())
    assert tok.vocab_size == 261
    assert tok.encode("<s>") and tok.bos_id not in tok.encode("<s>")  # noqa: PT018


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(DataError, match=r"not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_are_left_out_of_the_text(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, 10**6]) == "ab"


def test_file_tokenizer_names_its_ends(bpe):
    with pytest.raises(DataError, match="nope"):
        FileTokenizer(bpe.json(), "nope", END_OF_TEXT)
