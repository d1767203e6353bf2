"""The seccomp program, run as the kernel runs it: which calls it lets through."""

import socket

import pytest

from palestra.sandbox import kernel
from tests.unit.sandbox.bpf import ALLOW, ERRNO, KILL, answer

EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97


PLAIN = kernel.seccomp_program()


@pytest.mark.parametrize("name", ["ptrace", "unshare", "mount", "bpf", "keyctl", "userfaultfd", "setns", "kexec_load"])
def test_calls_that_reach_into_the_kernel_are_refused(name: str) -> None:
    assert answer(PLAIN, kernel._NUMBERS[name]) == ERRNO | EPERM


@pytest.mark.parametrize("name", ["clone3", "io_uring_setup", "memfd_secret"])
def test_calls_that_libraries_try_first_are_unknown(name: str) -> None:
    assert answer(PLAIN, kernel._NUMBERS[name]) == ERRNO | ENOSYS


def test_all_other_calls_pass() -> None:
    known = set(kernel._NUMBERS.values())
    passing = [number for number in range(500) if number not in known]
    assert {answer(PLAIN, number) for number in passing} == {ALLOW}


def test_threads_and_forks_pass_and_new_namespaces_do_not() -> None:
    clone = kernel._NUMBERS["clone"]
    thread = 0x003D0F00  # what glibc asks for
    assert answer(PLAIN, clone, [thread]) == ALLOW
    assert answer(PLAIN, clone, [17]) == ALLOW
    for flag in (kernel.NEWUSER, kernel.NEWNS, kernel.NEWNET, kernel.NEWPID, kernel.NEWCGROUP, 0x80):
        assert answer(PLAIN, clone, [flag | 17]) == ERRNO | EPERM


def test_families_of_sockets() -> None:
    number = kernel._NUMBERS["socket"]
    families = range(46)
    passing = {f for f in families if answer(PLAIN, number, [f]) == ALLOW}
    assert passing == {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
    assert answer(PLAIN, number, [40]) == ERRNO | EAFNOSUPPORT
    closed = kernel.seccomp_program(no_network=True)
    assert {f for f in families if answer(closed, number, [f]) == ALLOW} == set()


def test_pairs_of_sockets_are_of_one_family() -> None:
    """Others cannot be used as pairs, but to ask for them loads the kernel's modules."""
    number = kernel._NUMBERS["socketpair"]
    assert [f for f in range(46) if answer(PLAIN, number, [f]) == ALLOW] == [socket.AF_UNIX]


def test_what_is_set_of_the_first_process_is_refused_unless_it_is_the_program() -> None:
    of_program = kernel.seccomp_program(is_first_ours=False)
    for name in kernel.OF_OTHERS:
        number = kernel._NUMBERS[name]
        assert [answer(PLAIN, number, [pid]) for pid in (0, 1, 2)] == [ALLOW, ERRNO | EPERM, ALLOW]
        assert answer(of_program, number, [1]) == ALLOW
    number = kernel._NUMBERS["setpriority"]
    assert [answer(PLAIN, number, [0, pid]) for pid in (0, 1, 2)] == [ALLOW, ERRNO | EPERM, ALLOW]
    assert [answer(PLAIN, number, [which, 0]) for which in (1, 2)] == [ERRNO | EPERM] * 2
    assert answer(of_program, number, [0, 1]) == ALLOW


def test_typing_into_terminals_is_refused_and_other_controls_pass() -> None:
    number = kernel._NUMBERS["ioctl"]
    assert answer(PLAIN, number, [0, 0x5412]) == ERRNO | EPERM
    assert answer(PLAIN, number, [0, 0x541C]) == ERRNO | EPERM
    assert answer(PLAIN, number, [0, 0x5401]) == ALLOW


def test_uncounted_memory_is_refused_where_nothing_counts_it() -> None:
    strict = kernel.seccomp_program(uncounted_memory=False)
    for name in ("memfd_create", "shmget", "msgget", "semget"):
        assert answer(PLAIN, kernel._NUMBERS[name]) == ALLOW
        assert answer(strict, kernel._NUMBERS[name]) == ERRNO | ENOSYS


def test_other_architectures_are_killed_and_x32_is_unknown() -> None:
    assert answer(PLAIN, 1, architecture=0x40000003) == KILL
    assert answer(PLAIN, 0x40000000 + 1) == ERRNO | ENOSYS


def test_both_tables_name_calls_once() -> None:
    """A number that stands twice would be refused under one name and allowed under another."""
    for text in (kernel._X86, kernel._AARCH64):
        numbers = [word.split("=")[1] for word in text.split()]
        assert len(numbers) == len(set(numbers))
