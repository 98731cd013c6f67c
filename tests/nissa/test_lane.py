"""The lane: never waits for its writer, keeps order, counts in the right places."""

import threading

from esper.nissa.lane import Lane


def test_a_stuck_writer_blocks_nobody_and_priority_still_enters():
    go, batches = threading.Event(), []

    def write(batch, urgent):
        go.wait(30)
        batches.append((list(batch), urgent))

    lane = Lane("test", write, capacity=3, linger_s=0.0)
    assert lane.put(0)
    while lane._queue:  # until the writer holds the first batch
        pass
    assert [lane.put(item) for item in (1, 2, 3, 4)] == [True, True, True, False]
    assert lane.put(5, priority=True)
    assert not lane.flush(0.05)
    assert not lane.close(0.05)
    go.set()
    assert lane.close(10)
    assert batches == [([0], False), ([1, 2, 3, 5], True)]
    assert not lane.put(6, priority=True)


def test_batches_gather_while_they_linger():
    batches = []
    lane = Lane("test", lambda batch, urgent: batches.append(list(batch)), linger_s=60.0)
    for item in range(100):
        lane.put(item)
    assert lane.flush(10)
    assert batches == [list(range(100))]
    assert lane.close(10)
