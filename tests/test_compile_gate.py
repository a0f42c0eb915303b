"""Every kernel configuration compiles ahead of time for GPUs that are not here, and passes the gate on sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import compilation
from kernels.compilation import GATED, TARGETS, Compilation, Compiled

ROOT = Path(__file__).resolve().parent.parent


def _bench(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter; what is compiled is kept in .cache from one run of the suite to the next."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton"), **env}
    command = [sys.executable, "-m", "bench", "kernels", "--compile-only", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_configuration_passes_the_gate(tmp_path: Path):
    """On sm_90 all of them; on the other targets one of each kernel, which has to compile."""
    pytest.importorskip("triton")
    done = _bench("--sample", "--out", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["op"] for row in rows} == set(compilation.with_triton())
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["registers"] > 0
        if row["target"] == GATED:
            assert row["spill"] == 0
            assert row["shared"] <= 227 * 1024
        assert f"| {row['op']} | {row['name']} | {row['target']} |" in done.stdout


def test_an_unknown_target_and_an_interpreting_process_are_refused():
    done = _bench("--targets", "sm_91")
    assert done.returncode == 2
    assert "sm_91" in done.stderr
    assert "sm_90" in done.stderr
    done = _bench(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


BAD = """
import sys, types
import torch, triton
import triton.language as tl
from kernels import compilation

@triton.jit
def product(x, y, out, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + n[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    tl.store(out + n[:, None] * N + n[None, :], tl.dot(a, b))

def entries():
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    plain = {"N": 64, "K": 64, "num_warps": 4, "num_stages": 2}
    for name, change in {
        "good": {}, "thin": {"N": 16}, "broken": {"N": 24}, "deep": {"K": 1024}, "crowded": {"N": 128, "maxnreg": 96}
    }.items():
        yield compilation.Compilation("bad", name, product, (x, x, x), {**plain, **change})
    yield compilation.Compilation("bad", "meant to be thin", product, (x, x, x), {**plain, "N": 16}, wgmma=False)

module = types.ModuleType("kernels.bad.triton")
module.compilations = entries
sys.modules["kernels.bad"] = types.ModuleType("kernels.bad")
sys.modules["kernels.bad.triton"] = module
work = [(target, e) for target in ("sm_90", "sm_80") for e in compilation._of("bad")]
for r in compilation.compile_all(work, jobs=1):
    print(r.target, r.name, "|", r.problems, r.remarks, r.products)
"""


def test_the_gate_names_what_is_wrong(tmp_path: Path):
    """Spills, too much shared memory, no wgmma, and what the compiler refuses."""
    pytest.importorskip("triton")
    file = tmp_path / "bad.py"
    file.write_text(BAD)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert said["sm_90 good"].startswith("() ()")
    assert "wgmma" in said["sm_90 good"]
    assert "no wgmma" in said["sm_90 thin"]
    assert said["sm_90 meant to be thin"].startswith("() ()")
    assert "does not compile" in said["sm_90 broken"]
    assert "262144 bytes of shared memory of 232448" in said["sm_90 deep"]
    assert "spills" in said["sm_90 crowded"]
    # Elsewhere only what does not compile fails; the rest is a remark.
    assert said["sm_80 thin"].startswith("() ()")
    assert "does not compile" in said["sm_80 broken"]
    assert said["sm_80 crowded"].startswith("() ('spills")


def test_names_of_configurations_are_unique_and_targets_known():
    pytest.importorskip("triton")
    for entry in compilation.entries():
        assert isinstance(entry, Compilation)
        assert entry.targets is None or set(entry.targets) <= set(TARGETS), entry.name
        for arg in entry.args:
            assert not isinstance(arg, torch.Tensor) or arg.device.type in ("meta", "cpu")
    with pytest.raises(ValueError, match="no op 'nothing'"):
        compilation.entries(["nothing"])


def test_a_result_says_what_and_where():
    assert str(Compiled("op", "name", "sm_90", 4, 2)) == "op name on sm_90"
