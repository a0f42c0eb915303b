"""Tasks that are drawn, not read: each tests one ability of a memory, and a program knows every answer."""

import importlib

from data.errors import DataError, nearest
from data.synthetic.task import Task

# To add a task: write its file, add its line here.
TASKS = {
    "common_words": "data.synthetic.counting:CommonWords",
    "copying": "data.synthetic.copying:Copying",
    "dual_process": "data.synthetic.dual_process:DualProcess",
    "flip_flop": "data.synthetic.flip_flop:FlipFlop",
    "frequent_words": "data.synthetic.counting:FrequentWords",
    "induction": "data.synthetic.induction:Induction",
    "listops": "data.synthetic.listops:ListOps",
    "mqar": "data.synthetic.mqar:MQAR",
    "needle": "data.synthetic.needle:Needle",
    "path_star": "data.synthetic.path_star:PathStar",
    "selective_copying": "data.synthetic.copying:SelectiveCopying",
    "variable_tracking": "data.synthetic.variables:VariableTracking",
    "word_problem": "data.synthetic.word_problem:WordProblem",
}


def task_class(kind: str) -> type[Task]:
    """The settings of a kind of task; DataError names the nearest for an unknown one."""
    if not isinstance(kind, str) or kind not in TASKS:
        raise DataError(f"data.synthetic.kind: unknown task {kind!r}; {nearest(str(kind), TASKS)}")
    module, _, name = TASKS[kind].partition(":")
    return getattr(importlib.import_module(module), name)
