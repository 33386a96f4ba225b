"""Private and internal parts of libraries, one function or class each.

Each says what it needs, why nothing public does it, and for which version it was written. All of
them are called by `tests/test_compat.py`: after an upgrade that file fails first.

    torch_internals     imports torch alone
    megatron_internals  imports Megatron-core, which takes seconds

Private parts of SGLang are in `serving/identity.py` and `serving/hidden_states.py`. Megatron on a
machine without CUDA is `parallel/platform.py`, where names of Megatron are replaced, too.
"""
