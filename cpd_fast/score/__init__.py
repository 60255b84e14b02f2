"""How important each channel is: second order, first order, or from the weights alone."""

from cpd_fast.score._finite import Step
from cpd_fast.score._in_training import InTraining
from cpd_fast.score._memory import Fitter
from cpd_fast.score.criterion import Context, Criterion, quiet
from cpd_fast.score.gates import GateHessian, GroupFisher
from cpd_fast.score.gradients import Taylor
from cpd_fast.score.hessian import HessianTrace
from cpd_fast.score.score import merge_scores, score
from cpd_fast.score.weights import BNScale, Magnitude, Random

__all__ = [
    "BNScale",
    "Context",
    "Criterion",
    "Fitter",
    "GateHessian",
    "GroupFisher",
    "HessianTrace",
    "InTraining",
    "Magnitude",
    "Random",
    "Step",
    "Taylor",
    "merge_scores",
    "quiet",
    "score",
]
