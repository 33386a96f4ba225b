"""Names in annotations of Megatron's fused MLP."""

import torch


class FusibleOperation(torch.nn.Module): ...


class Sequential(torch.nn.Sequential): ...
