"""Work in threads: results in order, and an error that ends all of it."""

import threading

import pytest

from jaxclip._core.threads import in_order, in_threads


def test_results_are_in_the_order_of_the_items():
    second_is_done = threading.Event()

    def square(x, is_over):
        if x == 2:
            second_is_done.set()
        elif x == 1:
            assert second_is_done.wait(60)
        return x * x

    assert in_threads(square, [1, 2, 3], 2) == [1, 4, 9]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_other_threads_and_what_has_not_begun(error):
    begun = []

    def fail_or_wait(x, is_over):
        begun.append(x)
        if x == 1:
            raise error("in the second")
        assert is_over.wait(60)

    with pytest.raises(error, match="in the second"):
        in_threads(fail_or_wait, [0, 1, *range(2, 100)], 2)
    assert len(begun) < 100
    assert threading.active_count() < 20


def test_results_come_in_order_and_few_items_are_begun_before_they_are_wanted():
    begun = []

    def square(x):
        begun.append(x)
        return x * x

    results = in_order(square, range(100), 2)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert len(begun) <= 5
    assert list(in_order(square, range(7), 3)) == [0, 1, 4, 9, 16, 25, 36]


def test_an_error_comes_where_its_result_would():
    results = in_order(lambda x: 1 // (2 - x), range(5), 2)
    assert next(results) == 0
    with pytest.raises(ZeroDivisionError):
        list(results)
