"""Track happens-before: vector clocks of threads and agents, mbarriers, barriers, signals."""
