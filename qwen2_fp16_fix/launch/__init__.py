"""Running another program with the fix registered in it."""
