"""The class of tensors in FP8, of which there are none."""


class QuantizedTensor: ...
