"""Tasks that are drawn, not read: each tests one ability of a memory, and a program knows every answer."""

import importlib

from data.errors import DataError, nearest
from data.synthetic.task import Task

# To add a task: write its file, add its line here.
TASKS = {
    "dual_process": "data.synthetic.dual_process:DualProcess",
    "flip_flop": "data.synthetic.flip_flop:FlipFlop",
    "listops": "data.synthetic.listops:ListOps",
    "mqar": "data.synthetic.mqar:MQAR",
    "path_star": "data.synthetic.path_star:PathStar",
    "word_problem": "data.synthetic.word_problem:WordProblem",
}


def task_class(kind: str) -> type[Task]:
    """The settings of a kind of task; DataError names the nearest for an unknown one."""
    if not isinstance(kind, str) or kind not in TASKS:
        raise DataError(f"data.synthetic.kind: unknown task {kind!r}; {nearest(str(kind), TASKS)}")
    module, _, name = TASKS[kind].partition(":")
    return getattr(importlib.import_module(module), name)
