# SPDX-License-Identifier: Apache-2.0
"""Channel options of both sides."""

from oarlock.proto.arrays import MAX_MESSAGE_BYTES

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 16777215),
    # Two processes must never share a port; a taken port is an error.
    ("grpc.so_reuseport", 0),
]
CLIENT_OPTIONS = [
    *SERVER_OPTIONS,
    # Retries are ours (client/retry.py): they know which errors a pause can mend.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
