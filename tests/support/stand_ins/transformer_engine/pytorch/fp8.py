"""Is FP8 on? It is not."""

from contextlib import nullcontext


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def with_fp8_parameters() -> bool:
        return False


def fp8_autocast(enabled: bool = False, **_):
    assert not enabled
    return nullcontext()


def fp8_model_init(enabled: bool = False, **_):
    assert not enabled
    return nullcontext()
