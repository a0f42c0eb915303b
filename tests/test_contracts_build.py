"""What every part promises beside its function: true formulas, complete meta, one graph, no host in the way.

To sign: add the part's configurations to `tests.cases`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.memory_attention import memory_attention
from models import Batch, meta_model, zoo
from models import state as states
from models.mixers import bmojo
from models.mixers.attention import Attention
from models.mixers.mamba import SelectiveStateSpace
from models.mixers.pieces import ShortConv
from models.mixers.rules import Rule
from models.types import ParamMeta, count_params
from tests.bmojo_naive import keys_of
from tests.cases import CASES, MODELS
from tests.tools import (
    TOLERANCE,
    Case,
    assert_close,
    parts_of,
    poisoned_memory,
    random_batch,
    segments,
    spread,
    state_hash,
)

pytestmark = pytest.mark.usefixtures("poison")

FORMS = (Rule, ShortConv, SelectiveStateSpace)  # what ops compute, in whatever form


def test_every_kind_has_a_case():
    """A part that signs no contract does not exist."""
    for slot, table in zoo.TABLE.items():
        for kind in table:
            cases = CASES.get((slot, kind), [])
            assert cases, f"{slot} '{kind}' stands in models/zoo.py but not in tests/cases.py"
            assert all((slot, kind) in parts_of(case.config()) for case in cases)


@pytest.mark.parametrize("T", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cost_counts_what_was_built(case: Case, T: int, dtype: torch.dtype):
    model = meta_model(case.config(max_seq_len=64))
    for _, _, part in model.parts():
        cost = part.cost(T, dtype)
        tables = sum(t.rows * t.width for t in part.tables().values())
        assert cost.params == count_params(part) + tables
        assert 0 < cost.active_params <= cost.params
        assert cost.state_bytes == states.nbytes(part.init_state(1, "meta", dtype, T))
    total = model.cost(T, dtype)
    assert total.params == count_params(model) + sum(t.rows * t.width for t in model.tables().values())
    assert total.state_bytes == states.nbytes(model.init_state(1, T, dtype=dtype))


def test_cost_counts_the_flops(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Against the matrix products that run. Attention runs all T x T scores here; the formula counts causal ones. What
    runs inside a rule or a short convolution depends on the form of its op; in its place, the rows that came in count with
    what the recurrence itself needs for one. So do the keys of a query in attention with memory. What is made once from the weights
    is made before."""
    T = 24
    model = case.build(torch.float32).eval()
    with torch.no_grad():
        model(random_batch(1, T, targets=False))
    rows: dict[nn.Module, int] = {}

    def note(form: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[form] = rows.get(form, 0) + args[0].shape[:2].numel()

    forms = {f"LM.{name}": m for name, m in model.named_modules() if isinstance(m, FORMS)}
    for form in forms.values():
        form.register_forward_pre_hook(note)
    counter, within = FlopCounterMode(display=False), []

    def attend(*args: Tensor, **how: Any) -> Tensor:
        before = counter.get_total_flops()
        o = memory_attention(*args, **how)
        within.append(counter.get_total_flops() - before)
        return o

    monkeypatch.setattr(bmojo, "memory_attention", attend)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(random_batch(1, T, targets=False))
    found = counter.get_flop_counts()
    inside = sum(sum(found[name].values()) for name in forms if name in found) + sum(within)
    needed = sum(rows[form] * row_flops(form) for form in forms.values())
    for part in model.modules():
        if isinstance(part, bmojo.BMojo) and part.cfg.window:
            keys = keys_of(part.cfg, [1.0] * T)
            needed += sum(4 * part.heads * part.head_dim * len([*k.window, *k.fading, *k.kept]) for k in keys)
    future = 0
    for part in model.modules():
        if isinstance(part, Attention):
            seen = torch.ones(T, T).tril().triu(1 - (part.cfg.window or T)).sum()
            future += 4 * part.heads * part.head_dim * (T * T - int(seen))
    expected = counter.get_total_flops() - inside + needed - future + case.other_flops * T
    assert model.cost(T).flops_per_token * T == pytest.approx(expected, rel=case.flops_rtol)


def row_flops(form: Rule | ShortConv | SelectiveStateSpace) -> int:
    """Of one row in the recurrent form: each product with the memory (or the filters) run once, and counted."""
    if isinstance(form, ShortConv):
        return 2 * form.weight.numel()
    if isinstance(form, SelectiveStateSpace):  # a channel's value is one number
        return 2 * 2 * form.init_state(1, "cpu", torch.float32).numel()
    state = form.init_state(1, "cpu", torch.float32)[0]  # [HV, K, V']
    key, value = state[:, :, :1], state[:, :1]
    with FlopCounterMode(display=False) as counter:
        for _ in range(2 if form.erases else 1):  # the read of the query, and of the key before its value is replaced
            torch.bmm(state.mT, key)
        torch.bmm(key, value)
    return counter.get_total_flops() + sum(2 * p.numel() for p in form.parameters() if p.ndim == 2)


def test_meta_names_every_parameter_once(case: Case):
    model = meta_model(case.config())
    meta = model.meta()
    assert sorted(meta) == sorted(n for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        m = meta[name]
        assert isinstance(m, ParamMeta)
        assert m.role in ("matrix", "vector", "embedding", "table", "scalar")
        assert (m.optimizer, m.shard) in {(o, s) for o in ("auto", "adamw") for s in ("replicate", "rows")}
        assert not m.splits or sum(m.splits) == p.shape[-2]
        assert p.ndim >= 2 or (m.optimizer == "adamw" and not m.decay), f"{name}: vectors neither decay nor go to Muon"
    assert model.loss_weights.keys() >= case.build().train()(random_batch(1, 3)).losses.keys()


# -- compile, CUDA


def _compiled_equals_eager(case: Case, backend: str, dtype: torch.dtype) -> None:
    model = case.build(dtype).train()
    batch = random_batch(2, 6)._replace(cu_seqlens=segments([[4, 2], [6]], 6, pad_to=5))
    ctx, _, _ = model.prepare(batch, None)
    step_ctx, _, _ = model.prepare(Batch(batch.tokens[:, :1]), model.init_state(2, 6))
    torch._dynamo.reset()
    seen: list[object] = []
    for block, old, cfg in zip(model.layers, model.init_state(2, 6).layers, model.cfg.layers(), strict=True):
        if cfg in seen:
            continue
        seen.append(cfg)
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        learned = [p for p in block.parameters() if p.requires_grad]
        said = {}
        for name, run in (("eager", block), ("compiled", compiled)):
            x = torch.randn(2, 6, *([model.cfg.branches] if model.cfg.branches > 1 else []), 16, dtype=dtype)
            x = x.copy_(torch.linspace(-1, 1, x.numel()).view_as(x)).requires_grad_()
            y, _, aux = run(x, ctx)
            (y.square().sum() + sum(aux.losses.values())).backward(inputs=[x, *learned])
            with torch.no_grad():
                z, new, _ = run(x[:, :1], step_ctx, old)
            said[name] = (y, aux.losses, aux.writes, x.grad, [p.grad for p in learned], z, new)
            model.zero_grad()
        assert_close(said["compiled"], said["eager"], "forms", dtype)


def test_compiles_as_one_graph(case: Case):
    _compiled_equals_eager(case, "eager", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("case", [MODELS[0], MODELS[2], MODELS[3]], ids=lambda case: case.name)
def test_inductor_equals_eager(case: Case):
    with poisoned_memory():
        _compiled_equals_eager(case, "inductor", torch.float32)


@pytest.mark.cuda
def test_no_host_synchronisation(case: Case):
    model = case.build(torch.float32).cuda()
    batch = random_batch(2, 8)._replace(cu_seqlens=segments([[5, 3], [8]], 8, pad_to=6)).to("cuda")
    state = model.init_state(2, 12)
    token = Batch(batch.tokens[:, :1].contiguous())

    def step() -> None:
        model.total(model(batch).losses).backward()
        with torch.no_grad():
            model.features(token, model.features(Batch(batch.tokens), state)[1], donate=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@torch.no_grad()
def test_decode_can_be_captured(case: Case):
    model = case.build(torch.float32).cuda().eval()
    tokens = random_batch(2, 8).tokens.cuda()
    _, state, _ = model.features(Batch(tokens[:, :7].contiguous()), model.init_state(2, 12))
    token = Batch(tokens[:, 7:].contiguous())
    expected, after, _ = model.features(token, states.clone(state))
    model.features(token, states.clone(state), donate=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, new, _ = model.features(token, state, donate=True)
    graph.replay()
    torch.cuda.synchronize()
    assert_close((h, new), (expected, after), "forms", torch.float32)


def test_the_table_of_tolerances_is_tight():
    """A test that cannot fail is none: an error of one part in a hundred fails every purpose but bf16."""
    for (purpose, dtype), limit in TOLERANCE.items():
        assert limit < 1e-2 or dtype == torch.bfloat16, purpose
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(torch.ones(3, dtype=torch.float64) + 1e-9, torch.ones(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(torch.tensor([float("nan")]), torch.ones(1))
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
    twice = MODELS[0].build()
    before = state_hash(twice)
    spread(twice)
    assert state_hash(twice) != before
