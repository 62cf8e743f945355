"""Ranges of options: one table, for every command and for Python."""

import dataclasses
import math
import pkgutil
import typing

import pytest

from segvit import commands
from segvit.cli import COMMANDS
from segvit.options import InferenceOptions, Range, TrainConfig, check_ranges

CLASSES = [options for options, _ in COMMANDS.values()]


def required(options):
    return {
        field.name: ["x"] if "list" in str(field.type) else "x"
        for field in dataclasses.fields(options)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def numbers():
    for options in CLASSES:
        hints = typing.get_type_hints(options)
        for field in dataclasses.fields(options):
            members = {hints[field.name], *typing.get_args(hints[field.name])}
            members |= {kind for member in list(members) for kind in typing.get_args(member)[:1]}
            if typing.get_origin(hints[field.name]) is dict or "dict" in str(hints[field.name]):
                continue
            if members & {int, float}:
                yield pytest.param(
                    options, field.name, hints[field.name], id=f"{options.__name__}.{field.name}"
                )


def several(hint):
    members = (hint, *typing.get_args(hint))
    return next((m for m in members if typing.get_origin(m) in (list, tuple)), None)


@pytest.mark.parametrize(("options", "name", "hint"), list(numbers()))
def test_no_number_is_nan_infinite_or_no_number(options, name, hint):
    given = required(options)
    options(**given)  # the defaults themselves are in range
    wrong = [math.nan, math.inf, -math.inf, "1.5", True, 1 << 70]
    if float not in (hint, *typing.get_args(hint), *typing.get_args(several(hint))):
        wrong.append(1.5)
    for value in wrong:
        if value == 1 << 70 and 1.5 not in wrong:
            continue  # a float may be as large
        made = [value, value] if several(hint) else value
        with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*expected"):
            options(**{**given, name: made})


@pytest.mark.parametrize(
    "name",
    ["clip", "lr", "decoder_lr_scale", "similarity_gain", "max_minutes", "class_share", "ema", "layer_decay"],
)
def test_zero_and_negative_ruin_a_run(name):
    for value in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"^{name}: got {value}, expected more than 0"):
            TrainConfig(data="x", out="x", **{name: value})


def test_none_and_words_where_they_may_be():
    TrainConfig(data="x", out="x", clip=None, keep_checkpoints="all", class_weights="inverse-sqrt")
    with pytest.raises(ValueError, match=r"^keep_checkpoints: got 'some', expected all or at least 1"):
        TrainConfig(data="x", out="x", keep_checkpoints="some")
    with pytest.raises(ValueError, match=r"^precision: got 'fp8', expected 32 or bf16 or fp16$"):
        TrainConfig(data="x", out="x", precision="fp8")
    with pytest.raises(ValueError, match=r"^class_weights: got \(1.0, -1.0\)"):
        TrainConfig(data="x", out="x", class_weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"^flip: got 'no', expected True or False$"):  # it would be true
        InferenceOptions(flip="no")
    with pytest.raises(ValueError, match=r"^reduce_zero_label: got 'no', expected True or False or auto$"):
        TrainConfig(data="x", out="x", reduce_zero_label="no")
    assert InferenceOptions(scales=(1.0,)) == InferenceOptions()
    with pytest.raises(TypeError, match=r"^scales: got 1\.0, expected a list of numbers"):
        InferenceOptions(scales=1.0)
    config = TrainConfig(data="x", out="x")
    config.lr = -1.0  # after it was made: training looks again
    with pytest.raises(ValueError, match=r"lr: got -1\.0"):
        check_ranges(config)


def test_range_in_words():
    assert str(Range(more_than=0, at_most=1)) == "more than 0 and at most 1"
    assert str(Range()) == "a finite number"
    assert 0 not in Range(more_than=0) and 1 in Range(at_most=1) and 2 not in Range(at_most=1)


def test_every_command_is_a_module_and_every_module_a_command():
    modules = {module.name.replace("_", " ") for module in pkgutil.iter_modules(commands.__path__)}
    assert modules - {"parser"} == set(COMMANDS)
