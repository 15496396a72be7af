"""scripts/fuzz.py knows values of every field, right and wrong ones."""

from __future__ import annotations

import json
import random

import fuzz
import pytest


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
