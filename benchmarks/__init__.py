"""Benchmarks: our parts and their peers side by side in one process.

    python -m benchmarks                         list the groups
    python -m benchmarks train scan --rounds 9   run two of them

A group is one file of this folder with a function `group(options: Options) -> Group`; it is found by its name, so
that a new one edits nothing else. `benchmarks.harness` holds what all of them share:

    from benchmarks.harness import Case, Group, Missing, Options

    def group(options: Options) -> Group:
        return Group(
            title="what is timed, at which size",
            cases=[
                Case("ours bf16", setup=ours, tokens=4096, flops=6.8e11, peak="bf16",
                     peers=("theirs bf16",), check=gate),
                Case("theirs bf16", setup=theirs, tokens=4096, flops=6.8e11, peak="bf16"),
            ],
            missing=[Missing("third", "not installed: pip install third")],
        )

`setup()` builds the case and returns a callable that does one unit of work; it runs before the first round and
does its own warm-up where one call is not enough. `check()` is the correctness gate. All gates run before
anything is timed and any exception stops the group. See `harness.case` for every field.
"""
