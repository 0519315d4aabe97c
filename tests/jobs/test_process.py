"""Telling processes apart: ended, not yet reaped, another with the same number, another start of the machine."""

import os
import subprocess
import sys
import threading
import time

import pytest

from model.jobs import process
from model.jobs.process import Process, end, identify, is_alive, locked, try_lock

needs_proc = pytest.mark.skipif(not process.HAS_PROC, reason="needs /proc")


@pytest.fixture
def child():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def test_a_running_process_is_alive_until_it_ends(child):
    its = identify(child.pid)
    assert is_alive(its)
    end(its)
    child.wait()
    assert not is_alive(its)
    end(its)  # again: nothing happens


@needs_proc
def test_a_zombie_is_not_alive(child):
    its = identify(child.pid)
    child.kill()
    deadline = time.monotonic() + 10
    while is_alive(its) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, 0)  # not reaped: it has its number still
    assert not is_alive(its)


@needs_proc
def test_another_process_with_the_same_number_is_another(child):
    its = identify(child.pid)
    assert not is_alive(its._replace(started=its.started - 1))
    assert not is_alive(its._replace(boot_id="another start of the machine"))
    end(its._replace(started=its.started - 1), force=True)
    assert child.poll() is None


def test_without_proc_the_number_decides(child, monkeypatch):
    monkeypatch.setattr(process, "HAS_PROC", False)
    its = Process(child.pid, None, process.boot_id())
    assert is_alive(its)
    child.kill()
    child.wait()
    assert not is_alive(its)


@pytest.mark.parametrize("pid", [0, -1, 1])
def test_numbers_that_mean_many_processes_or_the_first_are_never_a_worker(pid):
    assert not is_alive(Process(pid, None, process.boot_id()))


@needs_proc
def test_a_name_with_parentheses_does_not_confuse(tmp_path):
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    try:
        assert is_alive(identify(child.pid))
        assert identify(child.pid).started >= identify(os.getpid()).started
    finally:
        child.kill()
        child.wait()


def test_a_lock_is_held_by_one_and_freed_by_its_death(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from model.jobs.process import try_lock\n"
        "lock = try_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        assert child.stdout.readline() == b"held\n"
        assert try_lock(path) is None
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with try_lock(path):
        assert try_lock(path) is None
    assert try_lock(path)


def test_two_threads_exclude_each_other(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) == 60
