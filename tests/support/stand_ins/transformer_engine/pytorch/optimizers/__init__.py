"""Adam, and the functions over lists of tensors that Megatron takes from here."""

from __future__ import annotations

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its updates in the parameter group, in an integer, from the first one on.

    Its states have `exp_avg` and `exp_avg_sq`, and no count.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        assert adam_w_mode and not capturable
        super().__init__(
            params,
            dict(
                lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                weight_decay=weight_decay,
            ),
        )  # fmt: skip

    def load_state_dict(self, state_dict) -> None:
        """Take what is there as it is; `setdefault` is torch's habit, not this one's."""
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if parameter.grad is not None:
                    _adam(
                        parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"],
                        group["lr"], *group["betas"], group["eps"], group["step"],
                        group["bias_correction"], group["weight_decay"],
                    )  # fmt: skip


def _adam(
    parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: float, beta1: float,
    beta2: float, eps: float, step: int, bias_correction: bool, weight_decay: float,
) -> None:  # fmt: skip
    """What the kernel does, to one tensor."""
    assert type(step) is int, f"incompatible function arguments: step is {step!r}"
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + eps)
    parameter.sub_(update + weight_decay * parameter, alpha=lr)


class FusedSGD(torch.optim.SGD): ...


def multi_tensor_applier(operation, noop_flag: Tensor, tensor_lists: list, *args):
    return operation(2048 * 32, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(_chunk: int, _noop_flag: Tensor, tensor_lists: list, per_tensor: bool):
    norms = torch.stack([tensor.norm() for tensor in tensor_lists[0]])
    return norms.norm()[None], norms if per_tensor else None


def multi_tensor_scale(_chunk: int, _noop_flag: Tensor, tensor_lists: list, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)
