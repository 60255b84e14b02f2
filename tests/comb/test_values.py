"""What a trace knows of values must be of the tensor that is asked for."""

import torch

from cpd_fast.comb.values import Values


def test_a_tensor_that_is_dropped_leaves_nothing_to_the_next_one():
    """A forward may replace a buffer; the next tensor may get its id, and a value its address."""
    values = Values()
    for i in range(200):
        dropped = torch.empty(3, device="meta")
        values.set(dropped, torch.full((3,), float(i)))
        del dropped
        fresh = torch.empty(3, device="meta")
        assert values.of(fresh) is None
        values.set(fresh, torch.zeros(3))
        values.forget(fresh)
    assert len(values._known) == 200
