"""The papers as recipes: each wires the stages in its paper's order and leaves a resumable run folder."""

from cpd_fast.recipes.auto import auto
from cpd_fast.recipes.comb_prune_distill import cpd
from cpd_fast.recipes.eagleeye import eagleeye
from cpd_fast.recipes.evaluate import Quality, evaluate
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.prune_then_distill import prune_then_distill
from cpd_fast.recipes.run import Result
from cpd_fast.recipes.run_folder import RunFolder
from cpd_fast.recipes.tasks import TASKS, Task, builtin

__all__ = [
    "TASKS",
    "Quality",
    "Result",
    "RunFolder",
    "Talk",
    "Task",
    "auto",
    "builtin",
    "cpd",
    "eagleeye",
    "evaluate",
    "prune_then_distill",
]
