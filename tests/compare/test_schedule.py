"""Which run comes next, and which learning rate is chosen by what."""

from __future__ import annotations

from tiny_plans import TINY, result

from vimtune.compare.plan import Cell, Plan
from vimtune.compare.schedule import Schedule

DATA = "synthetic_flowers"


def schedule(**values):
    return Schedule(
        Plan.from_values({**TINY, "methods": "lora,full", "seeds": "0,1,2", "lrs": "1e-3,1e-2", **values})
    )


def cells(plan):
    """All runs in the order in which one process makes them, where the larger learning rate is better on the
    validation split and worse on the test split."""
    order = []
    while (cell := plan.next()) is not None:
        order.append(cell)
        sign = 1 if cell.lr > 5e-3 else -1
        plan.done[cell] = result(50 - sign, val=50 + sign, lr=cell.lr, seed=cell.seed)
    return order


def test_the_grid_comes_first_then_the_other_seeds_with_the_chosen_rate_alone():
    plan = schedule()
    order = cells(plan)
    assert order[:4] == [
        Cell("lora", DATA, 1e-3, 0),
        Cell("lora", DATA, 1e-2, 0),
        Cell("lora", DATA, 1e-2, 1),
        Cell("lora", DATA, 1e-2, 2),
    ]
    assert len(order) == len(set(order)) == plan.total == 8
    lora, full = plan.rows()
    assert (lora.method, full.method) == ("lora", "full")
    assert lora.lr == 1e-2 and lora.seeds == [0, 1, 2] and lora.missing == 0 and lora.tried == 2
    assert lora.score.mean == 49  # the choice is not the one that is best on the test split


def test_several_seeds_may_choose_by_their_mean():
    plan = schedule(methods="lora", lr_seeds="0,1")
    for lr, seed, val in ((1e-3, 0, 90), (1e-2, 0, 60), (1e-3, 1, 10)):
        plan.done[Cell("lora", DATA, lr, seed)] = result(val=val, lr=lr, seed=seed)
        assert plan.chosen("lora", DATA) is None
    assert plan.next() == Cell("lora", DATA, 1e-2, 1)
    plan.done[plan.next()] = result(val=60, lr=1e-2, seed=1)
    assert plan.chosen("lora", DATA) == 1e-2
    assert plan.next() == Cell("lora", DATA, 1e-2, 2) and plan.total == 5


def test_equal_scores_are_told_apart_by_the_loss_and_then_by_the_order():
    plan = schedule(methods="lora")
    low, high = Cell("lora", DATA, 1e-3, 0), Cell("lora", DATA, 1e-2, 0)
    plan.done |= {low: result(val=50), high: result(val=50)}
    assert plan.chosen("lora", DATA) == 1e-3
    better = result(val=50)
    better.report.history[0]["loss"] = 0.1
    plan = schedule(methods="lora")
    plan.done |= {low: result(val=50), high: better}
    assert plan.chosen("lora", DATA) == 1e-2


def test_a_rate_that_fails_is_out_and_a_method_without_any_is_left_out():
    plan = schedule(methods="lora")
    plan.failed[Cell("lora", DATA, 1e-2, 0)] = "diverged"
    plan.done[Cell("lora", DATA, 1e-3, 0)] = result()
    assert plan.chosen("lora", DATA) == 1e-3 and plan.next() == Cell("lora", DATA, 1e-3, 1)
    plan = schedule(methods="lora")
    plan.failed = dict.fromkeys([Cell("lora", DATA, lr, 0) for lr in (1e-3, 1e-2)], "diverged")
    assert plan.next() is None
    (row,) = plan.rows()
    assert row.lr is None and row.results == () and row.missing == 3 and row.score is None


def test_runs_that_are_being_made_are_not_started_again():
    plan = schedule(methods="lora")
    plan.running = {plan.next()}
    second = plan.next()
    assert second == Cell("lora", DATA, 1e-2, 0)
    plan.running.add(second)
    assert plan.next() is None


def test_the_first_draw_of_the_data_chooses_and_all_draws_are_in_the_row():
    plan = schedule(methods="lora", seeds="0,1", data_seeds="5,6,7", shots=1)
    order = cells(plan)
    assert order == [
        Cell("lora", DATA, 1e-3, 0, 5),
        Cell("lora", DATA, 1e-2, 0, 5),
        *(
            Cell("lora", DATA, 1e-2, seed, draw)
            for draw in (5, 6, 7)
            for seed in (0, 1)
            if (seed, draw) != (0, 5)
        ),
    ]
    assert len(order) == plan.total == 7
    (row,) = plan.rows()
    assert len(row.results) == 6 and row.missing == 0 and row.score.count == 6
    del plan.done[Cell("lora", DATA, 1e-2, 1, 7)]
    assert plan.rows()[0].missing == 1 and plan.next() == Cell("lora", DATA, 1e-2, 1, 7)
