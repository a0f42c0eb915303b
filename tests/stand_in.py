"""Questions on runs of 12 steps that a stand-in for `train.py` makes in milliseconds; the fixture ``stand_in`` puts it there."""

from __future__ import annotations

import csv
from pathlib import Path

from eval import ablation_report
from tests.runs import write_config

PLOTS = {
    name: getattr(ablation_report, name) for name in ("plot_quality", "plot_losses", "plot_curves")
}  # a second each

# `optim.lr` is what a variant is worth, in nats; `train.sample_prompt` tells a process what to do, or that only the distance to X
# counts ("best X", and "best X crash", which crashes there).
STAND_IN = """
import json, os, random, signal, sys, time
from pathlib import Path
import yaml

if sys.argv[1] == "--resume":
    run = Path(sys.argv[2])
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    for word in sys.argv[3:]:
        key, _, value = word.partition("=")
        section, name = key.split(".")
        cfg[section][name] = yaml.safe_load(value)
    start = max(int(p.name[5:]) for p in (run / "checkpoints").iterdir())
else:
    cfg = yaml.safe_load(Path(sys.argv[1]).read_text())
    run, start = Path(cfg["out_dir"]) / cfg["name"], 0
    run.mkdir(parents=True)
(run / "config.yaml").write_text(yaml.safe_dump(cfg))
(run / "processes").open("a").write(f"{os.getpid()} {start} {os.environ['OMP_NUM_THREADS']}\\n")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
task, worth, steps = cfg["train"]["sample_prompt"], cfg["optim"]["lr"], cfg["train"]["steps"]
if task.startswith("best "):
    worth = abs(worth - float(task.split()[1]))
loss = worth + random.Random(cfg["seed"]).gauss(0, 1) + random.Random(f"{cfg['seed']} {worth}").gauss(0, 0.01)
for step in range(start + 1, steps + 1):
    line = {"step": step, "tokens": 256 * step, "loss": loss + 1 / step, "tokens_per_s": 1000.0 + step}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")
        if step == steps:
            end = None if task in ("diverge", f"diverge {cfg['seed']}") else loss
            pairs = {n: {"accuracy": worth * n} for n in (4, 8)}
            val = {"loss": end, "by": {"x": {"n": 2}, "pairs": pairs}}
            file.write(json.dumps({"step": step, "tokens": 256 * step, "val": val}) + "\\n")
    if step % 4 == 0 or stop:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    if stop:
        sys.exit(0)
    if step == {"crash": 6, "crash early": 2}.get(task) or (task.endswith(" crash") and worth == 0 and step == 6):
        print("warning: this looks bad\\nerror: out of luck")
        sys.exit(2)
    if task == "die" and step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05 if task == "slow" else 0)
facts = {"finished": True, "peak_memory_bytes": 2**20 * (7 + cfg["seed"]), "device": "a machine", "threads": 1}
(run / "environment.json").write_text(json.dumps(facts))
"""


def write_question(folder: Path, variants: str, more: str = "", **sections: dict) -> Path:
    """A question on a run of 12 steps, in ``folder/asked.py``."""
    base = write_config(folder, **sections)
    path = folder / "asked.py"
    path.write_text(
        '"""Does it matter?"""\n'
        "from configs.question import Curve, Metric, Question, Sweep, Variant\n"
        f"question = Question(base={str(base)!r}, baseline='a', variants={{'a': Variant(), {variants}}}, {more})\n"
    )
    return path


def processes(run: Path) -> list[int]:
    """At which step each process of a run began."""
    return [int(line.split()[1]) for line in (run / "processes").read_text().splitlines()]


def value(runs: Path, metric: str, variant: str, column: str) -> str:
    with (runs / "report" / "report.csv").open() as file:
        (row,) = [r for r in csv.DictReader(file) if (r["metric"], r["variant"]) == (metric, variant)]
    return row[column]
