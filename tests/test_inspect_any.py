"""What can be said of any model: states, attention and attribution against plain formulas, and the command on models without an
instrument of their own, imported ones too."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from data import ByteTokenizer
from data.synthetic.task import NO_ANSWER
from eval import inspect
from eval.inspection import anypart, attention, attribution, states
from eval.inspection.numbers import rank_correlation
from eval.inspection.text import Text, cut, loss
from eval.run import open_run
from models import LM, Batch, UserError, build, model_config
from tests.runs import SWIGLU
from tests.test_eval_runs import write_run

STORY = "def f(x):\n    return x + 1\n\n\nclass Naïve:\n    price = '$5'\n" * 4
RECURRENT = {
    "mamba": {},
    "linear_attention": {"heads": 2},
    "retnet": {"heads": 2},
    "gla": {"heads": 2},
    "mamba2": {"head_dim": 8, "d_state": 8},
    "delta": {"heads": 2},
    "gated_delta": {"heads": 2, "head_dim": 8},
}
DELTA = {"kind": "gated_delta", "heads": 2, "head_dim": 4}
MOM = {"kind": "mom", "memories": 3, "top_k": 1, "router_norm": "none", "rule": {**DELTA, "heads": 1}}
LOCAL = {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 6, "qk_norm": True}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8}
HYBRID = {
    "n_layers": 3,
    "blocks": {
        "delta": {"mixer": DELTA, "channel": SWIGLU},
        "mom": {"mixer": MOM, "channel": MOE},
        "local": {"mixer": LOCAL, "channel": SWIGLU},
    },
    "pattern": ["delta", "mom", "local"],
}


def model_of(shape: dict = HYBRID, dtype: torch.dtype = torch.float64, **more) -> LM:
    """Weights so large that tokens clearly differ."""
    cfg = model_config({"d_model": 16, "vocab_size": 257, "init_std": 0.5, **shape, **more})
    return build(cfg, seed=1, dtype=dtype).eval()


def mixer(kind: str, **settings) -> dict:
    return {"n_layers": 1, "blocks": {"a": {"mixer": {"kind": kind, **settings}}}}


def story(width: int = 24, tokens: int = 100) -> Text:
    tokenizer = ByteTokenizer()
    document = [256, *tokenizer.encode(STORY), 256]
    return Text("a story", list(cut([document], width, tokens)), tokenizer)


def log_p(model: LM, read: list[int], target: int) -> float:
    with torch.no_grad():
        logits = model(Batch(torch.tensor([read]))).logits
    return logits[0, -1].log_softmax(-1)[target].item()


# -- states


def test_size_and_rank_against_numpy():
    generator = np.random.default_rng(0)
    matrices = generator.normal(size=(2, 3, 5, 4))
    norm, rank = states.size_and_rank(torch.from_numpy(matrices))
    for i, j in np.ndindex(2, 3):
        p = np.linalg.svd(matrices[i, j], compute_uv=False)
        p = p / p.sum()
        assert rank[i, j].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
        assert norm[i, j].item() == pytest.approx(np.sqrt((matrices[i, j] ** 2).sum()), rel=1e-12)
    outer = torch.outer(torch.randn(6), torch.randn(4))
    known = torch.stack([outer, torch.eye(6, 4), torch.zeros(6, 4), torch.full((6, 4), math.nan)])
    norm, rank = states.size_and_rank(known)
    assert rank[:3].tolist() == pytest.approx([1, 4, 0], abs=1e-5)
    assert norm[1:3].tolist() == pytest.approx([2, 0])
    assert norm[3].isnan()
    assert rank[3].isnan()


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_recurrent_mixer_shows_its_state(kind):
    model = model_of(mixer(kind, **RECURRENT[kind]))
    (one,) = states.measure(model, story(tokens=24), pieces=3)["states"]
    assert one["tokens"] == [8, 16, 24]
    assert (one["name"], one["memories"]) == ("layers.0.mixer.memory", 1)
    assert all(0 < r <= min(one["shape"]) for at in one["rank"] for m in at for r in m)


def test_a_nested_state_is_found():
    ssm = {"kind": "mamba2", "head_dim": 8, "d_state": 4}
    model = model_of(mixer("bmojo", heads=2, window=4, m_f=1, m_e=2, ssm=ssm))
    (one,) = states.measure(model, story(tokens=24))["states"]
    assert one["name"] == "layers.0.mixer.ssm.memory"
    assert one["shape"] == [4, 8]


def test_states_are_those_of_reading_token_by_token():
    """Windows of 24, 24, 24, 24 and 4 tokens: after 16 the last one does not count."""
    model, text = model_of(), story()
    found = states.measure(model, text, pieces=6)["states"]
    assert [(one["name"], one["memories"], one["heads"]) for one in found] == [
        ("layers.0.mixer.memory", 1, 2),
        ("layers.1.mixer.memory", 4, 1),
    ]
    assert found[0]["tokens"] == [4, 8, 12, 16, 20, 24]
    for at, windows in ((16, text.windows[:4]), (4, text.windows)):
        sums = [torch.zeros(1, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)]
        ranks = [t.clone() for t in sums]
        for window in windows:
            state = model.init_state(1, 24)
            with torch.no_grad():
                for token in window[:at]:
                    _, state, _ = model.features(Batch(torch.tensor([[token]])), state)
            for n, memory in enumerate((state.layers[0]["mixer"].memory[:, None], state.layers[1]["mixer"].memory)):
                sums[n] += memory[0].norm(dim=(-2, -1)) / len(windows)
                ranks[n] += states.size_and_rank(memory[0])[1] / len(windows)
        for one, norm, rank in zip(found, sums, ranks, strict=True):
            here = one["tokens"].index(at)
            np.testing.assert_allclose(one["norm"][here], norm.numpy(), rtol=1e-5)
            np.testing.assert_allclose(one["rank"][here], rank.numpy(), rtol=1e-5)


def test_what_parts_report_of_the_text_and_along_it():
    model, text = model_of(), story(width=24, tokens=48)
    tokens = torch.tensor([w[:-1] for w in text.windows])
    with torch.no_grad():
        _, _, aux = model.features(Batch(tokens))
        first = model.features(Batch(tokens[:, :12]))[2].stats["layers.1.channel.load"].value
    found = anypart.whole(model, text)
    assert set(found) == set(aux.stats)
    assert found["layers.1.mixer.load"] == pytest.approx(aux.stats["layers.1.mixer.load"].value.tolist(), rel=1e-5)
    assert sum(found["layers.1.channel.load"]) == pytest.approx(1, abs=1e-5)
    said = states.measure(model, text, pieces=2)["said"]["layers.1.channel.load"]
    assert said["tokens"] == [12, 24]
    assert said["value"][0] == pytest.approx(first.tolist(), rel=1e-5)
    assert np.mean(said["value"], axis=0) == pytest.approx(found["layers.1.channel.load"], abs=1e-5)


# -- attention


@pytest.mark.parametrize("settings", [{}, {"window": 6, "qk_norm": True, "rope_theta": None}, {"bias": True}])
def test_weights_are_those_that_the_layer_uses(settings):
    """Times the values they are what the layer says, padded rows too."""
    model = model_of(mixer("attention", heads=4, kv_heads=2, **settings))
    part, inside = model.layers[0].mixer, {}
    tokens = torch.randint(0, 257, (2, 15), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(15) < torch.tensor([[15], [9]])
    heads = part._heads
    part._heads = lambda h, ctx: inside.update(qkv=heads(h, ctx), ctx=ctx) or inside["qkv"]
    handle = part.register_forward_hook(lambda _, __, output: inside.update(y=output[0]))
    with torch.no_grad():
        model.features(Batch(tokens, valid=valid))
        q, k, v = inside["qkv"]
        weight, seen = attention.weights(part, q, k, inside["ctx"])
        y = part.out((weight @ v.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2))
    handle.remove()
    torch.testing.assert_close(y[valid], inside["y"][valid])
    assert torch.equal((weight > 0).any(1), seen[:, 0])


def test_attention_by_distance_against_loops():
    model, text = model_of(mixer("attention", heads=2, window=5, rope_theta=None)), story(width=12, tokens=30)
    part = model.layers[0].mixer
    mass, even = np.zeros((2, 12)), np.zeros(12)
    entropy, even_entropy, first, far = np.zeros(2), 0.0, np.zeros(2), np.zeros(2)
    queries = sum(len(w) - 1 for w in text.windows)
    for window in text.windows:
        with torch.no_grad():
            q, k, _ = part.qkv(part.norm(model.embed(torch.tensor(window[:-1])))).view(-1, 3, 2, 8).unbind(1)
        for h in range(2):
            for t in range(len(window) - 1):
                keys = range(max(0, t - 4), t + 1)
                score = np.array([q[t, h].numpy() @ k[s, h].numpy() / math.sqrt(8) for s in keys])
                p = np.exp(score - score.max())
                p = p / p.sum()
                for s, weight in zip(keys, p, strict=True):
                    mass[h, t - s] += weight / queries
                    even[t - s] += 1 / len(keys) / queries / 2
                    far[h] += (t - s) * weight / queries
                entropy[h] -= (p * np.log(p)).sum() / queries
                even_entropy += math.log(len(keys)) / queries / 2
                first[h] += (p[0] if t and keys[0] == 0 else 0) / (queries - len(text.windows))
    (found,) = attention.measure(model, text)
    assert found["distances"] == [0, 1, 2, 4, 8, 12]
    for measured, per_token in ((found["mass"], mass), (found["evenly"], even)):
        bins = [per_token[..., a:b].sum(-1) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 12))]
        np.testing.assert_allclose(measured, np.stack(bins, -1), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(found["distance"], far, rtol=1e-5)
    np.testing.assert_allclose(found["first"], first, rtol=1e-5)
    assert found["evenly_entropy"] == pytest.approx(even_entropy, rel=1e-5)
    assert np.sum(found["mass"], axis=1) == pytest.approx([1, 1], rel=1e-5)


# -- attribution


def test_attribution_against_finite_differences():
    model, text = model_of(), story()
    window = list(text.windows[1])
    read, target, fillers = window[:20], window[20], [97, 10]
    found, likely = attribution.gradient(model, read, target, fillers)
    assert likely.item() == pytest.approx(log_p(model, read, target), rel=1e-10)
    base = model.embed.weight[fillers].detach().mean(0)
    for s in (0, 7, 19):
        moved = []
        for step in (1e-5, -1e-5):

            def shift(_, __, output, s=s, step=step):
                output = output.clone()
                output[0, s] += step * (output[0, s] - base)
                return output

            handle = model.embed.register_forward_hook(shift)
            moved.append(log_p(model, read, target))
            handle.remove()
        assert found[s].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-9)
    assert found.abs().max() > 1e-3


def test_leave_one_out_against_single_forwards(monkeypatch):
    monkeypatch.setattr(attribution, "TOKENS", 50)  # several forwards
    model = model_of()
    window = list(story().windows[0])
    read, target, fillers = window[:12], window[12], [97, 10]
    before = log_p(model, read, target)
    found = attribution.left_out(model, read, target, fillers, [0, 5, 11], before)
    for s, lost in zip((0, 5, 11), found.tolist(), strict=True):
        after = [log_p(model, [*read[:s], f, *read[s + 1 :]], target) for f in fillers]
        assert lost == pytest.approx(before - np.mean(after), rel=1e-9, abs=1e-12)


def test_attribution_is_leave_one_out_to_first_order():
    """Fillers close to every embedding: the same question, asked once along the slope and once by doing it."""
    model, text = model_of(dtype=torch.float64), story()
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1] + 1e-3 * torch.randn_like(model.embed.weight))
    found = anypart.attribution.measure(model, text, at=[20, 60])
    for one in found["targets"]:
        assert one["agreement"] > 0.98
        np.testing.assert_allclose(
            one["attribution"], one["left_out"], rtol=0.1, atol=0.1 * np.abs(one["left_out"]).max()
        )


def test_rank_correlation_against_numpy():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = [np.argsort(np.argsort(x.numpy())) for x in (a, b)]
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-10)
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, torch.zeros(50)) is None
    assert rank_correlation(a[:2], b[:2]) is None


def test_gains_are_losses_with_a_shuffled_past():
    model, window = model_of(), list(story().windows[0])
    read, targets = window[:-1], window[1:]
    found = attribution.gains(model, read, targets, torch.Generator().manual_seed(3))
    unasked = [NO_ANSWER if t == 10 else target for t, target in enumerate(targets)]
    assert found[10] != 0
    assert attribution.gains(model, read, unasked, torch.Generator().manual_seed(3))[10] == 0
    generator = torch.Generator().manual_seed(3)
    assert found[:6].tolist() == [0] * 6  # eighths of 3 tokens; the last one or two are left as they are
    for start in range(6, 24, 3):
        order = torch.randperm(start - 3, generator=generator).tolist()
        for t in range(start, start + 3):
            read = [window[i] for i in order] + window[start - 3 : t + 1]
            gain = log_p(model, window[: t + 1], window[t + 1]) - log_p(model, read, window[t + 1])
            assert found[t].item() == pytest.approx(gain, rel=1e-5, abs=1e-6)


def test_the_most_helped_predictions_stand_apart():
    model, text = model_of(), story()
    found = attribution.most_helped(model, text)
    assert len(found) == attribution.TARGETS
    gains = [one.gain for one in found]
    assert gains == sorted(gains, reverse=True)
    assert all(a.window != b.window or abs(a.at - b.at) > 3 for a in found for b in found if a is not b)
    generator = torch.Generator().manual_seed(attribution.SEED)
    best = [attribution.gains(model, w[:-1], w[1:], generator).max().item() for w in text.windows]
    assert gains[0] == max(best)


def test_targets_by_number_and_tokens_to_check():
    text = story()
    assert attribution.target_at(text, 23) == (0, 23, None)
    assert attribution.target_at(text, 24) == (1, 0, None)
    for number in (-1, 100):
        with pytest.raises(UserError, match="tokens 0 to 99"):
            attribution.target_at(text, number)
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    places = attribution.to_check(values)
    assert len(places) == attribution.CHECKED
    assert places == sorted(set(places))
    assert set(values.abs().topk(attribution.CHECKED // 2).indices.tolist()) < set(places)
    assert attribution.to_check(values[:9]) == list(range(9))


def test_a_task_is_traced_back_from_its_answers():
    """Of rows [1, 2, 3] and [4, 5, 6] one answer each is asked for, which is not the next token."""
    text = Text(
        "rows", [[1, 2, 3, 9], [4, 5, 6, 9]], ByteTokenizer(), [[NO_ANSWER, 70, NO_ANSWER], [NO_ANSWER] * 2 + [80]]
    )
    model = model_of()
    (one,) = attribution.measure(model, text, at=[5])["targets"]
    assert (one["target"], one["window"], len(one["tokens"])) == ("P", 1, 3)
    assert one["loss"] == pytest.approx(-log_p(model, [4, 5, 6], 80), rel=1e-5)
    with pytest.raises(UserError, match="--at 3: nothing is asked"):
        attribution.target_at(text, 3)


# -- the instrument


def test_a_part_without_effect():
    model, text = model_of(), story()
    assert anypart.standard(model) == [f"zero:{n}.{slot}" for n in range(3) for slot in ("mixer", "channel")]
    plain = loss(model, text)
    with anypart.ablate(model, "zero:0.mixer+zero:2.channel"):
        both = loss(model, text)
    for part in (model.layers[0].mixer.out, model.layers[2].channel.down):
        torch.nn.init.zeros_(part.weight)
    assert loss(model, text) == pytest.approx(both, rel=1e-12)
    assert both != plain
    for spec, words in (
        ("zero:3.mixer", "no part '3.mixer'"),
        ("zero", "zero:LAYER.SLOT"),
        ("zeros:0.mixer", "did you mean 'zero'"),
    ):
        with pytest.raises(UserError, match=words):
            anypart.check(model, spec)


def test_changes_between_checkpoints():
    earlier, model = model_of(), model_of()
    with torch.no_grad():
        for p in model.layers[1].mixer.parameters():
            p.mul_(1.5)
    moved = anypart.changes(earlier, model, story())["parts"]
    assert moved["1.mixer"] == pytest.approx(0.5)
    assert {v for k, v in moved.items() if k != "1.mixer"} == {0.0}


def test_looking_changes_no_byte():
    engram = {"kind": "engram", "orders": [2], "heads": 2, "base": 50, "row_width": 8}
    model = model_of({**HYBRID, "at": {1: {"memory": engram}}}, dtype=torch.float32)
    model.use_tokenizer(ByteTokenizer().json())
    text = story()

    def everything() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        own = [sorted(vars(m)) for m in model.modules()]
        rows = [t.numpy().tobytes() for table in model.tables().values() for t in table.state_dict().values()]
        pending = [table.take_grad() for table in model.tables().values()]
        weights = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
        return weights, rows, pending, hooks, own, [p.grad for p in model.parameters()], model.training

    before, output = everything(), loss(model, text)
    found = anypart.measure_all(model, text)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert everything() == before
    assert loss(model, text) == output
    assert found["attribution"]["targets"]


# -- the command


def test_the_command_on_a_hybrid(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    run = write_run(tmp_path / "run", model_of(dtype=torch.float32), seq_len=24)
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    words = [str(run), "--text", str(tmp_path / "story.txt"), "--device", "cpu", "--tokens", "96", "--at", "40"]
    assert inspect.main([*words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    assert (found["kind"], found["imported_from"], len(found["tokens"])) == ("any", None, 96)
    assert [one["name"] for one in found["any"]["attention"]] == ["layers.2.mixer"]
    assert [one["at"] for one in found["any"]["attribution"]["targets"]] == [40]
    assert len(found["ablations"]) == 6
    assert [one["kind"] for one in found["any"]["gates"]["parts"]] == ["gated_delta", "mom"]
    seen = ("attention", "attribution", "gates", "gates-tokens", "reported", "states")
    names = ["any-ablations", *(f"any-{name}" for name in seen)]
    assert sorted(p.stem for p in (tmp_path / "out").glob("*.png")) == names
    for name in names:
        assert image.imread(tmp_path / "out" / f"{name}.png")[..., :3].std() > 0.02
    printed = capsys.readouterr().out
    assert "| layers.1.mixer.memory " in printed
    assert "half-life (tokens)" in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "half-life (tokens)" in page
    assert page.count("data:image/png") == len(names)
    assert "| zero:1.channel " in printed

    def said(*more: str) -> str:
        assert inspect.main([*words, "--out", str(tmp_path / "other"), *more]) == 2
        assert not (tmp_path / "other").exists()
        return capsys.readouterr().err

    assert "tokens 0 to 95" in said("--at", "96")
    assert "no such part" in said("--part", "gmt")
    assert "not compared" in said("--baseline", str(run))


def test_the_command_on_an_imported_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from models.hf import import_run

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    cfg = transformers.LlamaConfig(vocab_size=257, **sizes, **heads, bos_token_id=256, eos_token_id=256)
    transformers.LlamaForCausalLM(cfg).save_pretrained(tmp_path / "llama")
    ByteTokenizer().save(tmp_path / "llama")
    import_run(tmp_path / "llama", tmp_path / "run")
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    words = ["--text", str(tmp_path / "story.txt"), "--device", "cpu", "--tokens", "60", "--ablate", "none"]
    assert inspect.main([str(tmp_path / "run"), *words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    assert found["imported_from"] == str(tmp_path / "llama")
    assert f"imported from {tmp_path / 'llama'}" in capsys.readouterr().out
    assert not found["any"]["states"]
    assert len(found["any"]["attention"]) == 2
    assert found["ablations"] == []
    assert not (tmp_path / "out" / "any-states.png").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_a_diverged_model_is_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_of(dtype=torch.float32)
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    run = open_run(write_run(tmp_path / "run", model), "cpu")
    found = inspect.look(run, story(), [], at=[30])
    assert found["any"]["attribution"]["targets"][0]["agreement"] is None
    assert inspect.write(found, tmp_path / "out")


def test_a_model_of_channels_alone(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_of({"n_layers": 1, "blocks": {"a": {"channel": SWIGLU}}}, dtype=torch.float32)
    run = open_run(write_run(tmp_path / "run", model), "cpu")
    found = inspect.look(run, story(), [])
    assert found["any"]["states"] == found["any"]["attention"] == []
    assert found["any"]["attribution"]["targets"] == []  # nothing comes from further back
    assert [p.name for p in inspect.write(found, tmp_path / "out")] == ["inspect.json", "inspect.md"]
