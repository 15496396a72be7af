"""scripts/fuzz.py knows values of every field, right and wrong ones."""

from __future__ import annotations

import json
import random

import fuzz
import pytest
import soak


@pytest.mark.parametrize("field", fuzz.DRAWN, ids=lambda field: field.name)
def test_every_field_that_is_drawn_has_values(field):
    for seed in range(20):
        for values in (fuzz.allowed_values, fuzz.wrong_values):
            json.dumps(values(field, random.Random(seed)))


def test_a_thousand_wishes_can_be_made():
    wishes = [fuzz.make_wish(random.Random(seed)) for seed in range(1000)]
    named = {name for wish in wishes for name in wish.values}
    assert {"traceparent", "user", "guided_decoding_guide", "max_tokens"} <= named
    assert 50 < sum(bool(wish.wrong) for wish in wishes) < 950


@pytest.mark.parametrize(("times", "stands_still"), [([0, 5, 10, 30, 41], False), ([0, 5, 41], True)])
def test_a_soak_that_stands_still_is_told(times, stands_still):
    """Samples every 5 s; an answer comes at each of the times."""
    samples = [{"at": at, "answers": sum(one <= at for one in times)} for at in range(0, 45, 5)]
    report = fuzz.Report(0)
    soak.judge_standstills(samples, report)
    assert bool(report.failures) == stands_still
