"""Who runs, who waits and who is stopped: pure rules over arrays."""
