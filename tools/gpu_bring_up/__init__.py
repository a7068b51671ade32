"""What one GPU proves in one command of at most nine minutes, and its rehearsal on machines without one.

`tools/gpu_bring_up.sh` is the front. Each step runs in a process of its own (`process.py`) with its own time-out, and
says what it finds check by check (`bench.py`), so that neither a crash nor a hang takes along what was known before.
"""
