"""What the next trial is: samplers, what they are shown, and the thread that asks them."""
