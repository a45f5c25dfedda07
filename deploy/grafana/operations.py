"""The dashboard for those who run a server."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Sections, Table
from deploy.grafana.promql import mean, of, quantile, rate, rise
from lovasz.server.observe.metrics import PHASES

REQUESTS = (
    Panel(
        "Servers that answer Prometheus",
        "0: that server is down; the other panels show nothing for it, or old values.",
        "short",
        (("{{instance}}", of("up", job="lovasz")),),
        most=1,
    ),
    Panel(
        "Requests a second, by outcome",
        "gRPC status codes. INVALID_ARGUMENT, FAILED_PRECONDITION: an error of the caller. RESOURCE_EXHAUSTED: no "
        "room. ABORTED: a joint step that was given up, or a caller that stalled. CANCELLED, DEADLINE_EXCEEDED: the "
        "caller gave up. UNAVAILABLE: the server was stopping, or its device did not answer. INTERNAL: a fault of the "
        "server. Each retry of a refused call counts.",
        "reqps",
        (("{{code}}", f"sum by (code) ({rate('lovasz_requests_total')})"),),
    ),
    Panel(
        "Share of requests that failed",
        "All codes except OK. Clients retry calls that end with RESOURCE_EXHAUSTED or UNAVAILABLE, so their trainers "
        "may not have noticed.",
        "percentunit",
        (
            (
                "failed",
                f"1 - sum({rate('lovasz_requests_total', code='OK')}) / sum({rate('lovasz_requests_total')})",
            ),
        ),
        most=1,
    ),
    Panel(
        "Time of a request",
        "From the start of its call to the end of its answer (in one message: until gRPC has taken it), or to its "
        "failure. Resolution: the buckets of the histogram, 0.1, 0.2, 0.5, 1, 2, 5 ... Points: single requests whose "
        "callers record traces.",
        "s",
        tuple(
            (f"p{100 * share:.0f} {outcome}", quantile(share, "lovasz_request_seconds", outcome=outcome))
            for outcome, share in (("answered", 0.5), ("answered", 0.9), ("answered", 0.99), ("failed", 0.99))
        ),
        exemplars=True,
    ),
)

TIME = (
    Table(
        "Which phase slow requests spend their time in",
        "A row for requests that took more than 10, 1, 0.1, 0.01 s, or less: the share of their time in each phase, in "
        "the last five minutes. receive: header and payload; joint: waiting for the other ranks of the step; queue: "
        "waiting for the device; compute: the batch; copy: of the batch's gradients to the host; send. Those that "
        "failed count, too.",
        (
            f"sum by (over, phase) (rate({of('lovasz_class_phase_seconds_total')}[5m])) / on (over) group_left () "
            f"(sum by (over) (rate({of('lovasz_class_phase_seconds_total')}[5m])) > 0)",
        ),
        {"over\\phase": "took longer than, s", **{phase: phase for phase in PHASES}},
        dict.fromkeys(PHASES, "percentunit"),
        sorted_by="took longer than, s",
        empty="no requests, or no server answers",
        matrix=("over", "phase"),
    ),
    Panel(
        "How many took how long",
        "Requests per second by duration. A row counts requests that took longer than its seconds, up to the next row.",
        "reqps",
        (("over {{over}} s", f"sum by (over) ({rate('lovasz_class_requests_total')})"),),
    ),
    Panel(
        "Where a request spends its time",
        "Mean seconds in each phase, for each admitted request, stacked. Joint steps that never complete count, too.",
        "s",
        (
            (
                "{{phase}}",
                f"sum by (phase) ({rate('lovasz_phase_seconds_sum')}) "
                f"/ scalar(sum({rate('lovasz_phase_seconds_count', phase='receive')}) > 0)",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "99th percentile of each phase",
        "Of each phase separately: the values are not of the same requests. Points: traced requests.",
        "s",
        (("{{phase}}", quantile(0.99, "lovasz_phase_seconds", by="le, phase")),),
        exemplars=True,
    ),
    Panel(
        "Queue",
        "Requests that wait for the device.",
        "short",
        (("{{instance}}", of("lovasz_queue_requests")),),
    ),
)

JOINT_STEPS = (
    Table(
        "Joint steps that wait, and whom for",
        "Of each run the step that has waited longest. A rank that still sends its tensors counts as missing. The "
        "server's log and its status page (GET / on the metrics port) name all missing ranks.",
        tuple(
            f"max by (instance, run) ({of(f'lovasz_joint_step_{what}')})"
            for what in ("number", "first_missing_rank", "missing_ranks", "wait_seconds")
        ),
        {
            "run": "run",
            "Value #A": "step",
            "Value #B": "first missing rank",
            "Value #C": "how many are missing",
            "Value #D": "has waited for",
            "instance": "server",
        },
        {"has waited for": "s"},
        sorted_by="has waited for",
        empty="no step waits, or no server answers",
    ),
    Panel(
        "Wait of joint steps",
        "A rank is late or dead where this grows; the step is given up at --joint-timeout.",
        "s",
        (("{{run}} ({{instance}})", of("lovasz_joint_step_wait_seconds")),),
    ),
    Panel(
        "Joint steps and ranks there",
        "Steps of data-parallel trainings that wait for ranks, and the ranks that are there.",
        "short",
        (
            ("steps", f"sum({of('lovasz_joint_groups_waiting')})"),
            ("ranks there", f"sum({of('lovasz_joint_ranks_waiting')})"),
        ),
    ),
    Panel(
        "Joint steps in the last minute, by outcome",
        "completed; timeout: ranks were missing; left: all ranks ended their calls before it was complete; overloaded: "
        "no room; stopping: the server was stopping.",
        "short",
        rise("lovasz_joint_groups_total", "outcome"),
    ),
)

ROOM = (
    Panel(
        "Memory",
        "Tensor bytes of the requests held; the budget beyond which requests are refused (--memory-budget); buffers "
        "kept for the next requests; and the resident memory of the process.",
        "bytes",
        (
            ("{{instance}} held", of("lovasz_in_flight_bytes")),
            ("{{instance}} budget", of("lovasz_budget_bytes")),
            ("{{instance}} kept for the next", of("lovasz_staging_idle_bytes")),
            (
                "{{instance}} whole process",
                f"{of('process_resident_memory_bytes')} and on (instance) lovasz_build_info",
            ),
        ),
    ),
    Panel(
        "Requests held",
        "And the limit (--max-requests). A joint step holds one for each of its ranks as soon as the first arrives.",
        "short",
        (
            ("{{instance}} held", of("lovasz_in_flight_requests")),
            ("{{instance}} at most", of("lovasz_max_requests")),
        ),
    ),
    Panel(
        "Requests in a batch",
        "Mean; 1: nothing shares the device.",
        "short",
        (("requests", mean("lovasz_batch_requests")),),
    ),
    Panel(
        "Size of requests",
        "Logits and labels, without the gradient.",
        "bytes",
        (("mean", mean("lovasz_request_bytes")), ("p99", quantile(0.99, "lovasz_request_bytes"))),
    ),
    Panel(
        "Logits computed a second",
        "Of all requests.",
        "short",
        (("logits", f"sum({rate('lovasz_elements_total')})"),),
    ),
)

DEVICE = (
    Panel(
        "Busy with batches",
        "Share of the time in which the server's device had a batch to compute; 100 %: it is the bottleneck.",
        "percentunit",
        (("{{instance}}", f"sum by (instance) ({rate('lovasz_device_busy_seconds_total')})"),),
        most=1,
    ),
    Panel(
        "Utilization by anyone",
        "GPU time as the driver counts it, or the host's processors for a CPU.",
        "percentunit",
        (("{{instance}}", of("lovasz_device_utilization_ratio")),),
        most=1,
    ),
    Panel(
        "Memory of the device",
        "Of the GPU, or of the host; used by any process.",
        "bytes",
        (
            ("{{instance}} taken", of("lovasz_device_memory_used_bytes")),
            ("{{instance}} in all", of("lovasz_device_memory_bytes")),
        ),
    ),
    Panel(
        "Healthy",
        "1: the device gave the right answer to a known loss when last asked, and is not stuck in a batch.",
        "short",
        (("{{instance}}", of("lovasz_device_healthy")),),
        most=1,
    ),
)

REFUSED = (
    Panel(
        "Refused in the last minute, by reason",
        "no_bytes, no_requests: try again later (--memory-budget, --max-requests); name_limit: try again later "
        "(--tokens); too_large: can never fit; invalid: an error of the caller; mismatch: a rank that does not fit its "
        "joint step; conflict: two trainings with one name; starting, stopping: the server was starting or stopping.",
        "short",
        rise("lovasz_rejections_total", "reason"),
    ),
    Panel(
        "Given up by their callers in the last minute",
        "Cancelled, or past their deadline, and the phase that they were in.",
        "short",
        rise("lovasz_abandoned_total", "reason, phase"),
    ),
    Panel(
        "Callers that stalled in the last minute",
        "Cut off because they stopped sending their request, or reading their answer (--stall-timeout). The log names "
        "the former.",
        "short",
        rise("lovasz_stalled_total", "phase"),
    ),
    Panel(
        "Answers in the last minute that are not numbers",
        "Logits were NaN or infinite; a gradient scaler skips such a step. The loss of a named run then has a gap, "
        "on the other dashboard.",
        "short",
        (("answers", f"sum(increase({of('lovasz_nonfinite_results_total')}[1m]))"),),
    ),
)

OPERATIONS: Sections = {
    "Requests": REQUESTS,
    "Joint steps": JOINT_STEPS,
    "Time": TIME,
    "Room": ROOM,
    "Device": DEVICE,
    "Refused, given up, not finite": REFUSED,
}
