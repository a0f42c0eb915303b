"""Generation: greedy is the argmax of whole forwards, sampling follows its seed, text streams in whole characters."""

import random

import pytest
import torch

from data import ByteTokenizer
from eval.decoding import Decoder, choose, generate, run_decoder
from eval.generate import main, sample_text
from eval.streams import StopStrings, TextStream, cut_at
from models import Batch, UserError
from tests.test_eval_runs import HYBRID, LEARNED, LINEAR, tiny_model, write_run

PROMPTS = [[256, 100, 101, 102], [256], [256, *range(40, 60)]]


def argmax_by_whole_forwards(model, ids: list[int], n: int) -> list[int]:
    made = list(ids)
    for _ in range(n):
        with torch.no_grad():
            made.append(int(model(Batch(torch.tensor([made]))).logits[0, -1].argmax()))
    return made[len(ids) :]


@pytest.mark.parametrize("shape", [HYBRID, LINEAR, {**LEARNED, "max_seq_len": 64}, {**HYBRID, "branches": 2}])
def test_greedy_is_the_argmax_of_the_whole_forward(shape):
    model = tiny_model(shape)
    expected = [argmax_by_whole_forwards(model, p, 15) for p in PROMPTS]
    assert generate(model, PROMPTS, 15) == expected
    assert generate(model, torch.tensor([PROMPTS[0]]), 15) == expected[:1]


def test_rows_end_by_themselves_and_are_dropped():
    model = tiny_model()
    whole = generate(model, PROMPTS, 30)
    eos = whole[0][4]
    seen = []
    found = generate(model, PROMPTS, 30, eos=eos, on_token=lambda row, token: seen.append((row, token)))
    assert found == [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert [[t for r, t in seen if r == row] for row in range(3)] == found
    stopped = generate(model, PROMPTS, 30, stop=lambda row, ids: len(ids) == 2 + row)
    assert stopped == [ids[: 2 + row] for row, ids in enumerate(whole)]
    assert generate(model, PROMPTS, 0) == [[], [], []]


def test_sampling_follows_the_seed_alone():
    model = tiny_model()

    def sample(seed):
        return generate(model, PROMPTS, 12, temperature=1.2, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert sample(1) == first
    assert sample(2) != first


def test_filters_keep_what_they_promise():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = p.log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def counts(**options):
        picked = choose(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": generator, **options})
        return torch.bincount(picked, minlength=5) / 4000

    torch.testing.assert_close(counts(), p, atol=0.03, rtol=0)
    torch.testing.assert_close(counts(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(counts(top_p=0.75), torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85, atol=0.03, rtol=0)
    torch.testing.assert_close(counts(top_p=0.4), torch.tensor([1.0, 0, 0, 0, 0]))
    cold = counts(temperature=0.5)
    torch.testing.assert_close(cold, p.square() / p.square().sum(), atol=0.03, rtol=0)
    assert choose(logits, 0.0, 0, 1.0, None).eq(0).all()


def test_too_long_a_context_is_refused():
    model = tiny_model(LEARNED)
    with pytest.raises(UserError, match="24 learned positions"):
        generate(model, [[1] * 20], 10)
    with pytest.raises(UserError, match="at least one token"):
        generate(model, [[]], 10)


def test_generation_changes_neither_the_model_nor_what_it_was_given():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prompts = torch.tensor([[1, 2, 3]])
    generate(model, prompts, 8)
    assert torch.equal(prompts, torch.tensor([[1, 2, 3]]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_branches_of_one_prompt_equal_separate_prompts():
    model = tiny_model()
    decoder = Decoder(model, [PROMPTS[2]], 10)
    decoder.select([0, 0, 0])
    assert run_decoder(decoder, 10) == generate(model, [PROMPTS[2]], 10) * 3


def test_sample_text_is_quiet(tmp_path):
    model = tiny_model().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sample_text(model, ByteTokenizer(), "def ", 20, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert first == sample_text(model, ByteTokenizer(), "def ", 20, seed=5)
    assert first != sample_text(model, ByteTokenizer(), "def ", 20, seed=6)
    assert first.startswith("def ")
    assert not sample_text(model.eval(), ByteTokenizer(), "", 3, seed=0).startswith("def")
    assert not model.training
    short = tiny_model(LEARNED)
    assert sample_text(short, ByteTokenizer(), "abc", 500, seed=0).startswith("abc")


# -- text


def test_text_streams_in_whole_characters():
    rng = random.Random(0)
    tokenizer = ByteTokenizer()
    for _ in range(50):
        text = "".join(chr(rng.choice([65, 0xE9, 0x20AC, 0x1F600, 10])) for _ in range(30))
        stream = TextStream(tokenizer)
        pieces = [stream.push(t) for t in tokenizer.encode(text)]
        assert "".join(pieces) + stream.flush() == text == stream.text
        assert all(piece == "" or "\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_the_stream():
    stream = TextStream(ByteTokenizer())
    ids = [0xFF] * 20 + list("é€".encode()) + [0xC3]
    out = "".join(stream.push(t) for t in ids)
    assert out == "\ufffd" * 20 + "é€"
    assert stream.flush() == "\ufffd"


def test_stop_strings_span_tokens():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("some €nd")
    stop = StopStrings(tokenizer, ["€nd", "zz"])
    assert [stop(1, ids[:n]) for n in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]
    assert cut_at("some €nd zz", ["zz", "€nd"]) == "some "
    assert cut_at("nothing", ["", "zz"]) == "nothing"


# -- the command


def test_command_streams_stops_and_keeps_its_state(tmp_path, capsys):
    path = write_run(tmp_path / "run", tiny_model())
    base = [str(path), "--device", "cpu", "--seed", "3"]
    assert main([*base, "--prompt", "def ", "--max-tokens", "40"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("def ")
    assert main([*base, "--prompt", "def ", "--max-tokens", "40"]) == 0
    assert capsys.readouterr().out == whole
    stop = whole[12:14]
    assert main([*base, "--prompt", "def ", "--max-tokens", "40", "--stop", stop]) == 0
    assert capsys.readouterr().out == "def " + whole[4:-1].split(stop)[0] + "\n"
    assert main([*base, "--prompt", "def ", "--max-tokens", "5", "--samples", "3", "--temperature", "1.5"]) == 0
    assert capsys.readouterr().out.count("--- sample") == 3
    memory = str(tmp_path / "memory")
    assert main([*base, "--prompt", "def ", "--max-tokens", "6", "--greedy", "--save-state", memory]) == 0
    first = capsys.readouterr().out
    assert main([*base, "--max-tokens", "6", "--greedy", "--load-state", memory]) == 0
    second = capsys.readouterr().out
    ids = generate(tiny_model(), [[256, *b"def "]], 12)[0]
    assert first == "def " + ByteTokenizer().decode(ids[:6]) + "\n"
    assert second == ByteTokenizer().decode(ids[6:]) + "\n"


def test_errors_are_one_line_with_exit_code_2(tmp_path, capsys):
    path = str(write_run(tmp_path / "run", tiny_model(LEARNED)))
    for arguments, words in [
        (
            [path, "--prompt", "abc", "--max-tokens", "30"],
            "do not fit the context of 24 of this model; --max-tokens 20",
        ),
        ([path, "--prompt-file", str(tmp_path / "none")], "--prompt-file"),
        ([path, "--samples", "2", "--save-state", "x"], "--samples 1"),
        ([path, "--top-p", "0"], "--top-p"),
        ([str(tmp_path / "rum")], "did you mean 'run'"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m eval.generate runs/" in capsys.readouterr().out
