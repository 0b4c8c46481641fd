# SPDX-License-Identifier: Apache-2.0
"""Every metric: its name, kind, labels, and what it says. docs/metrics.md is made of this table.

Invariant: this table is the only list of metrics; a source that says anything else is refused. Names follow Prometheus: base
units (seconds, bytes), `_total` at the end of what only grows. A name does not change its meaning.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric. ``labels`` tell its samples apart; ``of``: the part of a job that has it."""

    of: str
    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


def _metrics(of: str, prefix: str, labels: tuple[str, ...], *rows: tuple[str, Kind, str]) -> tuple[Metric, ...]:
    """Return metrics; a row's name may be followed by further labels: ``seconds_total stage``."""
    out = []
    for name, kind, help_text in rows:
        first, *more = name.split()
        out.append(Metric(of, prefix + first, kind, (*labels, *more), help_text))
    return tuple(out)


_COORDINATOR = _metrics(
    "coordinator",
    "oarlock_coordinator_",
    (),
    ("info id name recipe mode", "gauge", "1; the labels say which job it is."),
    ("phase phase", "gauge", "1 for the phase that the job is in, 0 for the others."),
    ("run", "gauge", "The job's run: 1 more after every restore."),
    ("term", "gauge", "The coordinator's life: 1 more after every start."),
    ("generation", "gauge", "Version of the placement."),
    ("placed_shards", "gauge", "Shards that own their blocks under the newest placement."),
    ("members role", "gauge", "Members that are alive."),
    ("lost_members role", "gauge", "Members of this run that died."),
    ("wanted_members role", "gauge", "Members that are wanted, as somebody asked or the scaler decided."),
    (
        "autoscale_decisions_total role direction",
        "counter",
        "Decisions of the scaler in this life for more, and for fewer, those of a dry run included.",
    ),
    ("epoch", "gauge", "Epochs that are done: trained and evaluated."),
    ("epochs", "gauge", "Epochs that the job is to do."),
    ("splits work", "gauge", "Splits of the epoch, to train and to evaluate."),
    ("closed_splits work", "gauge", "Splits of the epoch that are trained, or evaluated."),
    ("open_splits work", "gauge", "Splits that are leased to workers."),
    ("groups_total", "counter", "Groups of all closed splits: the step of the job."),
    ("samples_total", "counter", "Samples of all closed splits."),
    ("train_seconds_total", "counter", "Time in which there were workers and something to train."),
    ("evaluate_seconds_total", "counter", "Time in which there were workers and something to evaluate."),
    ("epoch_loss", "gauge", "Mean training loss of the last epoch that is done."),
    ("epoch_result result", "gauge", "What the evaluation of the last epoch that is done came to."),
    (
        "orders_total order result",
        "counter",
        "Orders to shards (adopt, close, write): done, and failed (sent again, if that can do better; too early is neither).",
    ),
    ("checkpoints_total result", "counter", "Checkpoints of this process: committed, and failed."),
    ("warnings", "gauge", "What went wrong without ending the job; `oarlock status` shows the words."),
)
_SHARD = _metrics(
    "shard",
    "oarlock_shard_",
    ("shard",),
    ("pulls_total", "counter", "Pulls that were answered with rows."),
    ("pushes_total", "counter", "Pushes that changed something; a repetition changes nothing."),
    ("pull_seconds", "histogram", "Time of a pull in the tables, without network and message."),
    ("push_seconds", "histogram", "Time of a push in the tables, the wait for the one before it included."),
    ("push_staleness", "histogram", "Pushes that were applied between a push and the pull that fed it."),
    (
        "pull_bytes_total",
        "counter",
        "Bytes of the rows and dense values that pulls were answered with, as they travelled.",
    ),
    ("pull_saved_bytes_total", "counter", "What these would have been more as float32."),
    ("push_bytes_total", "counter", "Bytes of the gradients of pushes that changed something, as they travelled."),
    ("push_saved_bytes_total", "counter", "What these would have been more as float32."),
    ("blocks", "gauge", "Blocks that the shard owns."),
    ("generation", "gauge", "Version of the placement that the shard goes by."),
    ("step", "gauge", "Highest step of an update so far, by which rows age."),
    ("marks_bytes", "gauge", "Memory of marks."),
    ("open_splits", "gauge", "Splits that marks are kept of."),
    ("dense_bytes", "gauge", "Memory of dense parameters with their state."),
    ("refused_dense_gradients_total", "counter", "Gradients of dense blocks refused, not finite or too large."),
    ("not_admitted_gradients_total", "counter", "Gradients of keys that a table's admission did not let in yet."),
    ("undone_rows_total", "counter", "Rows whose last updates were taken back on request."),
    ("copied_bytes_total", "counter", "Bytes of whole blocks that came from other shards."),
    ("sweep_slices_total", "counter", "Slices of blocks that were looked through for rows to evict."),
    ("feed_bytes", "gauge", "Changes of rows that are kept for processes that serve them; 0 while nobody follows."),
    ("feed_rows_total", "counter", "Rows that were gathered for them because they changed, whoever gets them."),
    ("feed_tombstones_total", "counter", "Keys that left, as they are told."),
    ("feed_overflows_total", "counter", "How often more keys changed than are noted between two of their questions."),
    ("told_bytes_total", "counter", "Bytes of the answers to them, whole blocks included."),
    ("told_whole_bytes_total", "counter", "Bytes of blocks that they got whole."),
    ("told_dense_bytes_total", "counter", "Bytes of dense values that they got."),
    (
        "cut_bytes state",
        "gauge",
        "Of the cut that is being written: about how many bytes are, and will be; 0 if none is.",
    ),
    ("compacted_blocks_total", "counter", "Chains of checkpoint files that were made one file, beside training."),
    ("compacted_bytes_total", "counter", "Bytes of these files."),
    ("compacting_seconds_total", "counter", "Time in which they were made."),
    ("compaction_failures_total", "counter", "Chains that could not be made one file; `oarlock status` says why."),
    ("compactions_due", "gauge", "Chains that wait for it."),
)
_TABLE = _metrics(
    "shard, by table",
    "oarlock_table_",
    ("shard", "table"),
    ("rows", "gauge", "Rows, in memory and spilled."),
    ("bytes", "gauge", "Memory of rows, indexes and sketches."),
    ("asked_rows_total", "counter", "Rows that pulls asked for, unknown keys included."),
    ("pulled_rows_total", "counter", "Rows that pulls were answered with: those asked for, less what workers keep."),
    ("pushed_rows_total", "counter", "Rows that pushes brought gradients for."),
    ("refused_gradients_total", "counter", "Gradients refused, not finite or too large."),
    ("waiting_keys", "gauge", "Keys that are counted and have no row yet."),
    ("spilled_rows", "gauge", "Rows in the spill file."),
    ("expanded_rows", "gauge", "Rows that have all their parts."),
    ("evicted_rows_total", "counter", "Rows that were evicted."),
)
_WORKER = _metrics(
    "worker",
    "oarlock_worker_",
    ("worker",),
    ("batches_total", "counter", "Batches that were computed."),
    ("samples_total", "counter", "Samples of these batches."),
    ("refused_gradients_total", "counter", "Gradients that shards refused, not finite or too large."),
    ("open_splits", "gauge", "Splits that are read or trained."),
    (
        "stage_seconds_total stage",
        "counter",
        "Time in a stage of the work; reading and computing overlap.",
    ),
    ("stage_entries_total stage", "counter", "How often a stage was entered and left."),
    ("pull_seconds", "histogram", "Time from a pull to its last answer, repetitions included."),
    ("push_seconds", "histogram", "Time from a push to its last acknowledgement, repetitions included."),
)
_CACHE = _metrics(
    "worker, by table with a cache",
    "oarlock_cache_",
    ("worker", "table"),
    ("rows", "gauge", "Rows that the worker keeps."),
    (
        "hits_total",
        "counter",
        "Rows that training pulls asked for and that did not come, since a kept one is new enough.",
    ),
    ("misses_total", "counter", "Rows that came; with the hits, all that training pulls asked for."),
    ("outdated_total", "counter", "Rows that came though they were kept, since these were too old."),
    ("bound", "gauge", "Updates that a kept row may lack at present."),
    (
        "excess",
        "gauge",
        "Of an adaptive bound: how much higher the loss is with kept rows than with fresh ones, relative to it.",
    ),
    ("probes_total", "counter", "Of an adaptive bound: groups that were pulled fresh to find that out."),
    ("evictions_total", "counter", "Kept rows that gave their place to others."),
    ("saved_bytes_total", "counter", "Bytes of the rows that did not come."),
)
_MEMBER = _metrics(
    "shard and worker",
    "oarlock_member_",
    ("role", "member"),
    ("lease_seconds", "gauge", "Time left of the lease by the member's own clock; below 0 it has none."),
    ("generation", "gauge", "Version of the placement that a worker goes by, 0 before the first; a shard has its own."),
    ("run", "gauge", "The run of the job that the member is in."),
)

_SERVING = _metrics(
    "serving process",
    "oarlock_serving_",
    (),
    ("ready", "gauge", "1 if a model is served."),
    ("run", "gauge", "Run of the job that the served state is of."),
    ("cut", "gauge", "Number of the checkpoint that is served."),
    ("age_seconds", "gauge", "How old the state that is served is."),
    ("pinned", "gauge", "1 if newer checkpoints are not taken."),
    ("problem", "gauge", "1 if a newer checkpoint could not be taken; `oarlock serve status` says why."),
    ("swaps_total", "counter", "How often another checkpoint took the place of the one that was served."),
    ("failed_loads_total", "counter", "Checkpoints that could not be opened."),
    ("load_seconds", "gauge", "How long the last one took to be opened."),
    ("lookup_seconds", "histogram", "Time of a look-up in the tables, without network and message."),
    ("nearest_seconds", "histogram", "Time of a search for nearest rows, without network."),
    ("rows table", "gauge", "Rows that are served."),
    ("table_bytes table", "gauge", "Bytes of keys, rows and index, those of mapped files included."),
    ("asked_keys_total table", "counter", "Keys that were looked up."),
    ("missing_keys_total table", "counter", "Keys that were looked up and have no row."),
    (
        "freshness_seconds",
        "histogram",
        "Of a job that is followed: how old the state of a shard's blocks is as it is put in place.",
    ),
    ("followed_rows_total", "counter", "The same: rows that were written because they changed."),
    ("followed_tombstones_total", "counter", "The same: keys whose rows left."),
    ("followed_bytes_total", "counter", "The same: bytes of the shards' answers."),
    ("followed_whole_blocks_total", "counter", "The same: blocks that came whole."),
    (
        "recall_lag_seconds",
        "histogram",
        "The same: how long rows that changed were not found by their new values among nearest ones.",
    ),
    ("recall_waiting_keys table", "gauge", "The same: changes that are still to be put into the index."),
    (
        "recall_rebuilds_total table",
        "counter",
        "The same: how often an index was made anew beside the one that answers.",
    ),
    ("prediction_seconds", "histogram", "Time from encoded samples to their scores, the wait for a batch included."),
    ("predicted_samples_total", "counter", "Samples that were predicted."),
    ("batch_samples", "histogram", "Samples that were computed at once."),
    ("waiting_samples", "gauge", "Samples that wait for a batch."),
    ("overloaded_total", "counter", "Predictions that were refused because too many waited."),
    (
        "hedges_total",
        "counter",
        "Of a process without rows: requests for them that went to a second server, since the first was slow.",
    ),
    ("hedges_won_total", "counter", "The same: those that the second one answered first."),
    ("failovers_total", "counter", "The same: requests that went to another server since one failed."),
    ("http_responses_total status", "counter", "Requests over HTTP that were answered, by status."),
    ("http_connections", "gauge", "Connections of HTTP."),
    (
        "http_denied_total why",
        "counter",
        "Requests over HTTP that were not let in: no token, or one too many a second.",
    ),
)


def _rpc(side: str, *rows: tuple[str, Kind, str]) -> tuple[Metric, ...]:
    return _metrics(f"every process, as {side}", f"oarlock_rpc_{side}_", (), *rows)


_SERVER = _rpc(
    "server",
    ("requests_total method", "counter", "Requests that were answered, refusals included."),
    ("failures_total method error", "counter", "Requests that were refused, by the error's name."),
    ("received_bytes_total method", "counter", "Bytes of requests, without the frames of HTTP/2."),
    ("sent_bytes_total method", "counter", "Bytes of answers, without the frames of HTTP/2."),
    ("seconds_total method", "counter", "Time from a whole request to its whole answer, summed over threads."),
    (
        "open_calls kind",
        "gauge",
        "Calls and connections that hold a thread; a worker has up to four connections of frames to each shard, or two streams.",
    ),
    (
        "denied_total why",
        "counter",
        "Calls that were not let in: without a token of the job, of a role that may not, or one too many a second.",
    ),
    (
        "refused_total why",
        "counter",
        "Requests refused for want of memory, or because nobody waited for them any more.",
    ),
    ("memory_bytes what", "gauge", "Memory taken for requests, answers and kept buffers, and the limit of all."),
    ("waiting_requests", "gauge", "Frames that wait for memory before they are received."),
)
_CLIENT = _rpc(
    "client",
    ("requests_total method", "counter", "Requests that were sent, repetitions and failures included."),
    ("failures_total method error", "counter", "Requests that ended in an error, by its name."),
    ("sent_bytes_total method", "counter", "Bytes of requests, without the frames of HTTP/2."),
    ("received_bytes_total method", "counter", "Bytes of answers, without the frames of HTTP/2."),
    ("seconds_total method", "counter", "Time from a request to its answer, summed over those in flight."),
    ("connections", "gauge", "Addresses that this process has called."),
)
_PROCESS = (
    Metric("every process", "oarlock_process_info", "gauge", ("role", "version"), "1; the labels say what it is."),
    Metric(
        "every process",
        "oarlock_telemetry_failures_total",
        "counter",
        (),
        "Sources that could not be asked; the log says why.",
    ),
    Metric("every process", "process_cpu_seconds_total", "counter", (), "User and system time of the process."),
    Metric("every process", "process_resident_memory_bytes", "gauge", (), "Memory that the process has in RAM."),
    Metric("every process", "process_virtual_memory_bytes", "gauge", (), "Addresses that the process has mapped."),
    Metric(
        "every process", "process_start_time_seconds", "gauge", (), "When the process began, since the epoch of Unix."
    ),
    Metric("every process", "process_open_fds", "gauge", (), "Open file descriptors."),
    Metric("every process", "process_max_fds", "gauge", (), "File descriptors that the process may open."),
    Metric("every process", "process_threads", "gauge", (), "Threads of the process."),
)

METRICS = (*_COORDINATOR, *_SHARD, *_TABLE, *_WORKER, *_CACHE, *_SERVING, *_MEMBER, *_SERVER, *_CLIENT, *_PROCESS)
BY_NAME = {metric.name: metric for metric in METRICS}
