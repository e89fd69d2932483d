import threading

import pytest

from common.chunks import written_behind


def test_writing_is_one_behind_and_in_turn():
    done, may_go_on = [], threading.Event()

    def slow(value):
        may_go_on.wait(10)
        done.append(value)

    with written_behind() as write:
        write(slow, 1)
        assert done == []  # the caller goes on
        threading.Timer(0.1, may_go_on.set).start()
        write(slow, 2)
        assert done[0] == 1  # but does not run away
    assert done == [1, 2]


@pytest.mark.parametrize("more", [0, 1])
def test_a_failure_is_raised_at_the_next_write_or_at_the_end(more):
    later = []

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), written_behind() as write:
        write(fail)
        for _ in range(more):
            write(later.append, 1)
            raise AssertionError("the next write must raise it")
    assert later == []
