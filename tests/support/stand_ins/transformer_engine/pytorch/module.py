"""Linear layers and norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.extra_state import WithExtraState


class RMSNorm(WithExtraState):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,  # its name before
        device: torch.device | str | int = "cuda",
    ):
        super().__init__()
        assert not zero_centered_gamma and (normalized_shape is None) != (hidden_size is None)
        self.eps = eps
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = _norm_weight(size, params_dtype, device, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LayerNorm(WithExtraState): ...


def _norm_weight(size: int, dtype, device, sequence_parallel) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=dtype, device=device))
    weight.sequence_parallel = sequence_parallel
    return weight


class _Linear(WithExtraState):
    """What the linear layers have in common: their parallel sizes, and how a parameter is made."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        tp_group,
        tp_size: int,
        init_method: Callable | None,
        params_dtype: torch.dtype | None,
        parallel_mode: str | None,
        device,
    ):
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        if parallel_mode == "row":
            self.in_features //= self.tp_size
        self._init_method = init_method
        self._place = {"dtype": params_dtype, "device": device}

    def _new_weight(self) -> torch.nn.Parameter:
        shape = self.out_features, self.in_features
        weight = torch.nn.Parameter(torch.empty(shape, **self._place))
        if self._init_method is not None:
            self._init_method(weight)
        return _sharded(weight, 1 if self.parallel_mode == "row" else 0)

    def _new_bias(self) -> torch.nn.Parameter:
        bias = torch.nn.Parameter(torch.zeros(self.out_features, **self._place))
        if self.parallel_mode == "column":
            return _sharded(bias, 0)
        bias.sequence_parallel = self.sequence_parallel
        return bias


def _sharded(parameter: torch.nn.Parameter, dim: int) -> torch.nn.Parameter:
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.partition_stride = dim, 1
    return parameter


class Linear(_Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str | int = "cuda",
        rng_tracker_name: str | None = None,
        ub_name: str | None = None,
    ):
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, init_method,
            params_dtype, parallel_mode, device,
        )  # fmt: skip
        self.use_bias, self.return_bias = bias, return_bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.weight = self._new_weight()
        self.bias = self._new_bias() if bias else torch.empty(0, **self._place)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None):
        from megatron.core import tensor_parallel as tp  # which imports this module

        parallel, group = self.tp_size > 1, {"group": self.tp_group}
        if parallel and self.parallel_mode == "column" and self.sequence_parallel:
            x = tp.gather_from_sequence_parallel_region(x, **group)
        elif parallel and self.parallel_mode == "column":
            x = tp.copy_to_tensor_model_parallel_region(x, **group)
        fused = self.fuse_wgrad_accumulation and self.weight.requires_grad
        y = _AddsToMainGrad.apply(x, self.weight) if fused else F.linear(x, self.weight)
        if parallel and self.parallel_mode == "row" and self.sequence_parallel:
            y = tp.reduce_scatter_to_sequence_parallel_region(y, **group)
        elif parallel and self.parallel_mode == "row":
            y = tp.reduce_from_tensor_model_parallel_region(y, **group)
        if self.return_bias:
            return y, self.bias
        return y + self.bias if self.use_bias else y


class _AddsToMainGrad(torch.autograd.Function):
    """A linear layer whose weight's gradient is added to `main_grad`; autograd sees a dummy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # saved tensors have no attributes
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        product = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        ctx.weight.main_grad += product
        ctx.weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)  # that nobody may add


class LayerNormLinear(Linear):
    """Its parameters are registered norm first, so that they come in that order everywhere."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **options,
    ):
        assert (
            normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        )
        super().__init__(in_features, out_features, **options)
        self.eps = eps
        weight = _norm_weight(in_features, **self._place, sequence_parallel=self.sequence_parallel)
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update(layer_norm_weight=weight, **others)
        self.layer_norm_bias = None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None):
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class GroupedLinear(_Linear):
    """One weight for each expert: `weight0`, `weight1`, …"""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str | int = "cuda",
        ub_name: str | None = None,
    ):
        assert not bias
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, init_method,
            params_dtype, parallel_mode, device,
        )  # fmt: skip
        self.num_gemms, self.use_bias = num_gemms, bias
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", self._new_weight())

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None):
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms, m_splits
        parts = zip(x.split(m_splits), self.parameters(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])


class Fp8Padding(torch.nn.Module): ...


class Fp8Unpadding(torch.nn.Module): ...
