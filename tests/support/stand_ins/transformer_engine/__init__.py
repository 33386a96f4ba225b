"""TransformerEngine 2.8 as megatron-core sees it, 0.16 to 0.19, with plain torch inside.

Its modules have the names, shapes, dtypes, attributes and extra states of TransformerEngine's own,
and take the arguments that Megatron gives them; its Adam keeps what TransformerEngine's does, in
the same place. What a test proves with them is that names fit: weights are found, exported,
converted, saved and resumed. It proves nothing of TransformerEngine's kernels. Left out is what is
not used without FP8: recipes, user buffers, fused operations, CUDA graphs.

Megatron decides at its import whether TransformerEngine is there. So this directory's parent may be
on the path of processes that are a test's own, and of no others (`support.apart`).
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.8.0"
