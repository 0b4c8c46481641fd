# SPDX-License-Identifier: Apache-2.0
"""Channel options of both sides."""

from oarlock.proto.arrays import MAX_MESSAGE_BYTES

# Calls that a server has or keeps waiting at once; gRPC answers any more at once, and without a thread.
MAX_CALLS = 4096
# How long the system on the other side may confirm nothing of what was sent: the link is cut, or the machine is gone.
SILENT_SECONDS = 5

_BOTH = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 16777215),
    # Two processes must never share a port; a taken port is an error.
    ("grpc.so_reuseport", 0),
]
SERVER_OPTIONS = [
    *_BOTH,
    # A process without frames has two streams here, and few calls beside them; more of them wait at the client that makes them.
    ("grpc.max_concurrent_streams", 128),
    # Nobody of ours compresses: a message of some kilobytes could take all the memory that a message may.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Who connects and does not speak is cut off, and so is who is not there any more (a machine that lost power).
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients ask more often than gRPC thinks decent; by default it would end their connections for it.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
CLIENT_OPTIONS = [
    *_BOTH,
    # Retries are ours (client/retry.py): they know which errors a pause can mend.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # How long one attempt may take; on a machine that is busy, or under a crowd, a good server needs more than a moment.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection over a link that is cut is given up after such a time without an answer. TCP alone would go on for a quarter of
    # an hour, and try at last only every other minute: so long nobody would see that the link is back.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", SILENT_SECONDS * 1000),
    # That one limits what TCP does not confirm, this one what the process does not answer.
    ("grpc.http2.ping_timeout_ms", SILENT_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
]
