"""The simulator of many replicas: its arithmetic where it can be done by hand, and what it is for."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import table
from simulation import needed, simulate
from step_times import PARTS, StepTimes, fit
from traffic import Arrival, Traffic, prompt_ids, read_trace

SETTINGS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_blocks": 256,
    "block_size": 16,
    "max_model_len": 512,
}


def step_times(**seconds: float) -> StepTimes:
    return StepTimes([seconds.get(part.replace(" ", "_"), 0.0) for part in PARTS], SETTINGS)


TEN_MS = step_times(step=0.010)


def test_a_request_alone_takes_its_steps():
    (life,) = simulate(TEN_MS, [Arrival(1.0, 200, 10)], 1, "round-robin").lives
    assert life.ttft == pytest.approx(0.040), "200 tokens in steps of 64"
    assert life.tpot == pytest.approx(0.010) and life.num_tokens == 10


def test_prompts_that_no_context_holds_are_refused():
    too_long, fits = simulate(TEN_MS, [Arrival(0, 512, 4), Arrival(0, 511, 4)], 1, "round-robin").lives
    assert too_long.is_refused and not fits.is_refused and fits.num_tokens == 1


def test_who_comes_during_a_step_is_in_the_next():
    both = [Arrival(1.0, 10, 20), Arrival(1.004, 10, 5)]
    first, second = simulate(TEN_MS, both, 1, "round-robin").lives
    assert first.ttft == pytest.approx(0.010) and second.ttft == pytest.approx(0.006 + 0.010)


def test_each_part_costs_what_it_costs():
    times = step_times(step=0.001, token=0.0001, sampled=0.002, decoded_key=0.00001)
    (life,) = simulate(times, [Arrival(0.0, 50, 2)], 1, "round-robin").lives
    assert life.ttft == pytest.approx(0.001 + 50 * 0.0001 + 0.002)
    assert life.tpot == pytest.approx(0.001 + 0.0001 + 0.002 + 51 * 0.00001)


@pytest.mark.parametrize("routing", ["round-robin", "least-open", "prefix"])
@given(st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=15)
def test_everything_is_answered_and_nothing_before_its_time(routing, replicas, seed):
    arrivals = Traffic(20.0, 4.0, (1, 300), (1, 60), 3, 100).arrivals(3.0, seed)
    found = simulate(step_times(step=0.005, token=0.0002), arrivals, replicas, routing)
    assert sum(life.num_tokens for life in found.lives) == sum(one.answer_tokens for one in arrivals)
    assert all(life.is_done and not life.is_refused and life.ttft >= 0.005 for life in found.lives)
    assert sorted(life.arrived for life in found.lives) == [one.at for one in arrivals]


def test_prompts_that_begin_alike_find_their_cache():
    traffic = Traffic(30.0, prompt=(220, 240), answer=(2, 4), prefixes=24, prefix_tokens=208)
    arrivals = traffic.arrivals(20.0)
    rates = {
        routing: simulate(TEN_MS, arrivals, 4, routing).hit_rate for routing in ("round-robin", "prefix")
    }
    assert rates["prefix"] > 1.1 * rates["round-robin"] > 0


def test_prompts_share_what_they_are_told_to():
    one, two = (prompt_ids(Arrival(0, 100, 1, "a", 60), number) for number in (1, 2))
    other = prompt_ids(Arrival(0, 100, 1, "b", 60), 1)
    assert len(one) == 100 and one[:60] == two[:60] and one[60] != two[60] and one[0] != other[0]
    assert len(prompt_ids(Arrival(0, 10, 1, "a", 60), 1)) == 10


def test_the_fewest_replicas_that_keep_the_limits():
    arrivals = Traffic(40.0, prompt=(32, 64), answer=(30, 40)).arrivals(20.0)
    found = needed(TEN_MS, arrivals, "least-open", 0.2, 0.02)
    assert found is not None and found.replicas > 1
    fewer = simulate(TEN_MS, arrivals, found.replicas - 1, "least-open")
    assert found.keeps(0.2, 0.02) and not fewer.keeps(0.2, 0.02)
    assert needed(step_times(step=1.0), arrivals[:5], "least-open", 0.2, 0.02) is None
    assert f"| {found.replicas} | least-open |" in table([found])


@given(st.lists(st.floats(1e-7, 1e-2), min_size=len(PARTS), max_size=len(PARTS)), st.integers(0, 99))
@settings(max_examples=30)
def test_the_fit_finds_what_made_the_times(seconds, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 100, (200, len(PARTS))).astype(float)
    rows[:, 0] = 1
    found, error = fit(rows, rows @ seconds)
    assert error < 1e-6 and np.allclose(found, seconds, rtol=1e-3, atol=1e-9)


def test_no_part_of_a_step_is_negative():
    rng = random.Random(1)
    rows = np.array([[1.0, n, max(0, n - 16), max(0, n - 64), 1, 5 * n, 0] for n in range(1, 200)])
    times = np.array([0.01 + 0.0001 * row[1] * rng.uniform(0.8, 1.2) for row in rows])
    found, error = fit(rows, times)
    assert min(found) >= 0 and found[-1] == 0 and error < 0.2


def test_bursts_have_the_same_mean():
    with pytest.raises(ValueError, match="burst"):
        Traffic(1.0, 10.0)
    for burst in (1.0, 5.0, 9.0):
        for rate in (1.0, 40.0):
            arrivals = Traffic(rate, burst).arrivals(20_000 / rate)
            assert len(arrivals) == pytest.approx(20_000, rel=0.05), (rate, burst)
            in_burst = sum(one.at % 10 < 1 for one in arrivals)
            assert in_burst == pytest.approx(burst / 10 * len(arrivals), rel=0.05)


def test_a_recorded_trace_is_read_or_refused_by_its_line(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,answer_tokens,prefix,prefix_tokens\n2.5,10,20,,\n1,30,4,a,16\n")
    assert read_trace(file) == [Arrival(1.0, 30, 4, "a", 16), Arrival(2.5, 10, 20)]
    for row in ("1,many,4", "1,2", "x,2,3", "-1,2,3", "1,0,3", "nan,2,3"):
        file.write_text(f"arrival_s,prompt_tokens,answer_tokens\n1,2,3\n{row}\n")
        with pytest.raises(ValueError, match="line 3"):
            read_trace(file)


def test_step_times_are_kept_as_json(tmp_path):
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"machine": {}, "step_times": TEN_MS.as_json()}))
    assert StepTimes.read(file) == TEN_MS
    file.write_text("{}")
    with pytest.raises(ValueError, match="--step-times"):
        StepTimes.read(file)
