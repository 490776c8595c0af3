"""What a run shows of itself: the HTML report over one or several runs, and the data-set card of one."""
