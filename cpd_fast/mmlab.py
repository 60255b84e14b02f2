"""Importing this module puts our losses into the registries of MMEngine, mmseg and mmrazor: for a config's one line.

``custom_imports = dict(imports=["cpd_fast.mmlab"], allow_failed_imports=False)``

From there on ``type="ChannelWiseDivergence"`` builds the fused loss. In a script call
:func:`cpd_fast.losses.register_all`, which this module calls.
"""

from cpd_fast.losses import register_all

registered = register_all()
