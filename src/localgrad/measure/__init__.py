"""What a step takes, measured: bytes, work, time, and pictures of it. Imports torch only."""
