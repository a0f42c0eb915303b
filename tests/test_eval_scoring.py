"""Scores do not depend on how requests are grouped, batched, padded, cut into pieces or branched."""

import random

import pytest
import torch

from eval.scoring import Scorer, common_prefix, prefill
from models import Batch
from tests.test_eval_runs import HYBRID, LEARNED, LINEAR, LLAMA, tiny_model

TOLERANCE = 1e-4


def plain(model, context, cont) -> tuple[float, bool]:
    """The definition: logits of the whole sequence, one request at a time."""
    ids = torch.tensor([[*context, *cont]])
    with torch.no_grad():
        logits = model(Batch(ids[:, :-1])).logits[0, len(context) - 1 :].double()
    target = ids[0, len(context) :]
    picked = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(picked), bool((logits.argmax(-1) == target).all())


def workload(seed: int, contexts: int, longest: int, vocab: int = 257) -> list:
    """Ragged contexts, some shared by several continuations, some equal, some that begin alike."""
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(vocab) for _ in range(n)]

    few_shot = ids(40)
    requests = []
    for i in range(contexts):
        context = (few_shot if i % 3 == 0 and longest > 40 else []) + ids(rng.randint(1, longest))
        requests += [(context, ids(rng.randint(1, 9))) for _ in range(rng.choice([1, 1, 2, 4]))]
    requests.append(requests[0])
    rng.shuffle(requests)
    return requests


def scored(scorer: Scorer, requests) -> list:
    found = [pair for batch in scorer.score(requests) for pair in batch]
    assert sorted(i for i, _ in found) == list(range(len(requests)))
    return [score for _, score in sorted(found)]


def assert_equal(found, expected):
    for one, (logprob, greedy) in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(logprob, abs=TOLERANCE)
        assert one.greedy == greedy


@pytest.mark.parametrize(
    "shape", [HYBRID, LINEAR, {"blocks": {"a": LLAMA}}, {**LEARNED, "max_seq_len": 128}, {**HYBRID, "branches": 2}]
)
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_equal_to_one_by_one(shape, batch_size):
    model = tiny_model(shape)
    requests = workload(0, 30 if batch_size == "auto" else 12, 60)
    found = scored(Scorer(model, batch_size), requests)
    assert_equal(found, [plain(model, *r) for r in requests])


@pytest.mark.parametrize("tokens", [1, 7, 40, 200])
def test_equal_when_read_in_pieces(tokens):
    model = tiny_model()
    requests = workload(1, 12, 50)
    scorer = Scorer(model)
    scorer.budget.tokens = tokens
    assert_equal(scored(scorer, requests), [plain(model, *r) for r in requests])


def test_equal_when_the_branches_do_not_fit_at_once():
    model = tiny_model()
    rng = random.Random(2)
    context = [rng.randrange(257) for _ in range(20)]
    requests = [(context, [rng.randrange(257) for _ in range(rng.randint(1, 5))]) for _ in range(50)]
    scorer = Scorer(model)
    scorer.budget.state_bytes = 3 * model.cost(64).state_bytes
    assert_equal(scored(scorer, requests), [plain(model, *r) for r in requests])


def test_greedy_continuations_are_recognised():
    model = tiny_model()
    context = [5, 6, 7]
    ids = list(context)
    for _ in range(4):
        ids.append(int(model(Batch(torch.tensor([ids]))).logits[0, -1].argmax()))
    right = ids[3:]
    wrong = [*right[:-1], (right[-1] + 1) % 257]
    first, second = scored(Scorer(model), [(context, right), (context, wrong)])
    assert first.greedy
    assert not second.greedy
    alone = scored(Scorer(model), [(context, right)])
    assert alone[0].greedy


def test_a_shared_context_is_read_once(monkeypatch):
    model = tiny_model()
    fed = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda b, *a, **k: (fed.append(b.tokens.numel()), features(b, *a, **k))[1])
    rng = random.Random(3)
    contexts = [[rng.randrange(257) for _ in range(100)] for _ in range(4)]
    one_token = [(c, [t]) for c in contexts for t in range(4)]
    scored(Scorer(model), one_token)
    assert fed == [400]  # the prefill answers one-token continuations by itself
    fed.clear()
    prefix = [rng.randrange(257) for _ in range(300)]
    few_shot = [([*prefix, *c], [1, 2, t]) for c in contexts for t in range(4)]
    scored(Scorer(model), few_shot)
    assert sum(fed) == 300 + 400 + 16 * 2


def test_full_memory_halves_the_batch(monkeypatch):
    model = tiny_model()
    requests = workload(4, 12, 30)
    expected = [plain(model, *r) for r in requests]
    features = model.features

    def small_device(batch, *args, **kwargs):
        if batch.tokens.numel() > 100:
            raise torch.OutOfMemoryError("full")
        return features(batch, *args, **kwargs)

    monkeypatch.setattr(model, "features", small_device)
    scorer = Scorer(model)
    assert_equal(scored(scorer, requests), expected)
    assert scorer.budget.tokens < 200


def test_documents_with_a_carried_state():
    model = tiny_model()
    rng = random.Random(5)
    documents = [[rng.randrange(256) for _ in range(n)] for n in (1, 70, 33, 2, 64)]
    found = dict(pair for batch in Scorer(model, 2).score_documents(documents, 256, 16) for pair in batch)
    assert_equal([found[i] for i in range(5)], [plain(model, [256], d) for d in documents])


def test_prefill_returns_the_last_real_token():
    model = tiny_model()
    rows = [[1, 2, 3, 4, 5], [9], [7, 7]]
    scorer = Scorer(model)
    for tokens in (1 << 20, 6):
        scorer.budget.tokens = tokens
        last, state = prefill(model, rows, model.init_state(3, 8), scorer.budget)
        for b, row in enumerate(rows):
            alone = model.features(Batch(torch.tensor([row])))[0][0, -1]
            torch.testing.assert_close(last[b], alone, rtol=1e-4, atol=1e-5)
        assert state.seen.tolist() == [5, 1, 2]


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[4, 5]]) == 2
