"""What runs next. No threads, no I/O, no clock: plan and commit are arithmetic, so that they can be fuzzed."""
