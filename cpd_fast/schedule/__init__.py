"""Which channels go: exact costs, global ranking under a target, candidates of a search, the ramp of a pruning run."""

from cpd_fast.schedule.candidates import CandidateSpace
from cpd_fast.schedule.cost import plan_cost
from cpd_fast.schedule.greedy import Greedy
from cpd_fast.schedule.match import match_plan
from cpd_fast.schedule.one_group import OneGroup
from cpd_fast.schedule.plan import holds, plan, random_plan, uniform_plan

__all__ = [
    "CandidateSpace",
    "Greedy",
    "OneGroup",
    "holds",
    "match_plan",
    "plan",
    "plan_cost",
    "random_plan",
    "uniform_plan",
]
