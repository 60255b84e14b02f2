"""Candidate search: plans on a target's limit, adaptive batch norm, and a study that many processes can share."""

from cpd_fast.search.calibration import PAPER_BATCHES, PAPER_MOMENTUM, Batch, adapt_batch_norm, match_means, materialise
from cpd_fast.search.candidates import CandidateBuilder
from cpd_fast.search.result import Candidate, SearchResult
from cpd_fast.search.search import search

__all__ = [
    "PAPER_BATCHES",
    "PAPER_MOMENTUM",
    "Batch",
    "Candidate",
    "CandidateBuilder",
    "SearchResult",
    "adapt_batch_norm",
    "match_means",
    "materialise",
    "search",
]
