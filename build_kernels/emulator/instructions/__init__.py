"""What each instruction does: functions that decode it into a closure over a warp."""
