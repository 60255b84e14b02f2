"""Staying within the memory of one card: predicted on fake tensors, kept by micro-batches and checkpoints."""

from cpd_fast.memory.batches import BatchLoss, Closure, Part, Split, count_samples, first_part, parts_of, split_batch
from cpd_fast.memory.tensors import RESERVE, PeakMemory, bytes_text, device_of, faked, parse_bytes, size_of
from cpd_fast.memory.training import HalfPrecision, MemoryChoice, MemoryFit, blocks_of, checkpointed, fit_memory

__all__ = [
    "RESERVE",
    "BatchLoss",
    "HalfPrecision",
    "MemoryChoice",
    "MemoryFit",
    "Closure",
    "Part",
    "PeakMemory",
    "Split",
    "blocks_of",
    "bytes_text",
    "checkpointed",
    "count_samples",
    "device_of",
    "faked",
    "first_part",
    "fit_memory",
    "parse_bytes",
    "parts_of",
    "size_of",
    "split_batch",
]
