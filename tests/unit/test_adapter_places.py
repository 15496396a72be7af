"""Adapters between the scheduler's decisions: places, who waits for one, and where adapters come from."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from context_runner import expected_tokens
from pagetide.engine.adapters import Adapter, AdapterFolder, AdapterPlaces, NoAdapters
from pagetide.types import RequestError
from small_engine import SmallEngine


def test_each_request_has_its_own_adapter():
    small = SmallEngine(max_loras=4)
    for number in range(5):
        small.add(number, [1, 2, 3], max_tokens=9, lora_name=str(number or ""))
    small.run()
    for number in range(5):
        assert small.tokens(number) == expected_tokens([1, 2, 3], 9, 0, adapter=number)


def test_prompts_of_different_adapters_share_no_cached_blocks():
    small = SmallEngine(max_loras=4)
    prompt = list(range(20))
    for number, name in enumerate(["", "1", "2", "1"]):
        small.add(number, prompt, max_tokens=2, lora_name=name)
        small.run()
    assert [small.outputs[-1].num_cached_tokens, small.runner.num_computed_tokens] == [16, 3 * 21 + 5]


def test_who_finds_no_place_lets_others_pass_but_none_that_would_keep_his():
    small = SmallEngine(max_loras=2, max_num_seqs=8)
    for number, length in ((1, 12), (2, 40)):
        small.add(number, [number], max_tokens=length, lora_name=str(number))
        small.step()
    small.add(3, [3], max_tokens=3, lora_name="3")  # waits for the place of 1
    small.add(4, [4], max_tokens=30, lora_name="1")  # its adapter is there, and would stay for ever
    small.add(5, [5], max_tokens=2, lora_name="2")  # this one's stays anyway
    small.add(6, [6], max_tokens=2)
    small.run_until(lambda: bool(small.reason(5) and small.reason(6)))
    assert not small.reason(1) and not small.tokens(3) and not small.tokens(4)
    small.run()
    ended = [output.number for output in small.outputs if output.finish_reason]
    assert ended.index(1) < ended.index(3) and set(ended[:2]) == {5, 6}
    for number, length, name in ((1, 12, 1), (2, 40, 2), (3, 3, 3), (4, 30, 1), (5, 2, 2), (6, 2, 0)):
        assert small.tokens(number) == expected_tokens([number], length, 0, name)


def test_a_wide_request_that_waits_for_rows_keeps_others_from_its_place():
    """It would find rows without a place, and then a place without rows, for ever."""
    small = SmallEngine(max_loras=1, max_num_seqs=4)
    small.add(1, [1], max_tokens=8, lora_name="1")
    small.add(2, [2], max_tokens=20)
    small.step()
    small.add(3, [3], max_tokens=3, n=4, lora_name="3")
    for number in range(4, 40):
        small.add(number, [number], max_tokens=6, lora_name="" if number % 2 else "4")
    small.run_until(lambda: bool(small.reason(3)))
    assert sum(bool(small.reason(number)) for number in range(4, 40) if number % 2 == 0) == 0
    small.run()
    assert small.tokens(38) == expected_tokens([38], 6, 0, adapter=4)


def test_thousands_that_wait_for_a_place_stop_nobody_else():
    small = SmallEngine(max_loras=1)
    small.add(1, [1], max_tokens=30, lora_name="1")
    small.step()
    for number in range(2, 300):
        small.add(number, [2], max_tokens=1, lora_name=str(number))
    small.add(300, [3], max_tokens=2)
    small.run_until(lambda: bool(small.reason(300)), 10)
    assert not small.reason(1)
    small.engine.cancel(list(range(1, 300)))
    small.run()


def test_nobody_gives_way_to_who_has_no_place_yet():
    small = SmallEngine(max_loras=1, max_num_seqs=4)
    small.add(1, [1], max_tokens=40, lora_name="1")
    small.add(2, [2], max_tokens=6)
    small.step()
    small.add(3, [3], max_tokens=3, n=3, lora_name="3")
    for number in (4, 5):  # overtake it, and would give way when 2 leaves it rows enough
        small.add(number, [number], max_tokens=20)
    small.run_until(lambda: bool(small.reason(4) and small.reason(5)))
    assert not small.reason(1) and not small.scheduler.counters.preemptions
    small.run()
    assert small.tokens(3) == expected_tokens([3], 3, 0, adapter=3)


def test_a_beam_comes_back_beside_its_siblings_although_others_wait_for_their_place():
    """They wait for it, and who is before it waits until they have ended."""
    small = SmallEngine(max_loras=1, max_num_seqs=6, overlaps=False)
    small.add(1, [1, 2, 3], max_tokens=8, n=2, beam_width=2, lora_name="1", priority=1)
    small.add(2, [2], max_tokens=50)
    small.run_until(lambda: len(small.scheduler.running) == 3)
    small.add(3, [3], max_tokens=3, lora_name="3", priority=0)
    small.step()
    small.scheduler._preempt(small.scheduler.running[-1])
    small.run_until(lambda: bool(small.reason(1)))
    assert not small.reason(2) and not small.reason(3)
    small.run()
    assert small.tokens(3) == expected_tokens([3], 3, 0, adapter=3)


def test_a_request_waits_until_there_is_memory_for_its_adapter():
    small = SmallEngine()
    small.adapters.has_room = False
    small.add(1, [1], max_tokens=3, lora_name="1")
    small.add(2, [2], max_tokens=3)
    for _ in range(20):
        small.step()
    assert small.reason(2) and not small.reason(1) and small.scheduler.num_waiting == 1
    small.adapters.has_room = True
    small.run()
    assert small.tokens(1) == expected_tokens([1], 3, 0, adapter=1)


def test_a_request_that_waits_for_its_adapter_can_be_cancelled():
    small = SmallEngine()
    small.adapters.has_room = False
    small.add(1, [1], max_tokens=3, lora_name="1")
    small.engine.cancel([1])
    small.run(10)
    assert small.reason(1) == ["cancelled"]


def test_an_engine_without_adapters_says_so():
    future = NoAdapters().start("mine")
    assert future is not None
    with pytest.raises(RequestError, match=r"no adapter 'mine' .*: this server has none"):
        future.result()


def adapter(key: str) -> Adapter:
    return Adapter(key, {})


def test_the_place_that_was_used_least_recently_is_taken():
    places = AdapterPlaces(2)
    a, b, c = (adapter(key) for key in "abc")
    place_of_a = places.find(a, (), ())
    assert places.find(b, (), ()) is None, "one is read in each step"
    assert places.take_load().place == place_of_a and places.take_load() is None
    place_of_b = places.find(b, (), ())
    places.take_load()
    assert {place_of_a, place_of_b} == {0, 1}
    assert places.find(a, (), ()) == place_of_a
    assert places.find(c, {0, 1}, ()) is None and not places.has_room(c, {0, 1}), "both are used"
    assert places.next_free(()) == place_of_b and places.next_free([place_of_b]) == place_of_a
    assert places.find(a, (), [place_of_a]) is None, "somebody waits for it"
    assert places.find(c, (), ()) == place_of_b and places.take_load().place == place_of_b
    assert places.find(b, {place_of_b}, ()) == place_of_a and places.has_room(a, {place_of_b})


class Folder:
    """An AdapterFolder over files that hold a number, and what it has read."""

    def __init__(self, path: Path, count: int = 2):
        self.read: list[str] = []
        self.path = path
        self.then: Callable[[], object] = lambda: None
        self.adapters = AdapterFolder(path, self._version, self._read, count)

    def write(self, name: str, number: int) -> None:
        (self.path / name).mkdir(exist_ok=True)
        (self.path / name / "number").write_text(json.dumps(number))

    def get(self, name: str) -> Adapter:
        future = self.adapters.start(name)
        assert future is not None
        return future.result(10)

    def _version(self, folder: Path) -> str:
        return (folder / "number").read_text()

    def _read(self, folder: Path) -> dict[str, np.ndarray]:
        self.read.append(folder.name)
        number = json.loads((folder / "number").read_text())
        self.then()
        if number < 0:
            raise ValueError("it is below 0")
        return {"number": np.array(number)}


def test_adapters_are_read_once_until_they_change(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", 1)
    first = folder.get("a")
    assert folder.get("a") is first and folder.read == ["a"]
    folder.write("a", 2)
    second = folder.get("a")
    assert second.key != first.key and int(second.tensors["number"]) == 2
    folder.write("later", 3)
    assert int(folder.get("later").tensors["number"]) == 3


def test_what_is_no_adapter_is_refused_by_name(tmp_path):
    folder = Folder(tmp_path / "adapters")
    folder.path.mkdir()
    (tmp_path / "number").write_text("7")
    folder.write("bad", -1)
    Path(os.fsdecode(os.fsencode(folder.path) + b"/\xff-no-text")).mkdir()
    for name in ("nobody", "..", "../adapters/bad", "", ".", "/", "a\0b"):
        with pytest.raises(RequestError, match=r"there is no adapter .*; there are: bad"):
            folder.get(name)
    with pytest.raises(RequestError, match="the adapter 'bad' cannot be used: it is below 0"):
        folder.get("bad")
    for number in range(30):
        folder.write(f"x{number}", 1)
    with pytest.raises(RequestError, match=r"there are: bad, x0, .*, \.\.\.$"):
        folder.get("nobody")
    folder.path.rename(tmp_path / "gone")
    with pytest.raises(RequestError, match="lora_dir cannot be read: No such file"):
        folder.get("bad")


def test_what_is_written_while_it_is_read_is_not_taken(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", 1)
    folder.then = lambda: folder.write("a", 2)
    with pytest.raises(RequestError, match="the adapter 'a' cannot be used: it is being written; try again"):
        folder.get("a")
    folder.then = lambda: None
    assert int(folder.get("a").tensors["number"]) == 2


def test_those_who_ask_for_the_same_at_once_share_one_reading(tmp_path):
    folder = Folder(tmp_path, count=1)
    folder.write("a", 1)
    begin = threading.Event()
    folder.then = lambda: begin.wait(10)
    first, *others = [folder.adapters.start("a") for _ in range(20)]
    begin.set()
    assert all(other is first for other in others) and first is not None
    assert int(first.result(10).tensors["number"]) == 1 and folder.read == ["a"]


def test_only_so_many_are_in_memory(tmp_path):
    folder = Folder(tmp_path, count=1)
    for number in range(6):
        folder.write(str(number), number)
    held = [folder.get(str(number)) for number in range(4)]
    assert folder.adapters.start("4") is None
    del held[0]
    gc.collect()
    assert int(folder.get("4").tensors["number"]) == 4
    assert folder.adapters.start("5") is None
    del held
    gc.collect()
    assert int(folder.get("5").tensors["number"]) == 5
