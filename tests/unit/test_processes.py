"""Processes that scripts have started are found again, and no others."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time

from processes import facts_of, process_of, read_facts, write_facts


def test_a_process_is_found_until_it_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = facts_of(child.pid)
    found = process_of(facts)
    assert found is not None and found.pid == child.pid
    child.kill()
    deadline = time.monotonic() + 30
    while process_of(facts) is not None:  # nobody has waited for it: its number is still taken
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()
    assert process_of(facts) is None


def test_a_number_that_is_given_anew_is_another_process():
    facts = facts_of(os.getpid())
    assert process_of(facts) is not None
    assert process_of({**facts, "started": str(int(facts["started"]) + 1)}) is None


def test_facts_are_read_whole_while_others_write_them(tmp_path):
    file = tmp_path / "facts.json"
    assert read_facts(file) is None
    write_facts(file, os.getpid(), port=0)
    writer = multiprocessing.get_context("spawn").Process(target=_write_often, args=(file, os.getpid()))
    writer.start()
    ports = set()
    while writer.is_alive():
        facts = read_facts(file)
        assert facts is not None and process_of(facts) is not None
        ports.add(facts["port"])
    assert writer.exitcode == 0
    assert len(ports) > 1, "it was read while it was written"
    assert list(tmp_path.iterdir()) == [file], "nothing else is left"


def _write_often(file, pid):
    for port in range(3000):
        write_facts(file, pid, port=port)
