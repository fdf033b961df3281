"""What suspends a forward: doors on modules, frames, and the state of the thread."""
