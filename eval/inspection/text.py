"""The text that a model is looked at with: windows of tokens, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import schema
from data.synthetic.feed import Synthetic
from data.synthetic.task import NO_ANSWER, Rows
from data.tokenizer import Tokenizer
from eval.corpus_tasks import open_run_corpus
from eval.run import LoadedRun
from eval.scoring import pad
from models import LM, Batch, UserError

WINDOW = 1024  # tokens, of a model that does not say how long a text it was trained on
LONGEST_TOKEN = 32  # characters, on average: as much of a file is read as so many for each token that is wanted
ROWS = 8  # in one forward
BEFORE, AFTER = 16, 4  # tokens around one that is shown where it stands


@dataclass(frozen=True)
class Text:
    """Windows of ids, each read by itself; the last id of a window is only predicted. Tokens are numbered window by window."""

    source: str
    windows: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    # Of a task: what is asked for after each token that is read, NO_ANSWER where nothing is. None: the next token, everywhere.
    answers: Sequence[Sequence[int]] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens that are read."""
        return [i for window in self.windows for i in window[:-1]]

    @property
    def targets(self) -> list[Sequence[int]]:
        """Of each window, what is to be said after each token that is read."""
        return [w[1:] for w in self.windows] if self.answers is None else [*self.answers]

    @property
    def asked(self) -> Tensor:
        """bool [N], after which of the tokens that are read something is asked."""
        return torch.tensor([target != NO_ANSWER for row in self.targets for target in row])

    def batches(self) -> Iterator[list[Sequence[int]]]:
        for windows, _ in self.batches_with_targets():
            yield windows

    def batches_with_targets(self) -> Iterator[tuple[list[Sequence[int]], list[Sequence[int]]]]:
        targets = self.targets
        for start in range(0, len(self.windows), ROWS):
            yield list(self.windows[start : start + ROWS]), targets[start : start + ROWS]

    def shown(self, token: int) -> str:
        """One id for the eye; a space would not be seen."""
        return self.tokenizer.token_text(token).replace(" ", "␣")

    def places(self) -> list[str]:
        """Each token that is read, «marked», among its neighbours."""
        found = []
        for window in self.windows:
            for at, token in enumerate(window[:-1]):
                before = self._plain(window[max(at - BEFORE, 0) : at])
                after = self._plain(window[at + 1 : at + 1 + AFTER])
                found.append(f"{before}«{self.tokenizer.token_text(token)}»{after}")
        return found

    def _plain(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_of(run: LoadedRun, path: Path | str | None, tokens: int) -> Text:
    """At most ``tokens`` tokens of a file, or of the run's validation data from its start, in windows as long as those the run
    was trained on; of a run on a task, whole rows, at least one. Raises UserError (DataError for a corpus) if there is nothing to
    read."""
    if tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {tokens}")
    if run.task is not None:
        if path:
            raise UserError(f"--text: {run.name} was trained on the task '{run.task}', which knows no text")
        return text_of_rows(run, rows_of_task(run, max(1, tokens // (run.trained_length or WINDOW))))
    width = min(n for n in (run.trained_length or WINDOW, run.model.cfg.max_seq_len) if n)
    source, documents = _from_file(run, path, tokens) if path else _from_validation(run)
    windows = list(cut(documents, width, tokens))
    if not windows:
        raise UserError(f"{source}: no text to look at")
    return Text(source, windows, run.tokenizer)


def rows_of_task(run: LoadedRun, count: int) -> Rows:
    """The first validation rows of the task that a run was trained on."""
    data = Synthetic(schema.load(run.dir / "config.yaml").data)
    return next(data.once(count, count))


def text_of_rows(run: LoadedRun, rows: Rows) -> Text:
    """Each row is a window."""
    answers = np.where(rows.loss_mask, rows.targets, NO_ANSWER).tolist()
    windows = [[*row, said] for row, said in zip(rows.tokens.tolist(), rows.targets[:, -1].tolist(), strict=True)]
    return Text(f"the first validation rows of the task '{run.task}'", windows, run.tokenizer, answers)


def cut(documents: Iterable[Sequence[int]], width: int, tokens: int) -> Iterator[Sequence[int]]:
    """Ids of documents, their ends included -> windows of up to ``width`` tokens and the one after them, ``tokens`` in all."""
    for document in documents:
        ends = [*range(0, len(document) - 1, width), len(document) - 1]
        for start, end in pairwise(ends):
            end = min(end, start + tokens)
            yield document[start : end + 1]
            tokens -= end - start
            if not tokens:
                return


def _from_file(run: LoadedRun, path: Path | str, tokens: int) -> tuple[str, Iterator[list[int]]]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LONGEST_TOKEN * tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: cannot read '{path}': {error}") from error
    documents = [run.tokenizer.encode(text)] if text else []
    return str(path), (_whole(ids, run.tokenizer) for ids in documents)


def _from_validation(run: LoadedRun) -> tuple[str, Iterator[list[int]]]:
    try:
        corpus = open_run_corpus(run.dir)
    except UserError as error:
        raise UserError(f"{error}; --text FILE gives another text") from error
    shards = corpus.val
    documents = (shards.read(i).tolist() for i in range(len(shards)))
    return "the start of the validation data", (_whole(ids, run.tokenizer) for ids in documents)


def _whole(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


@torch.no_grad()
def read(model: LM, text: Text) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the model over the text. -> of each batch of windows, in order: (losses [n] in nats of its n tokens, NaN where nothing is
    asked; valid [B, T])."""
    device = model.embed.weight.device
    for windows, wanted in text.batches_with_targets():
        tokens, valid = pad([w[:-1] for w in windows], device)
        targets, _ = pad(wanted, device)
        h, _, _ = model.features(Batch(tokens, valid=valid))
        nll, _ = model.token_nll(h, targets.clamp(min=0))
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        yield nll.masked_fill(targets == NO_ANSWER, torch.nan)[valid].double(), valid


def loss(model: LM, text: Text) -> float:
    """Mean loss per token, or per answer, in nats."""
    return mean_loss(text, [nll for nll, _ in read(model, text)])


def mean_loss(text: Text, losses: Sequence[Tensor]) -> float:
    """Over what counts of what `read` gave."""
    return torch.cat(list(losses)).cpu()[text.asked].mean().item()
