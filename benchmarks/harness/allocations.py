"""Peak of what one unit of work asks of torch's CPU allocator, by tracing its allocations one by one."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.case import Work


def peak_bytes(work: Work) -> int:
    """The most bytes that tensors made by `work` hold at a time; what lived before is not counted.

    The second call is traced: the first may build kernels.
    """
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        work()
    events = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
