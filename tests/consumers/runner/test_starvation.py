from millstream.consumers.runner.starvation import Starvation


def test_only_a_growing_lag_without_tasks_is_starvation() -> None:
    now = 0.0
    starvation = Starvation(lambda: now)
    for lag in (3, 3, 2):
        starvation.observe(lag)
    assert starvation.seconds == 0
    now = 20.0
    starvation.observe(4)
    now = 50.0
    starvation.observe(4)
    assert starvation.seconds == 30
    starvation.observe(2)
    assert starvation.seconds == 0
    starvation.observe(5)
    starvation.reset()
    starvation.observe(9)
    assert starvation.seconds == 0
