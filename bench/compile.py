"""Every kernel configuration compiled ahead of time: registers, spills, shared memory and matrix instructions, as a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from kernels import compilation
from kernels.compilation import GATED, TARGETS, Compiled, applies, compile_all, entries
from models.errors import UserError, nearest


def survey(targets: Sequence[str] | None, ops: Sequence[str] | None, sample: bool = False) -> list[Compiled]:
    """Compile on as many processes as there are cores; progress on stderr. ``sample``: only the first configuration of each
    kernel on targets other than the gated one. Sorted by op, target and configuration."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: an interpreting process cannot compile")
    known = compilation.with_triton()
    for name, valid in [(t, TARGETS) for t in targets or ()] + [(op, known) for op in ops or ()]:
        if name not in valid:
            raise UserError(f"unknown target or op '{name}'{nearest(name, valid)}")
    found = entries(ops)
    work = [(t, e) for t in targets or TARGETS for e in found if applies(e, t)]
    if sample:
        first = {(t, e.op, id(e.kernel)): e for t, e in reversed(work)}
        work = [(t, e) for t, e in work if t == GATED or first[t, e.op, id(e.kernel)] is e]
    results = []
    with tqdm(total=len(work), desc="compiling", file=sys.stderr, unit="kernel", disable=None) as bar:
        for done in compile_all(work, jobs=min(os.cpu_count() or 1, len(work))):
            results.append(done)
            bar.update()
            bar.set_postfix_str(f"{done} {done.seconds:.1f} s", refresh=False)
    order = {(e.op, e.name): i for i, e in enumerate(found)}
    return sorted(results, key=lambda r: (order[r.op, r.name], list(TARGETS).index(r.target)))


def rows(results: Sequence[Compiled]) -> list[dict[str, Any]]:
    return [asdict(r) for r in results]


def table(results: Sequence[Compiled]) -> str:
    lines = [
        "| op | configuration | target | warps | stages | registers | spilled B | shared B | matrix instructions | remarks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        products = ", ".join(f"{n} {word}" for word, n in r.products.items()) or "none"
        remarks = "; ".join([*(f"**{p}**" for p in r.problems), *r.remarks])
        cells = (r.op, r.name, r.target, r.warps, r.stages, r.registers, r.spill, r.shared, products, remarks)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def failures(results: Sequence[Compiled]) -> list[str]:
    """One line per configuration that does not pass the gate."""
    return [f"{r}: {'; '.join(r.problems)}" for r in results if r.problems]
