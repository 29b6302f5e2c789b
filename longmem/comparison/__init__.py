"""Every contender on every task, on one backbone: run, counted, reported."""
