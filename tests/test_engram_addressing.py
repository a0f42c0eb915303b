"""Engram's integers against published and golden values; what a lookback may reach; what a saved model refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

from models.errors import UserError
from models.memories.engram_addressing import DEAD, EngramAddressing, draw_multipliers, table_primes
from models.memories.engram_compression import Compression, compress, identity
from models.types import Ctx, segment_ids

TOKENS = torch.tensor([[5, 17, 17, 999, 0, 3]])
GOLDEN = [
    [258, 1994, 2334, 3061],
    [977, 1270, 2845, 3647],
    [165, 1878, 2194, 3582],
    [404, 1152, 2029, 3758],
    [315, 1929, 2739, 3781],
    [918, 1118, 2250, 3472],
]
AFTER_A_CUT = {3: [507, 1036, 2297, 3813], 4: [315, 1929, 2386, 3741]}  # rows 3 and 4 when nothing before 3 is in reach


def small(tokens: Compression | None = None, **other: Any) -> EngramAddressing:
    """``tokens``: the map of the tokenizer that it is told to use."""
    options = {"vocab_size": 1000, "keys": (1, 6), "bases": (1000, 1000), "heads": 2, "pad": 2, **other}
    module = EngramAddressing(**options)
    module.reset_parameters()
    if tokens is not None:
        module.use_map(tokens)
    return module


def swapped() -> Compression:
    """The identity but for two ids that change places."""
    canonical = identity(1000).canonical.copy()
    canonical[[998, 999]] = canonical[[999, 998]]
    return Compression(canonical, 1000)


def context(tokens: Tensor, valid: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Ctx:
    shared = {} if cu_seqlens is None else {"segments": segment_ids(cu_seqlens, *tokens.shape)}
    return Ctx(tokens, torch.zeros_like(tokens), cu_seqlens, valid, torch.zeros(()), {}, shared)


def rows(module: EngramAddressing, *given: Any, key: str = "1") -> Tensor:
    return module(context(*given), None)[0][key]


# -- numbers


@pytest.mark.parametrize(
    ("layers", "bases", "heads", "totals"),
    [
        (2, [16_000_000] * 3, 8, [384_006_168, 384_016_682]),
        (2, [2_262_400] * 2, 8, [36_199_972, 36_204_260]),
        (2, [7_239_680] * 2, 8, [115_837_464, 115_841_428]),
        (2, [646_400] * 2, 8, [10_344_164, 10_348_242]),
    ],
)
def test_table_sizes_of_the_published_models(layers: int, bases: list[int], heads: int, totals: list[int]):
    found = table_primes(layers, bases, heads)
    flat = [p for layer in found for order in layer for p in order]
    assert [sum(map(sum, layer)) for layer in found] == totals
    assert len(set(flat)) == len(flat)
    if bases[0] == 16_000_000:
        assert (flat[:2], flat[-1]) == ([16000057, 16000079], 16000889)


@pytest.mark.parametrize(
    ("classes", "key", "expected"),
    [
        (99092, 1, [76632096046245, 4839876093313, 35959672319349, 73987337458391]),
        (99092, 14, [67716810739261, 51510806800915, 30921347202721, 82619226485591]),
        (32962, 1, [230375209678255, 14549875670123, 108103751273253]),
        (32962, 6, [119519950771869, 271430741284107, 32438928893859]),
        (1000, 1, [7593627661414631, 479593001838623, 3563315849468963]),
    ],
)
def test_multipliers(classes: int, key: int, expected: list[int]):
    assert draw_multipliers(classes, len(expected), key) == expected


def test_golden_rows():
    module = small()
    assert module.primes.flatten(1).tolist() == [[1009, 1013, 1019, 1021], [1031, 1033, 1039, 1049]]
    assert rows(module, TOKENS)[0].tolist() == GOLDEN
    assert rows(module, TOKENS, key="6")[0, :2].tolist() == [[445, 1370, 2585, 4039], [239, 1070, 2227, 3113]]


def test_pad_is_the_canonical_id_of_the_pad_token():
    folded = identity(1000).canonical.copy()
    folded[7] = 2
    module = small(Compression(folded, 1000), compression="compat", pad=7)
    assert rows(module, TOKENS)[0].tolist() == GOLDEN


def test_golden_rows_behind_a_document_boundary():
    expected = [AFTER_A_CUT.get(t, row) for t, row in enumerate(GOLDEN)]
    cut = torch.tensor([0, 3, 3, 6], dtype=torch.int32)  # with an empty segment
    assert rows(small(), TOKENS, None, cut)[0].tolist() == expected


def test_golden_rows_behind_a_token_that_is_none():
    """As a device sees an id outside the vocabulary: compiled code does not raise."""
    module, tokens = small(), TOKENS.clone()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    expected = [AFTER_A_CUT.get(t, row) for t, row in enumerate(GOLDEN)]
    expected[2] = [727, 1631, 2724, 4004]
    for wrong in (-100, 1000, 2**40):
        tokens[0, 2] = wrong
        with pytest.raises(UserError, match=rf"token {wrong} is outside the vocabulary of 1000"):
            rows(module, tokens)
        assert compiled(context(tokens), None)[0]["1"][0].tolist() == expected


@pytest.mark.parametrize("max_order", [2, 3, 4, 5])
def test_every_head_has_an_interval_of_its_own(max_order: int):
    module = small(bases=(50,) * (max_order - 1), heads=3)
    found = rows(module, torch.randint(0, 1000, (4, 500), generator=torch.Generator().manual_seed(0)), key="6")
    low, size = module.offsets[1].flatten(), module.primes[1].flatten()
    assert ((found >= low) & (found < low + size)).all()
    assert torch.equal(low[1:], (low + size)[:-1])
    assert len(found.unique()) > 0.9 * size.sum()


def test_a_layer_hashes_by_its_key():
    """Another key gives another hash of the same sizes; the order of the layers gives the sizes."""
    one, two = small(keys=(1, 6)), small(keys=(1, 7))
    assert torch.equal(rows(one, TOKENS), rows(two, TOKENS))
    assert torch.equal(one.primes, two.primes)
    assert not torch.equal(rows(one, TOKENS, key="6"), rows(two, TOKENS, key="7"))


# -- reach


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4], [1, 8], []])
def test_any_split_gives_the_same_rows(cuts: list[int]):
    """Invalid tokens among the others too; the lookback at the end is that of the whole."""
    module, generator = small(bases=(300, 300, 300)), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (5, 10), generator=generator)
    valid = torch.rand(5, 10, generator=generator) < 0.7
    start = module.init_state(5, "cpu")
    whole, last = module(context(tokens, valid), start)
    state, found = start, []
    for a, b in zip([0, *cuts], [*cuts, 10], strict=True):
        piece, state = module(context(tokens[:, a:b], valid[:, a:b]), state)
        found.append(piece["1"])
    assert torch.equal(torch.cat(found, dim=1), whole["1"])
    assert torch.equal(state, last)
    assert (start == DEAD).all()


def test_padding_is_passed_over():
    """Padded anywhere, with any id: the rows of the valid tokens are those without padding."""
    module, valid = small(), torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 1, 0]]).bool()
    padded = torch.full((1, 10), -100)
    padded[valid] = TOKENS[0]
    found = rows(module, padded, valid)
    assert found[valid].tolist() == GOLDEN
    assert found[~valid].unique(dim=0).tolist() == [[727, 1631, 2724, 4004]]


def test_rows_depend_on_the_last_tokens_only():
    module, other = small(), TOKENS.clone()
    other[0, 2] = 18
    same = (rows(module, TOKENS) == rows(module, other)).all(dim=-1)[0]
    assert same.tolist() == [True, True, False, False, False, True]


# -- saved models


def test_a_saved_model_brings_its_multipliers():
    module, saved = small(), small().state_dict()
    saved["multipliers"] = saved["multipliers"] + 2
    module.load_state_dict(saved)
    assert torch.equal(module.multipliers, saved["multipliers"])


@pytest.mark.parametrize(
    "other",
    [
        {"pad": 3},
        {"seed": 1},
        {"keys": (1, 7)},
        {"keys": (6, 1)},
        {"bases": (1000, 1001)},
        {"compression": "tagged"},
        {"tokens": swapped()},
    ],
    ids=str,
)
def test_other_addresses_are_refused(other: dict[str, Any]):
    module = small(**{"compression": "compat", "tokens": identity(1000), **other})
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(UserError, match="belong to another") as said:
        module.load_state_dict(small(identity(1000), compression="compat").state_dict())
    assert ("token map" in str(said.value)) == ("tokens" in other)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_saved_model_brings_its_map():
    """Into a model that knows no tokenizer; from then on it has one."""
    saved, module = small(swapped(), compression="compat"), small(compression="compat")
    assert torch.equal(rows(module, TOKENS), rows(small(), TOKENS)), "without a tokenizer every token is itself"
    module.load_state_dict(saved.state_dict())
    assert torch.equal(rows(module, TOKENS), rows(saved, TOKENS))
    assert not torch.equal(rows(module, TOKENS), rows(small(), TOKENS))
    module.use_map(swapped())
    with pytest.raises(UserError, match="another token map than this tokenizer's"):
        module.use_map(identity(1000))


def test_fewer_classes_take_other_multipliers():
    canonical = np.arange(1000, dtype=np.int32) // 2
    module = small(Compression(canonical, 500), compression="tagged")
    assert module.multipliers[0].tolist() == draw_multipliers(500, 3, 1)
    pairs = torch.stack([rows(module, TOKENS), rows(module, TOKENS ^ 1)])
    assert torch.equal(pairs[0], pairs[1])
    again = small(compression="tagged")
    again.load_state_dict(module.state_dict())
    assert (again.classes, again.pad) == (500, 1)


def test_ids_without_a_token_are_dead():
    """A vocabulary padded beyond its tokenizer: they cannot be told from a token that is none, and stop lookbacks."""
    module = small(Compression(np.arange(999, dtype=np.int32), 999), compression="compat")
    assert module.canonical[999] == DEAD
    found, cut = rows(module, TOKENS), torch.tensor([0, 4, 6], dtype=torch.int32)
    assert torch.equal(found[:, 4:], rows(module, TOKENS, None, cut)[:, 4:])
    with pytest.raises(UserError, match="the tokenizer has 1001 ids, the model 1000"):
        small(identity(1001), compression="compat")
    with pytest.raises(UserError, match="pad token 2 is none of the tokenizer's 2"):
        small(identity(2), compression="compat")


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="pad token 1000"):
        small(pad=1000)
    with pytest.raises(UserError, match="not distinct"):
        small(keys=(1, 1))


# -- compression


def vocabulary() -> str:
    """Byte-level tokens, one special that spells a word of the vocabulary once lowered, and two unused ids."""
    words = ["the", "The", "Ġthe", "ĠTHE", "é", "Ã©", "e", "Ġ", "ĠĠ", "Ċ", "Ã", "ã", "cat", "ï¬ģ", "fi"]
    words += [
        "ł",
        "ÅĤ",
        "ÌĢ",
        "Ìģ",
    ]  # byte A0 and the letter of its name; two accents alone, which normalise to nothing
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tok = tokenizers.Tokenizer(models.WordLevel({**vocab, "last": len(vocab) + 3}, unk_token="the"))
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["Cat"])
    return tok.to_str()


def groups(compat: bool) -> list[list[str]]:
    tok, found = tokenizers.Tokenizer.from_str(vocabulary()), compress(vocabulary(), compat)
    assert found.canonical.max() + 1 == found.classes == len(set(found.canonical.tolist()))
    by_class: dict[int, list[str]] = {}
    for i, c in enumerate(found.canonical.tolist()):
        by_class.setdefault(c, []).append(tok.id_to_token(i) or "unused")
    assert list(by_class) == list(range(found.classes))  # numbered by first appearance
    return [names for names in by_class.values() if len(names) > 1]


def test_tokens_of_the_same_text_share_an_id():
    words, spaces, e, fi = ["the", "The", "Ġthe", "ĠTHE"], ["Ġ", "ĠĠ", "Ċ"], ["Ã©", "e"], ["ï¬ģ", "fi"]
    assert groups(compat=False) == [words, e, spaces, fi]
    assert groups(compat=True) == [words, e, spaces, ["cat", "Cat"], fi, ["ł", "ÅĤ"]]


def test_the_hash_of_a_map_tells_maps_apart():
    one, two = compress(vocabulary()), compress(vocabulary(), compat=False)
    assert one.sha256 == compress(vocabulary()).sha256
    assert one.sha256 != two.sha256
