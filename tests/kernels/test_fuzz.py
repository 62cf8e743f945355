"""Random calls of every operator: see operator_fuzz.py. ``SEGVIT_FUZZ_EXAMPLES=100000`` makes them many."""

import os

import operator_fuzz
import pytest

from segvit_kernels import _library

EXAMPLES = int(os.environ.get("SEGVIT_FUZZ_EXAMPLES", "150"))
BACKENDS = ["eager", *(["cpu"] if _library.why_not("cpu", "cpu") is None else [])]


@pytest.mark.parametrize("operator", operator_fuzz.OPERATORS)
def test_fuzz(operator):
    total, seed = 0, 0
    while total < EXAMPLES / len(operator_fuzz.OPERATORS):
        try:
            total += operator_fuzz.run(operator, seed, BACKENDS)
        except AssertionError as error:
            pytest.fail(f"operator_fuzz.run({operator!r}, {seed}, {BACKENDS}): {error}", pytrace=False)
        seed += 1


@pytest.mark.parametrize("operator", operator_fuzz.OPERATORS)
def test_fuzz_in_the_interpreter(operator):
    if reason := _library.why_not("triton", "cpu"):
        pytest.skip(reason)
    for seed in range(10**6, 10**6 + max(1, EXAMPLES // 500)):
        operator_fuzz.run(operator, seed, ["triton"])


def test_wrong_values_are_found(monkeypatch):
    """A hundredth off, an argument written to, a number where there is none, a wrong option let through."""
    kernels, right = operator_fuzz.kernels, operator_fuzz.kernels.query_attention

    def off(query, key, value, **options):
        return right(query, key, 1.01 * value, **options)

    def writes(query, key, value, **options):
        value.detach().zero_()
        return right(query, key, value, **options)

    def hides(query, key, value, **options):
        return right(query.nan_to_num(), key.nan_to_num(), value.nan_to_num(), **options)

    def careless(query, key, value, dropout_p=0.0, **options):
        return right(query, key, value, dropout_p=dropout_p if dropout_p == 0.5 else 0.0, **options)

    for wrong, message in (
        (off, "error"),
        (writes, "error|was changed"),
        (hides, "finite where"),
        (careless, "wrong dropout_p is not refused"),
    ):
        monkeypatch.setattr(kernels, "query_attention", wrong)
        with pytest.raises(AssertionError, match=message):
            for seed in range(400):
                try:
                    operator_fuzz.run("query_attention", seed, ["eager"])
                except AssertionError as error:
                    if message not in str(error) and "|" not in message:
                        continue
                    raise


def dies_at_seed_two(operator, seed, backends):
    return os._exit(3) if seed == 2 else 1


def test_crashes_are_attributed():
    """A process that dies is named by its call, and the rest goes on."""
    total, faults = operator_fuzz.many(4, ["eager"], ["mask_loss"], 0, 300, dies_at_seed_two)
    assert total >= 4 and faults == ["mask_loss 2: the process died, exit code 3"]
