# SPDX-License-Identifier: Apache-2.0
"""Channel options of both sides."""

from oarlock.proto.arrays import MAX_MESSAGE_BYTES

# Calls that a server has or keeps waiting at once; gRPC answers any more at once, and without a thread.
MAX_CALLS = 4096

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
]
CLIENT_OPTIONS = [
    *_BOTH,
    # Retries are ours (client/retry.py): they know which errors a pause can mend.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # How long one attempt may take; on a machine that is busy, or under a crowd, a good server needs more than a moment.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
